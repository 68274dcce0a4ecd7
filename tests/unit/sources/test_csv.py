"""A CSV input: opened by its ending, read lazily, broken lines told by number."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.sources.csv import BrokenLine, CsvRows, Dialect, Row
from dbop_raw.sources.files import Input, SourceError, open_input
from dbop_raw.sources.threads import items_in_thread


def rows_of(text: str | bytes, dialect: Dialect | None = None, *, raise_broken: bool = False) -> CsvRows:
    data = text.encode() if isinstance(text, str) else text
    return CsvRows(Input("f.csv", io.BytesIO(data)), dialect or Dialect(), raise_broken=raise_broken)


def read(text: str | bytes, dialect: Dialect | None = None) -> list[Row]:
    rows = rows_of(text, dialect)
    found = [list(row) for row in rows]
    assert rows.broken is None
    return list(found)


def test_the_header_names_the_columns_and_is_no_row() -> None:
    rows = rows_of("id,body\n1,a\n2,b\n")
    assert rows.header == rows.columns == ("id", "body")
    assert list(rows) == [["1", "a"], ["2", "b"]]


def test_quotes_newlines_and_delimiters_inside_of_a_field() -> None:
    assert read('id,body\n1,"a ""b"", c\nd"\r\n2,e\n') == [["1", 'a "b", c\nd'], ["2", "e"]]


def test_the_empty_field_is_null_unless_another_text_is() -> None:
    assert read("a,b\n,NA\n") == [[None, "NA"]]
    assert read("a,b\n,NA\n", Dialect(null="NA")) == [["", None]]
    # Python's reader can't tell them apart.
    assert read('a,b\n"",x\n') == [[None, "x"]]


def test_empty_lines_are_left_out_but_a_single_column_s() -> None:
    assert read("a,b\n1,2\n\n3,4\n\n") == [["1", "2"], ["3", "4"]]
    assert read("a\n1\n\n2\n") == [["1"], [None], ["2"]]


def test_a_byte_order_mark_is_no_part_of_the_header() -> None:
    assert rows_of(b"\xef\xbb\xbfid\n1\n").header == ("id",)


def test_other_delimiters_and_encodings() -> None:
    assert read("a\tb\n1\t2\n", Dialect(delimiter="\t")) == [["1", "2"]]
    assert read("a\nGröße\n".encode("latin-1"), Dialect(encoding="latin-1")) == [["Größe"]]


def test_columns_are_selected_and_ordered() -> None:
    rows = rows_of("a,b,c\n1,2,3\n,5,6\n")
    rows.select(["c", "a"])
    assert rows.columns == ("c", "a")
    assert [tuple(row) for row in rows] == [("3", "1"), ("6", None)]
    one = rows_of("a,b\n1,2\n")
    one.select(["b"])
    assert [tuple(row) for row in one] == [("2",)]


@pytest.mark.parametrize(
    ("columns", "says"), [(["d"], "'d' is not in the header"), (["a"], "more than once")]
)
def test_a_column_that_is_not_in_the_header_or_twice_is_refused(columns: list[str], says: str) -> None:
    with pytest.raises(SourceError, match=says):
        rows_of("a,b,a\n").select(columns)


@pytest.mark.parametrize("text", ["", "\n1,2\n"])
def test_a_file_without_a_header_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="no header"):
        rows_of(text)


BROKEN = [
    (b"a,b\n1,2\n3\n4,5\n", 3, "1 fields, where the header has 2", 1),
    (b'a,b\n"x\ny",2\n\n3,4,5\n', 5, "3 fields", 1),
    (b'a,b\n1,2\n3,"x\ny\n', 3, "can't be read as CSV: unexpected end of data", 1),
    (b'a,b\n1,2\n3,"x"y\n', 3, "can't be read as CSV", 1),
    (b"a,b\n1,2\n3,4\n5,\xff\n", 4, "not utf-8: byte 0xff", 2),
]


@pytest.mark.parametrize(("data", "line", "says", "before"), BROKEN)
def test_a_broken_line_ends_it_in_order_and_is_told_by_its_number(
    data: bytes, line: int, says: str, before: int
) -> None:
    rows = rows_of(data)
    assert len(list(rows)) == before
    assert rows.broken is not None
    assert rows.broken.line == line
    assert str(rows.broken).startswith(f"f.csv, line {line}: ")
    with pytest.raises(BrokenLine, match=says):
        list(rows_of(data, raise_broken=True))


def test_the_line_of_a_wrong_byte_is_right_far_down_in_a_file() -> None:
    good = "".join(f"{n},{'x' * (n % 50)}\n" for n in range(20_000))
    rows = rows_of(b"a,b\n" + good.encode() + b"1,\xe4\n")
    assert len(list(rows)) == 20_000
    assert rows.broken is not None
    assert rows.broken.line == 20_002


def packed(path: Path, text: str) -> Path:
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/", "")
            archive.writestr("folder/x.csv", text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.zip", "X.CSV.GZ"])
def test_packed_files_are_unpacked_by_their_ending_and_position_ends_at_size(
    tmp_path: Path, name: str
) -> None:
    path = packed(tmp_path / name, "a,b\n" + "1,2\n" * 5000)
    source = open_input(str(path))
    assert len(list(CsvRows(source, Dialect()))) == 5000
    assert source.size == path.stat().st_size
    assert 0 < source.position <= source.size
    assert not source.may_wait
    source.close()


@pytest.mark.parametrize("members", [[], ["a.csv", "b.csv"]])
def test_a_zip_of_none_or_several_files_is_refused_and_names_them(tmp_path: Path, members: list[str]) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, "a\n1\n")
    with pytest.raises(SourceError, match=", ".join(members) or "none"):
        open_input(str(path))


@pytest.mark.parametrize("name", ["x.gz", "x.zip"])
def test_what_is_no_archive_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(SourceError), contextlib.closing(open_input(str(path))) as source:
        CsvRows(source, Dialect())


def test_an_archive_cut_short_keeps_what_was_read_before(tmp_path: Path) -> None:
    path = tmp_path / "x.csv.gz"
    lines = "".join(f"{n},{n * 7919 % 100_003}\n" for n in range(200_000))
    whole = gzip.compress(f"a,b\n{lines}".encode())
    path.write_bytes(whole[: len(whole) // 2])
    with contextlib.closing(open_input(str(path))) as source:
        rows = CsvRows(source, Dialect())
        found = sum(1 for _ in rows)
    assert 0 < found < 200_000
    assert rows.broken is not None
    assert "can't be read further" in str(rows.broken)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(SourceError, match="can't be read"):
            open_input(str(path))


def test_a_file_is_read_lazily() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            data = (b"a,b\n1,2\n" * (len(buffer) // 8 + 1))[: len(buffer) // 8 * 8]
            buffer[: len(data)] = data
            return len(data)

    rows = iter(CsvRows(Input("endless", io.BufferedReader(Endless())), Dialect()))  # type: ignore[type-var]
    assert [next(rows) for _ in range(3)] == [["1", "2"], ["a", "b"], ["1", "2"]]


@pytest.mark.anyio
async def test_rows_read_in_a_thread_are_the_same_rows_in_order() -> None:
    text = "a,b\n" + "".join(f"{n},x\n" for n in range(1234))
    found = [list(row) async for row in items_in_thread(iter(rows_of(text)), 100)]
    assert found == [list(row) for row in rows_of(text)]


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=8)


@given(st.lists(st.lists(FIELD, min_size=3, max_size=3), max_size=20))
def test_what_python_wrote_is_read_as_it_was(table: list[list[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["a", "b", "c"])
    writer.writerows(table)

    def nulls() -> Iterator[list[str | None]]:
        for row in table:
            yield [value or None for value in row]

    assert read(text.getvalue()) == list(nulls())
