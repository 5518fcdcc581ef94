"""Which worker may run which jobs, decided once per placement class instead of once per job."""

from __future__ import annotations

import bisect

import msgspec

from blixard.domain.requirements import CPU_STEPS, MEMORY_STEPS_MB, Isolation, WorkerType, worker_type_for
from blixard.domain.spec import JobSpec
from blixard.domain.worker import WorkerOffer


class PlacementClass(msgspec.Struct, frozen=True, kw_only=True):
    """A distinct set of needs. Jobs of one class are interchangeable for matching.

    ``submitter`` is an embedded process whose own worker runs them; once ``is_open`` (no submitter, or it died), any worker may.
    """

    id: int
    namespace: str
    queue: str
    worker_type: WorkerType
    isolation: Isolation
    labels: dict[str, str]
    cpus: float
    memory_mb: int
    submitter: str
    is_open: bool


def size_steps(spec: JobSpec) -> tuple[float, int]:
    """Return cpus and memory rounded up to their steps (0: any worker is large enough)."""
    cpus = CPU_STEPS[bisect.bisect_left(CPU_STEPS, spec.requirements.cpus or 0.0)]
    memory = MEMORY_STEPS_MB[bisect.bisect_left(MEMORY_STEPS_MB, spec.requirements.memory_mb or 0)]
    return cpus, memory


def class_key(namespace: str, spec: JobSpec, submitter: str) -> dict[str, str | int | float]:
    """Return the columns that identify the placement class of a spec; labels as canonical JSON."""
    cpus, memory = size_steps(spec)
    requirements = spec.requirements
    return {
        "namespace": namespace,
        "queue": spec.queue,
        "worker_type": str(worker_type_for(spec.runtime, requirements.isolation, requirements.vm_mode)),
        "isolation": str(requirements.isolation),
        "labels": msgspec.json.encode(requirements.labels, order="sorted").decode(),
        "cpus": cpus,
        "memory_mb": memory,
        "submitter": submitter,
    }


def mismatches(needs: PlacementClass, offer: WorkerOffer) -> list[str]:
    """Return every reason why this worker cannot run jobs of this class, in words for a person; empty if it can."""
    reasons = []
    isolations = offer.capabilities.get(needs.worker_type)
    if isolations is None:
        reasons.append(f"it is no {needs.worker_type} worker")
    elif needs.isolation not in isolations:
        reasons.append(f"its host cannot give isolation {needs.isolation} to {needs.worker_type} jobs")
    if offer.queues and needs.queue not in offer.queues:
        reasons.append(f"it does not serve queue {needs.queue!r}")
    for name, value in needs.labels.items():
        if offer.labels.get(name) != value:
            reasons.append(f"it lacks the label {name}={value}")
    if needs.cpus > offer.cpus:
        reasons.append(f"it has {offer.cpus:g} cpus and the job wants {needs.cpus:g}")
    if needs.memory_mb > offer.memory_mb:
        reasons.append(f"it has {offer.memory_mb} MB and the job wants {needs.memory_mb} MB")
    if not needs.is_open and needs.submitter != (offer.submitter or ""):
        reasons.append("the job belongs to a process that runs its own jobs and is still alive")
    elif offer.submitter is not None and needs.submitter == "":
        reasons.append("it is the worker of another process and the job belongs to the server")
    return reasons
