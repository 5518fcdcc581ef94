"""Every route of the HTTP interface, once: server, clients and workers all use this table.

A route names its method, its path below ``PREFIX``, what travels in and out, and which scopes admit to it. Bodies are JSON;
only the logs of workers may also be MessagePack, and blobs are plain bytes.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Annotated, Generic, TypeVar
from urllib.parse import quote

import msgspec

from blixard.domain.lease import SyncReply, SyncRequest
from blixard.domain.limits import MAX_LIST_JOBS
from blixard.domain.state_machine import JobState
from blixard.domain.worker import Registration
from blixard.protocol.jobs import (
    BatchCancelReply,
    BatchResults,
    BatchView,
    CancelReply,
    EventView,
    JobDetail,
    JobPage,
    JobView,
    LogPageView,
    OpenBatchRequest,
    StatsView,
    SubmitReply,
    SubmitRequest,
    WaitReply,
    WaitRequest,
    WhyView,
)
from blixard.protocol.workers import (
    CreateTokenReply,
    CreateTokenRequest,
    Health,
    LogBatch,
    RegisterReply,
    Scope,
    TokenView,
    WorkerView,
)

PREFIX = "/api/v1"
PROTOCOL_HEADER = "Blixard-Protocol"
"""Stands in every answer; an answer without it does not come from a Blixard server."""
PROTOCOL_VERSION = "1"
REQUEST_ID_HEADER = "X-Request-ID"
JSON = "application/json"
MSGPACK = "application/msgpack"
PROBLEM_JSON = "application/problem+json"
BLOB = "application/octet-stream"

Position = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A place in a listing: what a store and a JSON reader can both count to."""

Q = TypeVar("Q")
"""What a route takes as its body."""
R = TypeVar("R")
"""What it answers."""


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The route takes no query parameters."""


class JobsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of a listing, each optional; ``state`` may be repeated. ``since`` and ``until`` bound the time of creation."""

    state: tuple[JobState, ...] = ()
    name: str | None = None
    tag: str | None = None
    queue: str | None = None
    batch: str | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    limit: int = 100
    cursor: str | None = None


class LogsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``attempt`` is the newest if left out. ``wait`` seconds for output behind ``offset``; more than 60 are 60."""

    attempt: int | None = None
    offset: Position = 0
    wait: float = 0.0


class ResultsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Results behind position ``after``; ``wait`` seconds for one if there is none; more than 60 are 60."""

    after: Position = 0
    limit: int = MAX_LIST_JOBS
    wait: float = 0.0


Query = type[NoQuery] | type[JobsQuery] | type[LogsQuery] | type[ResultsQuery]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route(Generic[Q, R]):
    """One operation. ``scopes``: any one of them admits, ``admin`` always does; empty: nobody is asked who they are.

    ``request`` and ``reply`` are what travels (``NoneType``: nothing, ``bytes``: the blob itself).
    """

    name: str
    summary: str
    method: str
    path: str
    request: type[Q]
    reply: type[R]
    scopes: frozenset[Scope] = frozenset()
    query: Query = NoQuery
    status: int = 200

    def url(self, **parameters: str) -> str:
        """Return the path from the root with its parameters filled in."""
        return PREFIX + self.path.format(**{name: quote(value, safe="") for name, value in parameters.items()})


_NOTHING = type(None)
_READ = frozenset({Scope.READ})
_SUBMIT = frozenset({Scope.SUBMIT})
_WORKER = frozenset({Scope.WORKER})
_ADMIN = frozenset({Scope.ADMIN})

SUBMIT = Route(
    name="submit",
    summary="Store jobs durably, all or none",
    method="POST",
    path="/jobs",
    request=SubmitRequest,
    reply=SubmitReply,
    scopes=_SUBMIT,
    status=201,
)
JOBS = Route(
    name="jobs",
    summary="List jobs, newest first",
    method="GET",
    path="/jobs",
    request=_NOTHING,
    reply=JobPage,
    scopes=_READ,
    query=JobsQuery,
)
WAIT = Route(
    name="wait",
    summary="Answer as soon as one of the jobs has ended",
    method="POST",
    path="/jobs/wait",
    request=WaitRequest,
    reply=WaitReply,
    scopes=_READ,
)
JOB = Route(
    name="job",
    summary="Show everything about one job",
    method="GET",
    path="/jobs/{job_id}",
    request=_NOTHING,
    reply=JobDetail,
    scopes=_READ,
)
CANCEL = Route(
    name="cancel",
    summary="Cancel a job",
    method="POST",
    path="/jobs/{job_id}/cancel",
    request=_NOTHING,
    reply=CancelReply,
    scopes=_SUBMIT,
)
RETRY = Route(
    name="retry",
    summary="Make a failed or cancelled job pending again",
    method="POST",
    path="/jobs/{job_id}/retry",
    request=_NOTHING,
    reply=JobView,
    scopes=_SUBMIT,
)
WHY = Route(
    name="why",
    summary="Say why a job is not running and what would unblock it",
    method="GET",
    path="/jobs/{job_id}/why",
    request=_NOTHING,
    reply=WhyView,
    scopes=_READ,
)
EVENTS = Route(
    name="events",
    summary="List what happened to a job",
    method="GET",
    path="/jobs/{job_id}/events",
    request=_NOTHING,
    reply=list[EventView],
    scopes=_READ,
)
LOGS = Route(
    name="logs",
    summary="Read the output of an attempt, waiting for more",
    method="GET",
    path="/jobs/{job_id}/logs",
    request=_NOTHING,
    reply=LogPageView,
    scopes=_READ,
    query=LogsQuery,
)

