"""The table of SQLSTATEs: what each can be repaired by, and `verdict_of`, which looks an error up in it.

Pure: it knows no driver. The codes are those of PostgreSQL's Appendix A, "Error Codes" (`errcodes.txt` in its
source). What follows from a code is decided here, one row for a code or for a class (its first two
characters), each with its reason. Messages are never looked at, because the server translates them.

The severity counts as much as the code. FATAL and PANIC end the session, whatever the code. ERROR leaves the
session alive, even with a code that speaks of a lost connection or of a shutdown: then the server reports on
*another* process or node (a parallel worker, Citus, postgres_fdw, dblink), and our connection is well.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

from dbop_raw.failure.errors import PolicyError

__all__ = ["CONDITIONS", "RULES", "Blame", "Repair", "Rule", "Verdict", "normalise_overrides", "verdict_of"]


class Repair(enum.Enum):
    """The least that has to be done again before the same work can succeed."""

    SAVEPOINT = "savepoint"
    """What was done since a savepoint; the transaction goes on."""
    TRANSACTION = "transaction"
    """The whole transaction, after a pause; the connection can be the same."""
    CONNECTION = "connection"
    """The whole transaction, on another connection."""
    NEVER = "never"
    """Nothing helps: the same work fails in the same way again."""
    UNKNOWN = "unknown"
    """Not known, because the work may have been done: find out first. To repeat it could do it twice."""


Blame = Literal["item", "caller", "load", "server"]
"""Who has to act on an error, for a service that has to answer with a status.

- "item": the values; they will never be accepted. HTTP 422.
- "caller": the program: its SQL, its privileges, the way in which it uses this library. HTTP 500.
- "load": nobody; it may work later. Locks, timeouts, conflicts, overload, exhausted retries. HTTP 503.
- "server": whoever runs the database: it is away, out of disk, damaged or set up wrongly. HTTP 503.
"""

_TRANSIENT = frozenset({Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION})


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table: what follows from an error's code.

    Raises:
        PolicyError: `repair` is no `Repair`, or `blame` is none of the four words.
    """

    repair: Repair
    """What has to be done again."""
    evict: bool = False
    """Whether the connection must be closed instead of going back to its pool."""
    item: bool = False
    """Whether a single bad row can cause it: then a batch looks for that row. If not, a batch stops, because
    every row would meet the same error."""
    reason: str = ""
    """Why, in one short sentence."""
    blame: Blame | None = None
    """Who has to act on it; None derives it: "load" where the same connection can do it again, "server" where
    only another connection can or the outcome is unknown, else "item" where `item`, "server" where `evict`,
    and otherwise "caller"."""

    def __post_init__(self) -> None:
        # A string in place of a Repair would never compare equal to one.
        if not isinstance(self.repair, Repair):
            raise PolicyError(
                f"repair={self.repair!r} is not allowed: give a Repair, for example Repair.TRANSACTION"
            )
        if self.blame is not None and self.blame not in get_args(Blame):
            allowed = ", ".join(map(repr, get_args(Blame)))
            raise PolicyError(f"blame={self.blame!r} is not allowed: give one of {allowed}, or None")

    @property
    def blamed(self) -> Blame:
        """Who has to act on it: `blame`, or what is derived from the rest of the row."""
        if self.blame is not None:
            return self.blame
        if self.repair in {Repair.SAVEPOINT, Repair.TRANSACTION}:
            return "load"
        if self.repair in {Repair.CONNECTION, Repair.UNKNOWN}:
            return "server"
        if self.item:
            return "item"
        return "server" if self.evict else "caller"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done about one error."""

    sqlstate: str | None
    """The error's SQLSTATE, five characters; None where it has none."""
    condition: str
    """PostgreSQL's name for the SQLSTATE, or "unknown" for one that it does not list; the name of the
    exception's class where there is no SQLSTATE."""
    repair: Repair
    """What has to be done again."""
    evict: bool
    """Whether the connection must be closed instead of going back to its pool."""
    item: bool
    """Whether a single bad row can cause it."""
    reason: str
    """Why, in one short sentence."""
    blame: Blame
    """Who has to act on it: "item", "caller", "load" or "server"."""

    @property
    def transient(self) -> bool:
        """Whether doing it again can help: from a savepoint, in a new transaction or on a new connection."""
        return self.repair in _TRANSIENT


