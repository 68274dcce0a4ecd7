"""COPY's text format: what is written fast is what is written value by value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dbop_raw.batching.writers.text_format import escape, lines

VALUE = st.none() | st.text(alphabet="ab\t\n\r\\.N", max_size=4)
# A width, and rows of it: often without any NULL, for those go another way.
TABLE = st.integers(1, 3).flatmap(
    lambda width: st.sampled_from([VALUE, st.text(alphabet="ab\t\\", max_size=3)]).flatmap(
        lambda value: st.tuples(
            st.just(width),
            st.lists(st.lists(value, min_size=width, max_size=width), min_size=1, max_size=4),
        )
    )
)


@given(TABLE)
def test_lines_are_written_as_value_by_value(table: tuple[int, list[list[str | None]]]) -> None:
    width, rows = table
    slowly = ["\t".join("\\N" if value is None else escape(value) for value in row) for row in rows]
    assert lines(rows, width) == "\n".join(slowly)
