"""What is asked for: checked before anything starts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dbop_raw.sizing.options import BadOption, Options, parse_sizes


@pytest.mark.parametrize("text", ["", "0", "1,1", "a", "1,,2", "2000", "-1"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadOption, match="--sizes"):
        parse_sizes(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": 0},
        {"rounds": 0},
        {"seconds": 0.0},
        {"seconds": math.nan},
        {"warmup": -1.0},
        {"rate": 0.0},
        {"max_waiting": -1},
        {"cores": 0},
        {"burst": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        Options(**wrong)
