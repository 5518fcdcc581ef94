"""The rules of the VM layer as values and plain functions: sizes, limits, thresholds."""

from __future__ import annotations

import bisect
from pathlib import Path

import msgspec

from blixard.domain.requirements import VmMode
from blixard.errors import NotSupportedHere
from blixard.vm.lease import DEFAULT_IMAGE, VmNeed

MEMORY_SIZES_MB = (128, 256, 384, *(size for n in range(9, 16) for size in (1 << n, 3 << n - 1)), 65536)
"""Sizes of guests: few, so that few templates serve all jobs."""
VCPU_SIZES = (1, 2, 4, 8, 16, 32)
MAX_WAITING = 1_000
"""Jobs that wait for a machine at a time."""
MAX_TRIES = 2
"""Machines that are tried for one job when those that were kept ready turn out to be dead."""


class VmShape(msgspec.Struct, frozen=True, kw_only=True):
    """What makes two machines interchangeable but for what ran in them."""

    image: str = DEFAULT_IMAGE
    memory_mb: int = 512
    vcpus: int = 1
    network: bool = False


class RoutingRules(msgspec.Struct, frozen=True, kw_only=True):
    """``memory_mb``: all guests together. ``pool``: machines kept ready. Seconds and MB.

    ``auto_create``: start a service machine when a job wants one and none is free. ``prefer_service`` off: such a job gets a
    machine of its own, which is more isolation, not less. ``max_jobs_per_vm``, ``max_uptime``: then a service machine is replaced,
    never during a job.
    """

    max_vms: int = 10
    memory_mb: int = 16_384
    pool: int = 1
    auto_create: bool = True
    prefer_service: bool = True
    max_jobs_per_vm: int = 50
    max_uptime: float = 3600.0
    idle_shutdown: float = 300.0


class HealthRules(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and answers in a row. ``breaker_threshold`` machines of one shape that fail one after the other open its breaker."""

    interval: float = 10.0
    timeout: float = 10.0
    failure_threshold: int = 3
    recovery_threshold: int = 2
    breaker_threshold: int = 3
    breaker_seconds: float = 60.0


class MonitorRules(msgspec.Struct, frozen=True, kw_only=True):
    """``memory_share``: a service machine that occupies more than this share of its memory on the host is replaced."""

    interval: float = 10.0
    memory_share: float = 0.9


class VmManagerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``directory`` holds images, templates and the runtime directories of all managers of this data directory.

    ``start_timeout``: seconds until a machine's agent must have answered, from cold. ``shutdown_timeout``: until ``shutdown`` stops
    waiting for the orderly end of its machines and kills them. ``service_vms``: started by ``start_service_vms`` for ``namespace``.
    """

    directory: Path
    routing: RoutingRules = RoutingRules()
    health: HealthRules = HealthRules()
    monitor: MonitorRules = MonitorRules()
    image: str = DEFAULT_IMAGE
    memory_mb: int = 512
    vcpus: int = 1
    namespace: str = "default"
    service_vms: int = 0
    start_timeout: float = 120.0
    shutdown_timeout: float = 10.0


def shape_of(need: VmNeed) -> VmShape:
    """Return the smallest shape that serves the need. Raises ``NotSupportedHere`` beyond the largest."""
    return VmShape(
        image=need.image,
        memory_mb=_step("MB of memory", MEMORY_SIZES_MB, need.memory_mb),
        vcpus=_step("virtual processors", VCPU_SIZES, need.vcpus),
        network=need.network,
    )


def _step(what: str, steps: tuple[int, ...], wanted: int) -> int:
    place = bisect.bisect_left(steps, wanted)
    if place == len(steps):
        raise NotSupportedHere(f"a virtual machine has at most {steps[-1]} {what}, and {wanted} are asked for")
    return steps[place]


def fits(shape: VmShape, need: VmNeed) -> bool:
    """Say whether a machine of this shape can serve the need: large enough, and with no network that was not asked for."""
    return (
        shape.image == need.image
        and shape.network == need.network
        and shape.memory_mb >= need.memory_mb
        and shape.vcpus >= need.vcpus
    )


def has_labels(labels: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def mode_of(need: VmNeed, rules: RoutingRules) -> VmMode:
    return VmMode.SERVICE if need.mode is VmMode.SERVICE and rules.prefer_service else VmMode.EPHEMERAL
