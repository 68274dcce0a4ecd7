"""dbop_raw: driver-level middleware over asyncpg pools for PostgreSQL, without an ORM.

Everything for daily use is imported from here. The layers, each with one concern:

- `Engine` defines capacity: how many connections there are, who waits for one, and what is thrown away.
- `Engine.run` and `Engine.transaction` define consistency: one short transaction, explicit SQL, committed or
  rolled back, never left open. `operation`, `pipe`, `timeout`, `retry` and `savepoint` say what runs in it.
- `batch` and `ingest` define resilience: an item that the server refuses is set aside, and the others are
  written.
- `classify` turns every error into a `Verdict`, which says what can repair it.

Beside it: `dbop_raw.events` (what an observer is told), `dbop_raw.observe` (observers to use as they are) and
`dbop_raw.testing` (servers and faults for tests).
"""

from dbop_raw.batching.batch import Batch, batch
from dbop_raw.batching.result import BatchResult, Failed
from dbop_raw.batching.writers.copy_into import copy_into
from dbop_raw.batching.writers.copy_text import copy_text
from dbop_raw.batching.writers.each import each
from dbop_raw.batching.writers.execute_many import execute_many
from dbop_raw.engine.commit import CommitTokens
from dbop_raw.engine.engine import Engine
from dbop_raw.engine.stats import EngineStats
from dbop_raw.events import Event, Observer
from dbop_raw.failure.classify import Phase, classify
from dbop_raw.failure.errors import (
    AcquireTimeout,
    CommitUnknown,
    DbopError,
    EngineClosed,
    EngineOverloaded,
    GroupFailed,
    LedgerMismatch,
    OperationTimeout,
    PolicyError,
    RetriesExhausted,
    RollbackFailed,
    SkipLimitExceeded,
    TransactionAborted,
    TransactionMisuse,
)
from dbop_raw.failure.policy import RetryBudget, RetryPolicy
from dbop_raw.failure.sqlstate import Repair, Rule, Verdict
from dbop_raw.ingestion.ingest import ingest
from dbop_raw.ingestion.ledger import Ledger
from dbop_raw.ingestion.rejects import JsonlRejects, Reject, RejectSink
from dbop_raw.ingestion.report import IngestReport
from dbop_raw.pipeline.operation import Operation, chain, operation, pipe
from dbop_raw.pipeline.retry import retry
from dbop_raw.pipeline.savepoint import savepoint
from dbop_raw.pipeline.timeout import timeout
from dbop_raw.sizing.advice import PoolAdvice, pool_advice

__all__ = [
    "AcquireTimeout",
    "Batch",
    "BatchResult",
    "CommitTokens",
    "CommitUnknown",
    "DbopError",
    "Engine",
    "EngineClosed",
    "EngineOverloaded",
    "EngineStats",
    "Event",
    "Failed",
    "GroupFailed",
    "IngestReport",
    "JsonlRejects",
    "Ledger",
    "LedgerMismatch",
    "Observer",
    "Operation",
    "OperationTimeout",
    "Phase",
    "PolicyError",
    "PoolAdvice",
    "Reject",
    "RejectSink",
    "Repair",
    "RetriesExhausted",
    "RetryBudget",
    "RetryPolicy",
    "RollbackFailed",
    "Rule",
    "SkipLimitExceeded",
    "TransactionAborted",
    "TransactionMisuse",
    "Verdict",
    "batch",
    "chain",
    "classify",
    "copy_into",
    "copy_text",
    "each",
    "execute_many",
    "ingest",
    "operation",
    "pipe",
    "pool_advice",
    "retry",
    "savepoint",
    "timeout",
]