def verdict_of(
    sqlstate: str | None, *, severity: str | None = None, overrides: Mapping[str, Rule] | None = None
) -> Verdict:
    """Look a SQLSTATE up: in the overrides by code, then by class; then in `RULES` in the same order.

    A code that has no row was made up by the user's own functions (`RAISE … USING ERRCODE`): nothing repairs
    it, and a single row can cause it. Never raises.

    Args:
        sqlstate: The code; None is looked up like a code that has no row.
        severity: The server's untranslated word (ERROR, FATAL, PANIC); None where the driver raised the error
            itself. FATAL and PANIC evict the connection whatever the code, turn SAVEPOINT and TRANSACTION
            into CONNECTION, and blame no row.
        overrides: Rows that win over the table, as `normalise_overrides` returns them.
    """
    if not overrides:
        return _known(sqlstate, severity)
    return _looked_up(sqlstate, severity, _overriding(sqlstate or "", overrides))


def _looked_up(sqlstate: str | None, severity: str | None, rule: Rule | None) -> Verdict:
    """Make the verdict by `rule`, or by `RULES` where that is None."""
    code = sqlstate or ""
    if rule is None:
        rule = _OTHER_NODE if severity == "ERROR" and code in _TELLS_OF_A_NODE else _rule(code, severity)
    if severity in _ENDS_THE_SESSION:
        rule = _session_ended(rule)
    condition = CONDITIONS.get(code) or _FORMER_CONDITIONS.get(code, "unknown")
    return Verdict(sqlstate, condition, rule.repair, rule.evict, rule.item, rule.reason, rule.blamed)


@functools.lru_cache(maxsize=1024)
def _known(sqlstate: str | None, severity: str | None) -> Verdict:
    """Look a code up in `RULES` alone, with a cache: a batch asks for each bad row, always the same codes."""
    return _looked_up(sqlstate, severity, None)


def normalise_overrides(mapping: Mapping[str, Rule | Repair]) -> Mapping[str, Rule]:
    """Check a user's rows, and complete them.

    Args:
        mapping: By code (5 characters) or by class (the first 2), in digits and upper-case letters. A `Rule`
            replaces the row of the table; a bare `Repair` keeps the rest of that row.

    Returns:
        The rows, each a `Rule` with a reason.

    Raises:
        PolicyError: A key is neither a code nor a class, or a value is neither a `Rule` nor a `Repair`.
    """
    rules: dict[str, Rule] = {}
    for key, value in mapping.items():
        if not (isinstance(key, str) and re.fullmatch(r"[0-9A-Z]{5}|[0-9A-Z]{2}", key)):
            raise PolicyError(
                f"{key!r} is not a SQLSTATE: give a code of 5 characters of 0-9A-Z, or a class of 2"
            )
        if isinstance(value, Repair):
            rules[key] = replace(_rule(key), repair=value, reason=_BY_THE_USER)
        elif isinstance(value, Rule):
            rules[key] = value if value.reason else replace(value, reason=_BY_THE_USER)
        else:
            raise PolicyError(f"{value!r} for {key!r} is not allowed: give a Rule or a Repair")
    return MappingProxyType(rules)


_BY_THE_USER = "set by the user of this engine"
_ENDS_THE_SESSION = frozenset({"FATAL", "PANIC"})


def _overriding(code: str, overrides: Mapping[str, Rule]) -> Rule | None:
    return overrides.get(code) or overrides.get(code[:2])


def _rule(code: str, severity: str | None = None) -> Rule:
    if code == "08P01" and severity == "ERROR":
        return _MALFORMED
    return RULES.get(code) or RULES.get(code[:2]) or _CUSTOM


def _session_ended(rule: Rule) -> Rule:
    repair = Repair.CONNECTION if rule.repair in _TRANSIENT else rule.repair
    # No row can be looked for on a connection that is gone, and none ends a session.
    blame: Blame = "server" if rule.blamed == "item" else rule.blamed
    return replace(rule, repair=repair, evict=True, item=False, blame=blame)


# About its own session a server says these with FATAL, or not at all. With ERROR it is alive, and passes on
# what another process or node has said: a parallel worker that was ended (PostgreSQL lowers its FATAL to
# ERROR), or a node behind Citus, postgres_fdw or dblink that is away. Our connection is well.
_TELLS_OF_A_NODE = frozenset(
    {"08000", "08001", "08003", "08004", "08006", "25P03", "57P01", "57P02", "57P03", "57P05"}
)

