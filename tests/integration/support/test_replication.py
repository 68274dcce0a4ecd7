"""The rig for fail-overs: a standby streams, is promoted, and takes the old primary in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dbop_raw.testing import ServerError
from dbop_raw.testing.local import LocalServer
from tests.support.replication import promote, rewind, standby
from tests.support.servers import own_server
from tests.support.sessions import is_running
from tests.support.waiting import until_in_thread


@pytest.fixture(scope="module")
def primary() -> Iterator[LocalServer]:
    with own_server() as server:
        yield server


def test_a_standby_is_promoted_and_the_old_primary_rewound() -> None:
    with own_server() as old:
        old.sql("CREATE TABLE t AS SELECT 1 AS a")
        with standby(old, name="second") as new:
            assert new.sql("SELECT pg_is_in_recovery()") is True
            assert old.sql("SELECT application_name FROM pg_stat_replication") == "second"
            with pytest.raises(ServerError, match="read-only"):
                new.sql("INSERT INTO t VALUES (2)")
            promote(new)
            new.sql("INSERT INTO t VALUES (3)")
            old.sql("INSERT INTO t VALUES (4)")  # diverged: only pg_rewind can bring it back
            old.crash()
            rewind(old, new)
            old.start()
            assert old.sql("SELECT pg_is_in_recovery()") is True
            new.sql("INSERT INTO t VALUES (5)")
            until_in_thread(lambda: old.sql("SELECT array_agg(a ORDER BY a) FROM t") == [1, 3, 5])
        assert not is_running(new)


def test_the_slot_of_a_standby_goes_with_it(primary: LocalServer) -> None:
    slots = "SELECT count(*) FROM pg_replication_slots"
    with standby(primary):
        assert primary.sql(slots) == 1
    assert primary.sql(slots) == 0


def test_a_primary_is_not_promoted(primary: LocalServer) -> None:
    with pytest.raises(ServerError, match="recovery is not in progress"):
        promote(primary)


def test_a_standby_leaves_no_folder_behind(primary: LocalServer, roots: Path) -> None:
    with standby(primary):
        assert list(roots.iterdir()) != []
    assert list(roots.iterdir()) == []
