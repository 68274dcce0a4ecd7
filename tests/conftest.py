"""What every test gets: event loops, hypothesis set up for where it runs, and no silent skip."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.loops import ASYNCIO, LOOPS

# No deadline for one example: the machine may be busy. In CI the same examples each time, so that a red build
# is red again; on a desk new ones, so that something new is found. The blob repeats a failure elsewhere.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


# A shell has its background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = (
    "tests/faults/",
    "tests/integration/bench/",
    "tests/integration/cli/",
    "tests/integration/sizing/",
    "tests/integration/support/",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With DBOP_RAW_NO_SKIP, as in CI, a test that is skipped has failed: what is missing is no proof."""
    del item
    report = yield
    if os.environ.get("DBOP_RAW_NO_SKIP") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow as a whole folder: it takes its time, or starts a program for each test."""
    for item in items:
        if item.path.relative_to(config.rootpath).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked `every_loop` on each event loop."""
    if "anyio_backend" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_loop"):
        metafunc.parametrize("anyio_backend", LOOPS)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run on asyncio's own event loop; see `every_loop` for more."""
    return ASYNCIO


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's servers make their folders: here alone, and not where other programs make theirs."""
    with tempfile.TemporaryDirectory(prefix="dbop_raw_test-") as name:
        Path(name).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)
