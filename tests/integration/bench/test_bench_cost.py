"""What `bench quick` does not show of `bench cost`. Nothing is timed."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.cost.layers import cost, depths, layers, profile_case
from bench.measure import measure
from bench.results import Result

pytestmark = pytest.mark.anyio


async def test_no_layer_keeps_what_a_call_allocates() -> None:
    kept = {name: (await cost(call, 300))["blocks"] for name, call in {**layers(), **depths()}.items()}
    # A timer that was cancelled stays with the event loop until its time has come: a few blocks each.
    assert {name: blocks for name, blocks in kept.items() if blocks > 12} == {}


async def test_the_profile_names_functions_and_no_folder_of_this_machine() -> None:
    result = Result("cost", {})
    await measure(
        profile_case(cast(Any, SimpleNamespace(sizes=SimpleNamespace(calls=20), result=result))), result
    )
    text = result.files["cost-profile.txt"]
    assert "dbop_raw/engine/" in text
    assert re.search(r"(?<![\w./])/\w+/", text) is None