_S, _T, _C, _N, _U = Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION, Repair.NEVER, Repair.UNKNOWN

_OTHER_NODE = Rule(
    _T,
    reason="a node behind this server is away, this connection is well: try again after a pause",
    blame="server",
)
_MALFORMED = Rule(
    _N,
    evict=True,
    reason="a message that the server could not read: a new try would send the same",
)
_CUSTOM = Rule(
    _N,
    item=True,
    reason="a code of the user's own functions: what they refuse once they refuse again, for that row",
)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        # --- not errors by themselves: only a RAISE can make an error of them
        "00": Rule(
            _N, item=True, reason="the code of success, so a function raised it on purpose, about its row"
        ),
        "01": Rule(
            _N, item=True, reason="the code of a warning, so a function raised it on purpose, about its row"
        ),
        "02": Rule(_N, item=True, reason="a function found no data for its row, and will find none again"),
        "03": Rule(_N, reason="the statement is not complete: every row meets it"),
        # --- 08: the line. Without a severity the driver says so: it lost the connection by itself.
        "08": Rule(_U, evict=True, reason="the connection was lost: what was sent may have been done"),
        "08000": Rule(_U, evict=True, reason="the connection failed: what was sent may have been done"),
        "08001": Rule(_C, evict=True, reason="no connection could be made: nothing was sent"),
        "08003": Rule(
            _U,
            evict=True,
            reason="the connection was lost in the middle of a command, which may have been done",
        ),
        "08004": Rule(_C, evict=True, reason="the server refused the connection: nothing was sent"),
        "08006": Rule(_U, evict=True, reason="the connection failed: what was sent may have been done"),
        "08007": Rule(
            _U, evict=True, reason="the server says itself that it does not know how the transaction ended"
        ),
        # PgBouncer uses it for all of its own errors: some mean "never sent", some "lost on the way", and
        # only their text tells which.
        "08P01": Rule(
            _U,
            evict=True,
            reason="the protocol was broken, or a pooler cut the line: what was sent may have been done",
        ),
        # --- 09 to 0Z
        "09": Rule(_N, item=True, reason="a trigger refused its row"),
        "0A": Rule(_N, reason="the server can't do what the statement asks for: every row meets it"),
        "0B": Rule(_N, reason="the transaction was begun in a way that is not allowed"),
        "0F": Rule(_N, item=True, reason="a locator is a value, and a row brought a wrong one"),
        "0L": Rule(_N, reason="a grant of the statement is not allowed: every row meets it"),
        "0P": Rule(_N, reason="a role of the statement is not allowed: every row meets it"),
        "0Z": Rule(_N, item=True, reason="a function's error handling failed, which runs for some rows only"),
        # --- what a row's values can break
        "10": Rule(_N, item=True, reason="an argument of XQuery is a value, and a row brought a wrong one"),
        "20": Rule(_N, item=True, reason="a CASE of a function has no branch for this row"),
        "21": Rule(_N, item=True, reason="a row matches more rows than the statement allows"),
        "22": Rule(_N, item=True, reason="a value is not allowed: the same value never will be"),
        "23": Rule(_N, item=True, reason="a row breaks a constraint, and breaks it again"),
        "27": Rule(_N, item=True, reason="a trigger changed the row that set it off"),
        "44": Rule(_N, item=True, reason="a row does not fit the view that it is written through"),
        # --- what the statement or the session got wrong
        "24": Rule(_N, reason="a cursor is not in the state that the statement needs"),
        "25": Rule(_N, reason="the statement does not fit the state of the transaction"),
        "25006": Rule(
            _C,
            evict=True,
            reason="this server is read-only, most likely no primary any more: find the primary",
        ),
        "25P02": Rule(_N, reason="an earlier error made the transaction fail: that one is to be looked at"),
        "25P03": Rule(
            _C,
            evict=True,
            reason="the server ended a session that idled in its transaction, which is rolled back",
        ),
        "25P04": Rule(
            _N,
            evict=True,
            reason="the transaction took longer than transaction_timeout, and would again",
            blame="load",
        ),
        "26": Rule(_N, reason="the statement names a prepared statement that is not there"),
        "26000": Rule(
            _C,
            evict=True,
            reason="a prepared statement is not on this session: behind a pooler set statement_cache_size=0",
            blame="caller",
        ),
        "28": Rule(_N, reason="the role or its password is not accepted"),
        "2B": Rule(_N, reason="other objects depend on what the statement removes"),
        "2D": Rule(_N, reason="a function may not end the transaction that it runs in"),
        "2F": Rule(_N, item=True, reason="a function failed on its row"),
        "34": Rule(_N, reason="the statement names a cursor that is not there"),
        "38": Rule(_N, item=True, reason="a function in another language failed on its row"),
        "39": Rule(
            _N, item=True, reason="a function was called with, or gave back, what it may not, for this row"
        ),
        "3B": Rule(_N, reason="the savepoint is not there: the body ended it, or its transaction, itself"),
        "3D": Rule(_N, reason="there is no such database"),
        "3F": Rule(_N, reason="there is no such schema: every row meets it"),
        # --- 40: the server rolled the transaction back
        "40": Rule(_T, reason="the server rolled the transaction back: nothing was written"),
        "40000": Rule(_T, reason="the server rolled the transaction back: nothing was written"),
        # A savepoint does not help: under REPEATABLE READ and SERIALIZABLE the snapshot is older than it.
        "40001": Rule(
            _T,
            reason="a concurrent transaction got in between: a new snapshot is needed, so a new transaction",
        ),
        "40002": Rule(
            _N, reason="the transaction as a whole breaks a constraint, and breaks it again", blame="item"
        ),
        "40003": Rule(
            _U, reason="the server says itself that it does not know whether the statement was done"
        ),
        # ROLLBACK TO frees only the locks taken after the savepoint.
        "40P01": Rule(
            _T, reason="a deadlock: locks from before a savepoint are part of it, so the whole transaction"
        ),
        # --- 42: the statement
        "42": Rule(_N, reason="the statement is wrong, or not allowed to this role: every row meets it"),
        "42P05": Rule(
            _C,
            evict=True,
            reason="a prepared statement is there already: behind a pooler set statement_cache_size=0",
            blame="caller",
        ),
        # --- 53 to 58: the server's state
        "53": Rule(_T, reason="the server lacks a resource, which others may give back"),
        "53000": Rule(_T, reason="the server lacks a resource, which others may give back"),
        "53100": Rule(_N, reason="the disk is full, and stays full until somebody acts", blame="server"),
        "53200": Rule(_T, reason="the server is out of memory, which others may give back"),
        "53300": Rule(
            _C, reason="all connections of the server are taken: back off, and try again", blame="load"
        ),
        "53400": Rule(
            _N,
            reason="a limit of the server's configuration is reached, and stays until somebody acts",
            blame="server",
        ),
        # 54000 is, say, an index entry that is too large; 54001 a value nested too deep for the stack.
        "54": Rule(_N, item=True, reason="a row's value is too large or too deep for a limit of the program"),
        "54011": Rule(_N, reason="the statement or the table has too many columns: every row meets it"),
        "54023": Rule(_N, reason="a call in the statement has too many arguments: every row meets it"),
        "55": Rule(
            _N,
            reason="an object is not in the state that the statement needs, and a new try does not change it",
        ),
        "55006": Rule(_T, reason="another session uses the object: it may be done with it soon"),
        "55P03": Rule(
            _S,
            item=True,
            reason="a lock was not given in time; back at the savepoint it can be asked for again",
        ),
        "57": Rule(_N, reason="an operator stepped in", blame="server"),
        # Our own deadline is told apart from this by who asked for it: the timeout that set it.
        "57014": Rule(
            _N,
            reason="the statement was cancelled, by somebody or by a limit: not for us to start it again",
            blame="load",
        ),
        "57P01": Rule(
            _C,
            evict=True,
            reason="the server shuts down, or ended this session: the transaction is rolled back",
        ),
        "57P02": Rule(
            _C, evict=True, reason="the server recovers from a crash: the transaction is rolled back"
        ),
        "57P03": Rule(_C, reason="the server starts, stops or recovers: back off, and connect again"),
        "57P04": Rule(_N, evict=True, reason="the database was dropped"),
        "57P05": Rule(
            _C,
            evict=True,
            reason="the server ended a session that was idle for too long: nothing was under way",
        ),
        "58": Rule(_N, reason="a file that the server needs is missing or in the way", blame="server"),
        "58000": Rule(
            _C, evict=True, reason="the server's system failed it: another session may have more luck"
        ),
        "58030": Rule(
            _C,
            evict=True,
            reason="the server could not read or write a file: another session may have more luck",
        ),
        # PostgreSQL 16 and older; kept, for a server can be older than the table.
        "72": Rule(_T, reason="the snapshot became too old: a new transaction takes a new one"),
        # --- F0, HV, P0, XX
        "F0": Rule(_N, reason="the server's configuration is wrong", blame="server"),
        "HV": Rule(
            _N, reason="a foreign table or its server is set up wrongly: every row meets it", blame="server"
        ),
        "HV001": Rule(_T, reason="a foreign data wrapper is out of memory, which others may give back"),
        "HV00N": Rule(
            _T,
            reason="a foreign server can't be reached, this connection is well: try again after a pause",
            blame="server",
        ),
        "P0": Rule(_N, item=True, reason="a function refused its row"),
        # A row that Citus refuses under COPY comes as XX000 too: `classify` tells it by its routine.
        "XX": Rule(
            _N,
            evict=True,
            reason="a bug of the server or damaged data: not to be trusted, and nothing to repeat",
        ),
    }
)


