"""What the jobs that name a size have taken of the worker's cpus and memory."""

from __future__ import annotations

from blixard.domain.spec import JobSpec
from blixard.domain.worker import WorkerOffer

_SLACK = 1e-9
"""Sums of fractions such as 0.1 are not exact."""


class Capacity:
    """Jobs that name no size count nothing here: the slots bound them."""

    def __init__(self, offer: WorkerOffer) -> None:
        self._cpus = offer.cpus
        self._memory_mb = offer.memory_mb
        self._used_cpus = 0.0
        self._used_memory_mb = 0

    @property
    def free_cpus(self) -> float:
        return max(0.0, self._cpus - self._used_cpus)

    @property
    def free_memory_mb(self) -> int:
        return max(0, self._memory_mb - self._used_memory_mb)

    def take(self, spec: JobSpec) -> bool:
        """Take what the job needs and return True, or take nothing if it does not fit."""
        cpus, memory_mb = _needs(spec)
        if cpus > self._cpus - self._used_cpus + _SLACK or memory_mb > self._memory_mb - self._used_memory_mb:
            return False
        self._used_cpus += cpus
        self._used_memory_mb += memory_mb
        return True

    def give_back(self, spec: JobSpec) -> None:
        cpus, memory_mb = _needs(spec)
        self._used_cpus -= cpus
        self._used_memory_mb -= memory_mb


def _needs(spec: JobSpec) -> tuple[float, int]:
    return spec.requirements.cpus or 0.0, spec.requirements.memory_mb or 0
