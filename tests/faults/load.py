"""Load for a server that is being killed: what clients submit, repeat and are told."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import msgspec

from blixard.bundling import Bundler
from blixard.client.blocking import Client
from blixard.domain.grants import Grants
from blixard.domain.job import NewJob
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.retry import RetryPolicy
from blixard.domain.spec import JobSpec
from blixard.errors import OutcomeUnknown, Unavailable
from blixard.protocol.jobs import JobResult, SubmitRequest

NEVER_LOST_TOO_OFTEN = 1000
MOST_AT_ONCE = 12
"""Jobs in one submission."""
PAUSE_SECONDS = 0.05

JOBS = """
import os
import random
import time


def mark(word):
    file = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_APPEND)
    os.write(file, f"{word} {os.environ['BLIXARD_JOB_ID']} {os.environ['BLIXARD_ATTEMPT']}\\n".encode())
    os.close(file)


def work(number, seconds, risk):
    mark("begin")
    time.sleep(seconds)
    if random.SystemRandom().random() < risk:
        raise RuntimeError("bad luck")
    mark("end")
    return {"number": number, "square": number * number}


def fail(number, seconds, risk):
    mark("begin")
    raise ValueError("as expected")
"""
COMMAND = """
echo "begin $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
sleep "$2"
echo "number $1"
echo "end $BLIXARD_JOB_ID $BLIXARD_ATTEMPT" >> "$MARKS"
"""


class Kind(msgspec.Struct, frozen=True):
    """A kind of job in the mix; ``weight`` of all."""

    name: str
    spec: JobSpec
    weight: int
    longest: float
    risk: float = 0.0
    succeeds: bool = True
    returns: bool = True


def make_kinds(client: Client, directory: Path, marks: Path) -> list[Kind]:
    """Return the mix of jobs, their code uploaded."""
    code = directory / "load_jobs.py"
    code.write_text(JOBS)
    functions: dict[str, Payload] = {}
    for name in ("work", "fail"):
        bundled = Bundler().bundle_reference(f"{code}:{name}")
        assert bundled.bundle is not None
        functions[name] = FunctionPayload(function=bundled.function, bundle=client.put_blob(bundled.bundle.archive))
    command = CommandPayload(argv=("sh", "-ec", COMMAND, "job"))

    def spec(name: str, payload: Payload, isolation: Isolation, retries: int) -> JobSpec:
        return JobSpec(
            name=name,
            payload=payload,
            requirements=JobRequirements(isolation=isolation),
            retry=RetryPolicy(retries=retries, delay=0.1, max_delay=0.5, max_lost=NEVER_LOST_TOO_OFTEN),
            environment={"MARKS": str(marks)},
            grants=Grants(write=(str(marks),)),
        )

    # A job whose process is killed has failed as far as anybody can tell, so all have retries for that.
    few = 50
    return [
        Kind("quick", spec("quick", functions["work"], Isolation.MINIMAL, few), 45, 0.05),
        Kind("unlucky", spec("unlucky", functions["work"], Isolation.MINIMAL, few), 15, 0.03, risk=0.3),
        Kind("command", spec("command", command, Isolation.MINIMAL, few), 20, 0.05, returns=False),
        Kind("sandbox", spec("sandbox", functions["work"], Isolation.STANDARD, few), 15, 0.05),
        Kind("doomed", spec("doomed", functions["fail"], Isolation.MINIMAL, 1), 5, 0.0, succeeds=False),
    ]


class Submitted(msgspec.Struct, frozen=True):
    kind: Kind
    number: int


class Submitter(threading.Thread):
    """Submits jobs as far as the fault that comes next allows, and repeats each submission until it is acknowledged.

    It keeps its own record of what was acknowledged, and of what it was told about ended jobs meanwhile.
    """

    def __init__(self, client: Client, kinds: list[Kind], *, name: str, seed: int, total: int) -> None:
        super().__init__(name=name, daemon=True)
        self.acknowledged: dict[str, Submitted] = {}
        self.ended: dict[str, JobResult] = {}
        self.refused = 0
        self.unknown = 0
        self.error: BaseException | None = None
        self._client = client
        self._kinds = kinds
        self._random = random.Random(seed)
        self._total = total
        self._allowed = threading.Condition()
        self._allowance = 0
        self._stopping = False

    def allow(self, share: float) -> None:
        """Let it submit up to this share of its total."""
        with self._allowed:
            self._allowance = max(self._allowance, int(self._total * min(share, 1.0)))
            self._allowed.notify()

    def stop(self) -> None:
        with self._allowed:
            self._stopping = True
            self._allowed.notify()

    def run(self) -> None:
        try:
            while self._may_go_on():
                self._submit_some()
                self._look_at_some()
        except BaseException as error:  # the edge of a thread: the test raises it
            self.error = error

    def _may_go_on(self) -> bool:
        with self._allowed:
            self._allowed.wait_for(
                lambda: self._stopping or self._is_done() or len(self.acknowledged) < self._allowance
            )
            return not self._stopping and not self._is_done()

    def _is_done(self) -> bool:
        return len(self.acknowledged) >= self._total

    def _submit_some(self) -> None:
        kind = self._random.choices(self._kinds, [kind.weight for kind in self._kinds])[0]
        count = min(self._random.randint(1, MOST_AT_ONCE), self._total - len(self.acknowledged))
        jobs: dict[str, int] = {}
        for _ in range(count):
            number = len(self.acknowledged) + len(jobs)
            jobs[f"{self.name}-{number}"] = number
        request = SubmitRequest(spec=kind.spec, jobs=[self._job(kind, *job) for job in jobs.items()])
        while not self._try(request) and not self._stopping:
            continue
        self.acknowledged |= {job_id: Submitted(kind, number) for job_id, number in jobs.items()}

    def _job(self, kind: Kind, job_id: str, number: int) -> NewJob:
        seconds = self._random.uniform(0, kind.longest)
        arguments: object = [[number, seconds, kind.risk], {}] if kind.returns else [str(number), f"{seconds:.3f}"]
        return NewJob(id=job_id, arguments=msgspec.Raw(msgspec.json.encode(arguments)))

    def _try(self, request: SubmitRequest) -> bool:
        """Submit; False when nobody knows whether it was stored: the same again is harmless."""
        try:
            reply = self._client.submit_many(request)
            assert reply.ids == [job.id for job in request.jobs]
        except OutcomeUnknown:
            self.unknown += 1
        except Unavailable:
            self.refused += 1
            self._pause()
        else:
            return True
        return False

    def _pause(self) -> None:
        with self._allowed:
            self._allowed.wait_for(lambda: self._stopping, PAUSE_SECONDS)

    def _look_at_some(self) -> None:
        """Ask about a few jobs; what is told once must stand for ever."""
        unknown = [job_id for job_id in self.acknowledged if job_id not in self.ended][:20]
        try:
            reply = self._client.wait(unknown, wait=0.0)
        except Unavailable:
            return
        assert not reply.unknown, f"acknowledged and unknown: {reply.unknown}"
        self.ended |= {result.id: result for result in reply.ended}