OPEN_BATCH = Route(
    name="open_batch",
    summary="Find the newest batch of this identity, or make it",
    method="POST",
    path="/batches",
    request=OpenBatchRequest,
    reply=BatchView,
    scopes=_SUBMIT,
)
BATCH = Route(
    name="batch",
    summary="Show a batch",
    method="GET",
    path="/batches/{batch_id}",
    request=_NOTHING,
    reply=BatchView,
    scopes=_READ,
)
BATCH_RESULTS = Route(
    name="batch_results",
    summary="Read the results of a batch in the order in which its jobs ended",
    method="GET",
    path="/batches/{batch_id}/results",
    request=_NOTHING,
    reply=BatchResults,
    scopes=_READ,
    query=ResultsQuery,
)
CANCEL_BATCH = Route(
    name="cancel_batch",
    summary="Cancel every job of a batch that has not ended",
    method="POST",
    path="/batches/{batch_id}/cancel",
    request=_NOTHING,
    reply=BatchCancelReply,
    scopes=_SUBMIT,
)

REGISTER = Route(
    name="register",
    summary="Begin a worker's session",
    method="POST",
    path="/workers",
    request=Registration,
    reply=RegisterReply,
    scopes=_WORKER,
    status=201,
)
SYNC = Route(
    name="sync",
    summary="Report, renew and claim",
    method="POST",
    path="/workers/{session}/sync",
    request=SyncRequest,
    reply=SyncReply,
    scopes=_WORKER,
)
WORKER_LOGS = Route(
    name="worker_logs",
    summary="Append output of attempts (also as MessagePack)",
    method="POST",
    path="/workers/{session}/logs",
    request=list[LogBatch],
    reply=_NOTHING,
    scopes=_WORKER,
    status=204,
)
GOODBYE = Route(
    name="goodbye",
    summary="End a worker's session and give back what it holds",
    method="DELETE",
    path="/workers/{session}",
    request=_NOTHING,
    reply=_NOTHING,
    scopes=_WORKER,
    status=204,
)
WORKERS = Route(
    name="workers",
    summary="List the workers",
    method="GET",
    path="/workers",
    request=_NOTHING,
    reply=list[WorkerView],
    scopes=_READ,
)
DRAIN_WORKER = Route(
    name="drain_worker",
    summary="Let a worker finish what it runs and take nothing new",
    method="POST",
    path="/workers/{session}/drain",
    request=_NOTHING,
    reply=WorkerView,
    scopes=_ADMIN,
)

PUT_BLOB = Route(
    name="put_blob",
    summary="Store content under its SHA-256",
    method="PUT",
    path="/blobs/{digest}",
    request=bytes,
    reply=_NOTHING,
    scopes=frozenset({Scope.SUBMIT, Scope.WORKER}),
    status=201,
)
GET_BLOB = Route(
    name="get_blob",
    summary="Read content by its SHA-256",
    method="GET",
    path="/blobs/{digest}",
    request=_NOTHING,
    reply=bytes,
    scopes=frozenset({Scope.READ, Scope.WORKER}),
)
HEAD_BLOB = Route(
    name="head_blob",
    summary="Ask whether content is stored",
    method="HEAD",
    path="/blobs/{digest}",
    request=_NOTHING,
    reply=_NOTHING,
    scopes=frozenset({Scope.READ, Scope.SUBMIT, Scope.WORKER}),
)

STATS = Route(
    name="stats",
    summary="Count jobs and workers",
    method="GET",
    path="/stats",
    request=_NOTHING,
    reply=StatsView,
    scopes=_READ,
)
LIVE = Route(
    name="live",
    summary="Say that the server runs",
    method="GET",
    path="/health/live",
    request=_NOTHING,
    reply=Health,
)
READY = Route(
    name="ready",
    summary="Say whether the store can be read and written",
    method="GET",
    path="/health/ready",
    request=_NOTHING,
    reply=Health,
)
METRICS = Route(
    name="metrics",
    summary="Metrics in the Prometheus text format",
    method="GET",
    path="/metrics",
    request=_NOTHING,
    reply=bytes,
    scopes=_READ,
)
CREATE_TOKEN = Route(
    name="create_token",
    summary="Make a token; its secret is shown this once",
    method="POST",
    path="/tokens",
    request=CreateTokenRequest,
    reply=CreateTokenReply,
    scopes=_ADMIN,
    status=201,
)
TOKENS = Route(
    name="tokens",
    summary="List the tokens",
    method="GET",
    path="/tokens",
    request=_NOTHING,
    reply=list[TokenView],
    scopes=_ADMIN,
)
REVOKE_TOKEN = Route(
    name="revoke_token",
    summary="Make a token useless",
    method="DELETE",
    path="/tokens/{token_id}",
    request=_NOTHING,
    reply=TokenView,
    scopes=_ADMIN,
)
PRUNE = Route(
    name="prune",
    summary="Remove what the retention times allow, now",
    method="POST",
    path="/prune",
    request=_NOTHING,
    reply=dict[str, int],
    scopes=_ADMIN,
)

ROUTES: tuple[Route[object, object], ...] = tuple(
    sorted((value for value in globals().values() if isinstance(value, Route)), key=lambda route: route.path)
)