# Codes of older servers that PostgreSQL 18 does not list any more.
_FORMER_CONDITIONS: Mapping[str, str] = MappingProxyType({"72000": "snapshot_too_old"})


CONDITIONS: Mapping[str, str] = MappingProxyType(
    {
        "00000": "successful_completion",
        "01000": "warning",
        "0100C": "dynamic_result_sets_returned",
        "01008": "implicit_zero_bit_padding",
        "01003": "null_value_eliminated_in_set_function",
        "01007": "privilege_not_granted",
        "01006": "privilege_not_revoked",
        "01004": "string_data_right_truncation",
        "01P01": "deprecated_feature",
        "02000": "no_data",
        "02001": "no_additional_dynamic_result_sets_returned",
        "03000": "sql_statement_not_yet_complete",
        "08000": "connection_exception",
        "08003": "connection_does_not_exist",
        "08006": "connection_failure",
        "08001": "sqlclient_unable_to_establish_sqlconnection",
        "08004": "sqlserver_rejected_establishment_of_sqlconnection",
        "08007": "transaction_resolution_unknown",
        "08P01": "protocol_violation",
        "09000": "triggered_action_exception",
        "0A000": "feature_not_supported",
        "0B000": "invalid_transaction_initiation",
        "0F000": "locator_exception",
        "0F001": "invalid_locator_specification",
        "0L000": "invalid_grantor",
        "0LP01": "invalid_grant_operation",
        "0P000": "invalid_role_specification",
        "0Z000": "diagnostics_exception",
        "0Z002": "stacked_diagnostics_accessed_without_active_handler",
        "10608": "invalid_argument_for_xquery",
        "20000": "case_not_found",
        "21000": "cardinality_violation",
        "22000": "data_exception",
        "2202E": "array_subscript_error",
        "22021": "character_not_in_repertoire",
        "22008": "datetime_field_overflow",
        "22012": "division_by_zero",
        "22005": "error_in_assignment",
        "2200B": "escape_character_conflict",
        "22022": "indicator_overflow",
        "22015": "interval_field_overflow",
        "2201E": "invalid_argument_for_logarithm",
        "22014": "invalid_argument_for_ntile_function",
        "22016": "invalid_argument_for_nth_value_function",
        "2201F": "invalid_argument_for_power_function",
        "2201G": "invalid_argument_for_width_bucket_function",
        "22018": "invalid_character_value_for_cast",
        "22007": "invalid_datetime_format",
        "22019": "invalid_escape_character",
        "2200D": "invalid_escape_octet",
        "22025": "invalid_escape_sequence",
        "22P06": "nonstandard_use_of_escape_character",
        "22010": "invalid_indicator_parameter_value",
        "22023": "invalid_parameter_value",
        "22013": "invalid_preceding_or_following_size",
        "2201B": "invalid_regular_expression",
        "2201W": "invalid_row_count_in_limit_clause",
        "2201X": "invalid_row_count_in_result_offset_clause",
        "2202H": "invalid_tablesample_argument",
        "2202G": "invalid_tablesample_repeat",
        "22009": "invalid_time_zone_displacement_value",
        "2200C": "invalid_use_of_escape_character",
        "2200G": "most_specific_type_mismatch",
        "22004": "null_value_not_allowed",
        "22002": "null_value_no_indicator_parameter",
        "22003": "numeric_value_out_of_range",
        "2200H": "sequence_generator_limit_exceeded",
        "22026": "string_data_length_mismatch",
        "22001": "string_data_right_truncation",
        "22011": "substring_error",
        "22027": "trim_error",
        "22024": "unterminated_c_string",
        "2200F": "zero_length_character_string",
        "22P01": "floating_point_exception",
        "22P02": "invalid_text_representation",
        "22P03": "invalid_binary_representation",
        "22P04": "bad_copy_file_format",
        "22P05": "untranslatable_character",
        "2200L": "not_an_xml_document",
        "2200M": "invalid_xml_document",
        "2200N": "invalid_xml_content",
        "2200S": "invalid_xml_comment",
        "2200T": "invalid_xml_processing_instruction",
        "22030": "duplicate_json_object_key_value",
        "22031": "invalid_argument_for_sql_json_datetime_function",
        "22032": "invalid_json_text",
        "22033": "invalid_sql_json_subscript",
        "22034": "more_than_one_sql_json_item",
        "22035": "no_sql_json_item",
        "22036": "non_numeric_sql_json_item",
        "22037": "non_unique_keys_in_a_json_object",
        "22038": "singleton_sql_json_item_required",
        "22039": "sql_json_array_not_found",
        "2203A": "sql_json_member_not_found",
        "2203B": "sql_json_number_not_found",
        "2203C": "sql_json_object_not_found",
        "2203D": "too_many_json_array_elements",
        "2203E": "too_many_json_object_members",
        "2203F": "sql_json_scalar_required",
        "2203G": "sql_json_item_cannot_be_cast_to_target_type",
        "23000": "integrity_constraint_violation",
        "23001": "restrict_violation",
        "23502": "not_null_violation",
        "23503": "foreign_key_violation",
        "23505": "unique_violation",
        "23514": "check_violation",
        "23P01": "exclusion_violation",
        "24000": "invalid_cursor_state",
        "25000": "invalid_transaction_state",
        "25001": "active_sql_transaction",
        "25002": "branch_transaction_already_active",
        "25008": "held_cursor_requires_same_isolation_level",
        "25003": "inappropriate_access_mode_for_branch_transaction",
        "25004": "inappropriate_isolation_level_for_branch_transaction",
        "25005": "no_active_sql_transaction_for_branch_transaction",
        "25006": "read_only_sql_transaction",
        "25007": "schema_and_data_statement_mixing_not_supported",
        "25P01": "no_active_sql_transaction",
        "25P02": "in_failed_sql_transaction",
        "25P03": "idle_in_transaction_session_timeout",
        "25P04": "transaction_timeout",
        "26000": "invalid_sql_statement_name",
        "27000": "triggered_data_change_violation",
        "28000": "invalid_authorization_specification",
        "28P01": "invalid_password",
        "2B000": "dependent_privilege_descriptors_still_exist",
        "2BP01": "dependent_objects_still_exist",
        "2D000": "invalid_transaction_termination",
        "2F000": "sql_routine_exception",
        "2F005": "function_executed_no_return_statement",
        "2F002": "modifying_sql_data_not_permitted",
        "2F003": "prohibited_sql_statement_attempted",
        "2F004": "reading_sql_data_not_permitted",
        "34000": "invalid_cursor_name",
        "38000": "external_routine_exception",
        "38001": "containing_sql_not_permitted",
        "38002": "modifying_sql_data_not_permitted",
        "38003": "prohibited_sql_statement_attempted",
        "38004": "reading_sql_data_not_permitted",
        "39000": "external_routine_invocation_exception",
        "39001": "invalid_sqlstate_returned",
        "39004": "null_value_not_allowed",
        "39P01": "trigger_protocol_violated",
        "39P02": "srf_protocol_violated",
        "39P03": "event_trigger_protocol_violated",
        "3B000": "savepoint_exception",
        "3B001": "invalid_savepoint_specification",
        "3D000": "invalid_catalog_name",
        "3F000": "invalid_schema_name",
        "40000": "transaction_rollback",
        "40002": "transaction_integrity_constraint_violation",
        "40001": "serialization_failure",
        "40003": "statement_completion_unknown",
        "40P01": "deadlock_detected",
        "42000": "syntax_error_or_access_rule_violation",
        "42601": "syntax_error",
        "42501": "insufficient_privilege",
        "42846": "cannot_coerce",
        "42803": "grouping_error",
        "42P20": "windowing_error",
        "42P19": "invalid_recursion",
        "42830": "invalid_foreign_key",
        "42602": "invalid_name",
        "42622": "name_too_long",
        "42939": "reserved_name",
        "42804": "datatype_mismatch",
        "42P18": "indeterminate_datatype",
        "42P21": "collation_mismatch",
        "42P22": "indeterminate_collation",
        "42809": "wrong_object_type",
        "428C9": "generated_always",
        "42703": "undefined_column",
        "42883": "undefined_function",
        "42P01": "undefined_table",
        "42P02": "undefined_parameter",
        "42704": "undefined_object",
        "42701": "duplicate_column",
        "42P03": "duplicate_cursor",
        "42P04": "duplicate_database",
        "42723": "duplicate_function",
        "42P05": "duplicate_prepared_statement",
        "42P06": "duplicate_schema",
        "42P07": "duplicate_table",
        "42712": "duplicate_alias",
        "42710": "duplicate_object",
        "42702": "ambiguous_column",
        "42725": "ambiguous_function",
        "42P08": "ambiguous_parameter",
        "42P09": "ambiguous_alias",
        "42P10": "invalid_column_reference",
        "42611": "invalid_column_definition",
        "42P11": "invalid_cursor_definition",
        "42P12": "invalid_database_definition",
        "42P13": "invalid_function_definition",
        "42P14": "invalid_prepared_statement_definition",
        "42P15": "invalid_schema_definition",
        "42P16": "invalid_table_definition",
        "42P17": "invalid_object_definition",
        "44000": "with_check_option_violation",
        "53000": "insufficient_resources",
        "53100": "disk_full",
        "53200": "out_of_memory",
        "53300": "too_many_connections",
        "53400": "configuration_limit_exceeded",
        "54000": "program_limit_exceeded",
        "54001": "statement_too_complex",
        "54011": "too_many_columns",
        "54023": "too_many_arguments",
        "55000": "object_not_in_prerequisite_state",
        "55006": "object_in_use",
        "55P02": "cant_change_runtime_param",
        "55P03": "lock_not_available",
        "55P04": "unsafe_new_enum_value_usage",
        "57000": "operator_intervention",
        "57014": "query_canceled",
        "57P01": "admin_shutdown",
        "57P02": "crash_shutdown",
        "57P03": "cannot_connect_now",
        "57P04": "database_dropped",
        "57P05": "idle_session_timeout",
        "58000": "system_error",
        "58030": "io_error",
        "58P01": "undefined_file",
        "58P02": "duplicate_file",
        "58P03": "file_name_too_long",
        "F0000": "config_file_error",
        "F0001": "lock_file_exists",
        "HV000": "fdw_error",
        "HV005": "fdw_column_name_not_found",
        "HV002": "fdw_dynamic_parameter_value_needed",
        "HV010": "fdw_function_sequence_error",
        "HV021": "fdw_inconsistent_descriptor_information",
        "HV024": "fdw_invalid_attribute_value",
        "HV007": "fdw_invalid_column_name",
        "HV008": "fdw_invalid_column_number",
        "HV004": "fdw_invalid_data_type",
        "HV006": "fdw_invalid_data_type_descriptors",
        "HV091": "fdw_invalid_descriptor_field_identifier",
        "HV00B": "fdw_invalid_handle",
        "HV00C": "fdw_invalid_option_index",
        "HV00D": "fdw_invalid_option_name",
        "HV090": "fdw_invalid_string_length_or_buffer_length",
        "HV00A": "fdw_invalid_string_format",
        "HV009": "fdw_invalid_use_of_null_pointer",
        "HV014": "fdw_too_many_handles",
        "HV001": "fdw_out_of_memory",
        "HV00P": "fdw_no_schemas",
        "HV00J": "fdw_option_name_not_found",
        "HV00K": "fdw_reply_handle",
        "HV00Q": "fdw_schema_not_found",
        "HV00R": "fdw_table_not_found",
        "HV00L": "fdw_unable_to_create_execution",
        "HV00M": "fdw_unable_to_create_reply",
        "HV00N": "fdw_unable_to_establish_connection",
        "P0000": "plpgsql_error",
        "P0001": "raise_exception",
        "P0002": "no_data_found",
        "P0003": "too_many_rows",
        "P0004": "assert_failure",
        "XX000": "internal_error",
        "XX001": "data_corrupted",
        "XX002": "index_corrupted",
    }
)
