"""A worker without backends: it says what the test wants said."""

from __future__ import annotations

import msgspec

from blixard.domain.job import NewJob
from blixard.domain.lease import AttemptRef, ClaimedJob, FinishedAttempt, StartedAttempt, SyncReply, SyncRequest
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload
from blixard.domain.requirements import Isolation, JobRequirements, WorkerType
from blixard.domain.retry import RetryPolicy
from blixard.domain.spec import JobSpec
from blixard.domain.worker import Registration, WorkerOffer
from blixard.protocol.jobs import SubmitRequest
from blixard.services.control_plane import ControlPlane

NAMESPACE = "default"
OFFER = WorkerOffer(
    capabilities={WorkerType.PROCESS: (Isolation.MINIMAL, Isolation.STANDARD)}, cpus=4, memory_mb=4096, slots=4
)


def make_spec(name: str = "noop", **changes: object) -> JobSpec:
    base = JobSpec(
        name=name,
        payload=FunctionPayload(function="jobs:noop"),
        requirements=JobRequirements(isolation=Isolation.MINIMAL),
        retry=RetryPolicy(delay=10, jitter=0),
    )
    return msgspec.structs.replace(base, **changes)


async def submit(
    plane: ControlPlane, count: int = 1, *, spec: JobSpec | None = None, submitter: str = "", **job: object
) -> list[str]:
    jobs = [msgspec.json.decode(msgspec.json.encode(job), type=NewJob) for _ in range(count)]
    reply = await plane.commands.submit(
        NAMESPACE, SubmitRequest(spec=spec or make_spec(), jobs=jobs), submitter=submitter
    )
    return reply.ids


class ScriptedWorker:
    """Counts its syncs as a worker must."""

    def __init__(self, plane: ControlPlane, session: str = "session_a", offer: WorkerOffer = OFFER) -> None:
        self.plane = plane
        self.session = session
        self.offer = offer
        self.number = 0
        self.token = ""

    async def register(self, **fields: object) -> None:
        registration = Registration(name=f"worker-{self.session}", offer=self.offer, session=self.session)
        await self.plane.workers.register(NAMESPACE, msgspec.structs.replace(registration, **fields), token=self.token)

    def request(self, **fields: object) -> SyncRequest:
        self.number += 1
        base = SyncRequest(session=self.session, number=self.number, free_cpus=4, free_memory_mb=4096)
        return msgspec.structs.replace(base, **fields)

    async def sync(self, **fields: object) -> SyncReply:
        return await self.plane.workers.sync(NAMESPACE, self.request(**fields), token=self.token)

    async def claim(self, want: int = 1, wait: float = 0.0) -> list[ClaimedJob]:
        return (await self.sync(want=want, wait=wait)).claimed

    async def claim_one(self) -> AttemptRef:
        claimed = await self.claim()
        assert len(claimed) == 1
        return claimed[0].ref

    async def start(self, ref: AttemptRef) -> SyncReply:
        return await self.sync(started=[StartedAttempt(ref, 1)])

    async def finish(self, ref: AttemptRef, outcome: Outcome | None = None) -> SyncReply:
        return await self.sync(finished=[FinishedAttempt(ref=ref, outcome=outcome or completed())])


def completed(result: bytes = b'{"n":1}') -> Outcome:
    return Outcome(
        kind=OutcomeKind.COMPLETED,
        started_at=1_000,
        finished_at=251_000,
        exit_code=0,
        result=msgspec.Raw(result),
    )


def failed(*, retryable: bool = True, kind: OutcomeKind = OutcomeKind.FAILED) -> Outcome:
    error = AttemptError(type="ValueError", message="no", traceback="Traceback …", retryable=retryable)
    return Outcome(kind=kind, started_at=1_000, finished_at=2_000, exit_code=1, error=error)
