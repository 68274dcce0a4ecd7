"""What is a fault: options that make no sense are refused when it is made."""

from __future__ import annotations

import pytest

from dbop_raw.testing import Fault, query


@pytest.mark.parametrize("options", [{"action": "burn"}, {"side": "under"}, {"times": 0}, {"seconds": -1}])
def test_a_fault_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        Fault(**{"action": "cut", "when": query("x"), **options})  # type: ignore[arg-type]
