"""Doubles that tell the truth: a real PostgreSQL, a network that fails on purpose, a connection by script.

    with postgres() as server:                            # a real one: crash it, pause it, fail it over
        async with FaultProxy(server.host, server.port) as proxy:          # counts round trips
            proxy.inject(Fault("cut", when=query("COMMIT"), side="after"))  # and loses an answer
            connection = await asyncpg.connect(proxy.dsn(server.dsn))

A server is for what PostgreSQL does, a proxy for what the network does, and a script for what neither does on
demand. asyncio only, as asyncpg is. Nothing here needs Docker, the embedded wheel or pytest to be installed
before it is used.
"""

from __future__ import annotations

from dbop_raw.testing.errors import ServerError, ServerUnavailable
from dbop_raw.testing.faults import Fault, Injected, message, nth, query
from dbop_raw.testing.postgres import postgres, stop_kept
from dbop_raw.testing.proxy import FaultProxy
from dbop_raw.testing.scripted import ScriptedConnection, ScriptedPool, Step
from dbop_raw.testing.server import Server
from dbop_raw.testing.wire import Message

__all__ = [
    "Fault",
    "FaultProxy",
    "Injected",
    "Message",
    "ScriptedConnection",
    "ScriptedPool",
    "Server",
    "ServerError",
    "ServerUnavailable",
    "Step",
    "message",
    "nth",
    "postgres",
    "query",
    "stop_kept",
]
