# hiqlite for Python: members of a cluster that replicates a SQLite database by Raft. See native/hiqlite.

from asyncio import Future
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypedDict, final

_Value: TypeAlias = str | int | float | bytes | None
_Outcome: TypeAlias = list[tuple[_Value, ...]] | list[int] | Failure

ENGINE_VERSION: str
FORMAT_VERSION: int
FAILURE_PARAMETER: int
FAILURE_FORBIDDEN: int

class HiqliteError(Exception): ...
class NoLeader(HiqliteError): ...
class OutcomeUnknown(HiqliteError): ...
class Stale(HiqliteError): ...
class Behind(HiqliteError): ...
class Refused(HiqliteError): ...
class NodeFailed(HiqliteError): ...
class Closed(HiqliteError): ...
class StartFailed(HiqliteError): ...

class Settings(TypedDict):
    node_id: int
    members: Sequence[tuple[int, str, str]]
    data_dir: str
    listen_raft: str
    listen_api: str
    secret_raft: str
    secret_api: str
    heartbeat_ms: int
    election_ms: tuple[int, int]
    logs_until_snapshot: int
    log_file_bytes: int
    tls: tuple[str, str] | None
    is_learner: bool
    start_seconds: float

class Status(TypedDict):
    node_id: int
    state: str
    leader: int | None
    term: int
    last_log: int | None
    last_applied: int | None
    snapshot: int | None
    purged: int | None
    quorum_ms: int | None
    failure: str | None
    members: list[tuple[int, str, str, bool]]
    replicated: list[tuple[int, int | None]]

@final
class Failure:
    @property
    def code(self) -> int: ...
    @property
    def message(self) -> str: ...

@final
class Operation:
    @property
    def size(self) -> int: ...
    @staticmethod
    def rows(sql: str, params: Mapping[str, _Value]) -> Operation: ...
    @staticmethod
    def counts(statements: Iterable[tuple[str, Mapping[str, _Value]]]) -> Operation: ...
    @staticmethod
    def script(sql: str) -> Operation: ...

@final
class Node:
    def write(
        self, operations: Sequence[Operation], origin: bytes, number: int, base: int, timeout: float
    ) -> Future[tuple[int, list[_Outcome]]]: ...
    def read(
        self, operations: Sequence[Operation], consistent: bool, least_commit: int, timeout: float
    ) -> Future[tuple[int, list[_Outcome]]]: ...
    def next_change(self, seen: int) -> Future[int]: ...
    def progress(self) -> tuple[int, int]: ...
    def trouble(self) -> str | None: ...
    def status(self) -> Future[Status]: ...
    def close(self, timeout: float) -> Future[None]: ...
    def end(self, timeout: float) -> None: ...

def start(settings: Settings) -> Future[Node]: ...
