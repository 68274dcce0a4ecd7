"""dbop_raw: driver-level middleware over asyncpg pools for PostgreSQL.

Engine is capacity, Session is consistency, Batch is resilience, and failure is data. The README says how they
are used.
"""

from dbop_raw.batch.batch import Batch, BatchResult, Failed, batch
from dbop_raw.batch.writers import copy_into, copy_text, each, execute_many
from dbop_raw.classify import classify
from dbop_raw.commit import CommitTokens
from dbop_raw.engine import Engine
from dbop_raw.errors import (
    AcquireTimeout,
    CommitUnknown,
    DbopError,
    EngineClosed,
    EngineOverloaded,
    OperationTimeout,
    PolicyError,
    RetriesExhausted,
    RollbackFailed,
    SkipLimitExceeded,
    TransactionAborted,
    TransactionMisuse,
)
from dbop_raw.events import Event, Observer
from dbop_raw.ingest import IngestReport, ingest
from dbop_raw.ledger import Ledger
from dbop_raw.operation import Operation, chain, operation, pipe
from dbop_raw.policy import RetryBudget, RetryPolicy
from dbop_raw.rejects import JsonlRejects, Reject, RejectSink
from dbop_raw.retry import retry
from dbop_raw.savepoint import savepoint
from dbop_raw.sizing import PoolAdvice, pool_advice
from dbop_raw.sqlstate import Repair, Rule, Verdict
from dbop_raw.stats import EngineStats
from dbop_raw.timeout import timeout

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
    "IngestReport",
    "JsonlRejects",
    "Ledger",
    "Observer",
    "Operation",
    "OperationTimeout",
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
