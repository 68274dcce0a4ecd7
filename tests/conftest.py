"""What every test gets: asyncio under anyio's plugin, and hypothesis set up for where it runs."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# No deadline for one example: the machine may be busy. In CI the same examples each time, so that a red build
# is red again; on a desk new ones, so that something new is found. The blob repeats a failure elsewhere.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


# A shell has its background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run on asyncio only: asyncpg knows no other loop."""
    return "asyncio"
