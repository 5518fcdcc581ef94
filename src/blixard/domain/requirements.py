"""What a job needs of the place where it runs."""

from __future__ import annotations

import enum
import re

import msgspec

from blixard.domain.payload import Runtime
from blixard.errors import InvalidRequest


class Isolation(enum.StrEnum):
    """How strongly a job is kept apart, weakest first. What a host cannot give it refuses; it never gives less."""

    MINIMAL = "minimal"
    STANDARD = "standard"
    MAXIMUM = "maximum"


class WorkerType(enum.StrEnum):
    PROCESS = "process"
    WASM = "wasm"
    MICROVM = "microvm"


class VmMode(enum.StrEnum):
    """How a job uses a virtual machine."""

    EPHEMERAL = "ephemeral"
    """A fresh clone for the one job, gone with it: what isolation maximum always is."""
    SERVICE = "service"
    """A machine that serves one job of its namespace after the other, until it is recycled: a kind of isolation standard."""


STRENGTH = {isolation: strength for strength, isolation in enumerate(Isolation)}
CPU_STEPS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
MEMORY_STEPS_MB = (
    0,
    128,
    256,
    512,
    1024,
    2048,
    4096,
    8192,
    16384,
    32768,
    65536,
    131072,
    262144,
    524288,
    1048576,
    2097152,
)
IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""A guest image's name, or its digest."""


class JobRequirements(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``cpus`` and ``memory_mb`` are limits for the job and sizes for placement; None: the worker's defaults, any worker is large enough."""

    isolation: Isolation = Isolation.STANDARD
    worker_types: tuple[WorkerType, ...] = ()
    """Empty: the type that the runtime and isolation call for. A list may only narrow to that type."""
    labels: dict[str, str] = {}
    """Every label here must stand on the worker with the same value."""
    cpus: float | None = None
    memory_mb: int | None = None
    image: str | None = None
    """Name or digest of the guest image of a virtual machine (None: the worker's default)."""
    vm_mode: VmMode | None = None
    """``service`` only at isolation standard. None: ``ephemeral`` at isolation maximum, elsewhere no virtual machine."""


def worker_type_for(runtime: Runtime, isolation: Isolation, vm_mode: VmMode | None = None) -> WorkerType:
    """Return the one worker type that runs this (the table in docs/architecture.md)."""
    if isolation is Isolation.MAXIMUM or vm_mode is not None:
        return WorkerType.MICROVM
    return WorkerType.WASM if runtime is Runtime.WASM else WorkerType.PROCESS


def check_requirements(requirements: JobRequirements, runtime: Runtime) -> None:
    """Raise ``InvalidRequest`` naming the field if no worker could ever satisfy this."""
    _check_vm(requirements)
    needed = worker_type_for(runtime, requirements.isolation, requirements.vm_mode)
    if len(set(requirements.worker_types)) != len(requirements.worker_types):
        raise InvalidRequest("worker_types names a type twice", field="requirements.worker_types")
    if requirements.worker_types and needed not in requirements.worker_types:
        raise InvalidRequest(
            f"{runtime} at isolation {requirements.isolation} runs on {needed} workers, "
            f"which worker_types {[str(t) for t in requirements.worker_types]} leaves out",
            field="requirements.worker_types",
            hint=f"leave worker_types out, or add {needed!r}",
        )
    if requirements.cpus is not None and not 0 < requirements.cpus <= CPU_STEPS[-1]:
        raise InvalidRequest(
            f"cpus is {requirements.cpus}; above 0 and up to {CPU_STEPS[-1]:g} is allowed", field="requirements.cpus"
        )
    if requirements.memory_mb is not None and not 0 < requirements.memory_mb <= MEMORY_STEPS_MB[-1]:
        raise InvalidRequest(
            f"memory_mb is {requirements.memory_mb}; 1 to {MEMORY_STEPS_MB[-1]} is allowed",
            field="requirements.memory_mb",
        )


def _check_vm(requirements: JobRequirements) -> None:
    mode, isolation = requirements.vm_mode, requirements.isolation
    if mode is VmMode.SERVICE and isolation is not Isolation.STANDARD:
        raise InvalidRequest(
            f"vm_mode service is a kind of isolation standard, and the job asks for isolation {isolation}",
            field="requirements.vm_mode",
            hint="leave vm_mode out: isolation maximum is a fresh machine for the one job",
        )
    if mode is VmMode.EPHEMERAL and isolation is not Isolation.MAXIMUM:
        raise InvalidRequest(
            f"vm_mode ephemeral is isolation maximum, and the job asks for isolation {isolation}",
            field="requirements.vm_mode",
            hint="ask for isolation maximum",
        )
    if requirements.image is None:
        return
    if not IMAGE_NAME.fullmatch(requirements.image):
        raise InvalidRequest(
            f"{requirements.image!r} cannot be the name of an image: lower-case letters, digits, dot, dash and underscore, up to 128",
            field="requirements.image",
        )
    if isolation is not Isolation.MAXIMUM and mode is None:
        raise InvalidRequest(
            "an image is what a virtual machine boots, and this job asks for none",
            field="requirements.image",
            hint="ask for isolation maximum, or for vm_mode service",
        )


def check_policy(requirements: JobRequirements, minimum: Isolation) -> None:
    """Raise ``InvalidRequest`` if the job asks for less isolation than whoever runs the server demands of all jobs."""
    if STRENGTH[requirements.isolation] < STRENGTH[minimum]:
        raise InvalidRequest(
            f"the job asks for isolation {requirements.isolation}, and this server runs none below {minimum} (sandbox.minimum_isolation)",
            field="requirements.isolation",
            hint=f"submit it with isolation {minimum}",
        )
