"""Between Blixard's statements and errors and those of the binding."""

from __future__ import annotations

from collections.abc import Sequence

from blixard_hiqlite import Failure, Operation

from blixard.errors import BlixardError, ConstraintFailed, InternalError, StoreFull, StoreUnavailable
from blixard.storage.database import Params, Statement
from blixard.storage.hiqlite.settings import MAX_OPERATION_BYTES

Outcome = list[tuple[str | int | float | bytes | None, ...]] | list[int] | Failure

_PRIMARY_CODE = 0xFF
_CONSTRAINT = 19
_UNFIT = (TypeError, ValueError, OverflowError)


def build_statement(statement: Statement, params: Params) -> Operation:
    """Return one statement as an operation. Raises ``InternalError`` for a value that cannot be stored and for one that is too large."""
    try:
        return _limit(Operation.rows(statement.sql, params), statement.name)
    except _UNFIT as error:
        raise InternalError(f"the statement {statement.name!r} failed: {error}") from error


def build_transaction(statements: Sequence[tuple[Statement, Params]]) -> Operation:
    """The same for several statements that take effect together or not at all."""
    name = name_transaction(statements)
    try:
        return _limit(Operation.counts([(statement.sql, params) for statement, params in statements]), name)
    except _UNFIT as error:
        raise InternalError(f"the transaction {name!r} failed: {error}") from error


def name_transaction(statements: Sequence[tuple[Statement, Params]]) -> str:
    return ", ".join(statement.name for statement, _ in statements)


def _limit(operation: Operation, name: str) -> Operation:
    if operation.size > MAX_OPERATION_BYTES:
        raise InternalError(f"{name!r} takes {operation.size} bytes; a cluster takes {MAX_OPERATION_BYTES} at a time")
    return operation


def translate_failure(failure: Failure, name: str) -> BlixardError:
    """Return the ``BlixardError`` for the failure of the statement ``name``."""
    if failure.code > 0 and failure.code & _PRIMARY_CODE == _CONSTRAINT:
        return ConstraintFailed(f"{name}: {failure.message}")
    return InternalError(f"the statement {name!r} failed: {failure.message}")


def translate_trouble(trouble: str) -> StoreUnavailable:
    """Return the error for a node whose disk refuses what the cluster has decided."""
    if "full" in trouble:
        return StoreFull(
            f"the disk of this node is full: {trouble}", hint="free some space; nothing acknowledged is lost"
        )
    return StoreUnavailable(f"the disk of this node fails: {trouble}", hint="check the disk, then start the node again")
