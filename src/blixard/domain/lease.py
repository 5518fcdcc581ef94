"""The words between a worker and the control plane: one call, ``sync``, for all that concerns leases."""

from __future__ import annotations

import msgspec

from blixard.domain.grants import InputFile
from blixard.domain.limits import WireInt
from blixard.domain.outcome import Outcome
from blixard.domain.spec import JobSpec


class AttemptRef(msgspec.Struct, frozen=True, array_like=True):
    """One lease: a job of a namespace and the attempt that is its fencing token."""

    namespace: str
    job_id: str
    attempt: WireInt


class FinishedAttempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    ref: AttemptRef
    outcome: Outcome


class StartedAttempt(msgspec.Struct, frozen=True, array_like=True):
    ref: AttemptRef
    started_at: WireInt


def _no_arguments() -> msgspec.Raw:
    """A factory, since a default value could not be shown in a JSON schema."""
    return msgspec.Raw(b"[]")


class ClaimedJob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A lease with all that is needed to run it; ``spec`` is a key of ``SyncReply.specs``."""

    ref: AttemptRef
    spec: WireInt
    arguments: msgspec.Raw = msgspec.field(default_factory=_no_arguments)
    arguments_blob: str | None = None
    inputs: tuple[InputFile, ...] = ()


class SyncRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Reports, renews and claims in one request.

    ``number`` rises by one with every new request of the session; repeating the same number repeats the answer and does
    nothing twice. ``holding`` lists every lease the worker knows of (None: no change but those reported here, allowed
    for at most a third of the lease time); what the store holds for the session and the worker does not list is lost,
    but for what was claimed by syncs with numbers above ``seen``, the highest number up to which the worker has read
    every answer: with a parked sync and its superseder both under way, the list cannot know the former's claims.
    ``want`` jobs at most are claimed, of sizes up to ``free_cpus`` and ``free_memory_mb``. With nothing to say the call
    is parked for up to ``wait`` seconds, at most a third of the lease time.
    """

    session: str
    number: WireInt
    seen: WireInt = 0
    finished: list[FinishedAttempt] = []
    started: list[StartedAttempt] = []
    holding: list[AttemptRef] | None = None
    want: WireInt = 0
    free_cpus: float = 0.0
    free_memory_mb: WireInt = 0
    wait: float = 0.0


class SyncReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``cancelled``: end these and report them. ``lost``: these are not yours (any more); end them and report nothing.

    ``drain``: the worker should finish what it runs and take nothing new.
    """

    claimed: list[ClaimedJob] = []
    specs: dict[int, JobSpec] = {}
    cancelled: list[AttemptRef] = []
    lost: list[AttemptRef] = []
    drain: bool = False
