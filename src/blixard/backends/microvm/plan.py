"""Decides what one attempt needs of its machine and what its guest is told. Looks at the host's files, changes nothing."""

from __future__ import annotations

import math
import os

import msgspec

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.environment import SYSTEM_PATH, job_variables
from blixard.backends.microvm.files import FilesRefused, Parcel, Source, gather
from blixard.backends.outcomes import refused
from blixard.backends.runner_backend import Refused, python_task
from blixard.backends.sandbox.layout import is_below
from blixard.backends.sandbox.planner import NEVER_GRANTED
from blixard.domain.limits import MIB
from blixard.domain.payload import CommandPayload, FunctionPayload, ScriptPayload
from blixard.domain.requirements import VmMode
from blixard.vm.agent_link import GuestBind, GuestLimits, JobOrder
from blixard.vm.guest.orders import CODE, HOME, TEMPORARY, PythonOrder, encode
from blixard.vm.lease import DEFAULT_IMAGE, VmNeed

GUEST_MEMORY_MB = 64
"""What a guest needs for itself: kernel, agent, and the memory of its root file system."""
MEMORY_STEPS_MB = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536)
"""Sizes of machines: a template is kept for each that is used."""


class JobPlan(msgspec.Struct, frozen=True, kw_only=True):
    need: VmNeed
    order: JobOrder
    parcel: Parcel
    packet: bytes | None = None
    """What the job's runner is told besides."""
    returned: dict[str, str] = {}
    """Names of the binds that the job may write, and the host's paths that they stand for."""


class Grant(msgspec.Struct, frozen=True):
    """A path of the host that the job sees at ``target``."""

    source: str
    target: str
    writable: bool = False


def plan_job(execution: Execution, settings: BackendSettings) -> JobPlan:
    """Return how to run a function, script or command. Blocks on the disk. Raises ``Refused``."""
    sources: list[Source] = []
    packet: bytes | None = None
    argv: tuple[str, ...] = ()
    match execution.spec.payload:
        case FunctionPayload(bundle=bundle) | ScriptPayload(bundle=bundle):
            if bundle is not None:
                sources.append(Source("code", _blob(execution, bundle)))
            task = python_task(execution, None if bundle is None else CODE)
            packet = encode(PythonOrder(task, execution.arguments))
        case CommandPayload(argv=words):
            argv = (*words, *_words(execution))
        case other:
            raise Refused(refused("NotSupportedHere", f"virtual machines cannot run a {type(other).__name__}"))
    grants = _grants(execution)
    for item in execution.inputs:
        if item.path.startswith("/"):
            grants.append(Grant(_blob(execution, item.digest), item.path))
        else:
            sources.append(Source(f"work/{item.path}", _blob(execution, item.digest)))
    order = JobOrder(
        entry="command" if argv else "python",
        argv=argv,
        environment={**base_environment(), **execution.spec.environment, **job_variables(execution.ref)},
        max_output=execution.spec.max_output_bytes,
    )
    return complete_plan(execution, settings, order, sources, grants, packet)


def complete_plan(
    execution: Execution,
    settings: BackendSettings,
    order: JobOrder,
    sources: list[Source],
    grants: list[Grant],
    packet: bytes | None,
    *,
    runtime_mb: int = 0,
) -> JobPlan:
    """Add what all kinds of jobs have in common. Blocks on the disk. Raises ``Refused``.

    ``runtime_mb``: memory that the job's process may have on top of the job's own limit.
    """
    binds = tuple(
        GuestBind(path=grant.target, name=str(number), writable=grant.writable) for number, grant in enumerate(grants)
    )
    sources = [*sources, *(Source(f"binds/{number}", grant.source) for number, grant in enumerate(grants))]
    try:
        parcel = gather(sources)
    except FilesRefused as refusal:
        hint = "grant less, or use isolation standard, which shows the files themselves"
        raise Refused(refused("GrantRefused", str(refusal), hint=hint)) from refusal
    except OSError as error:
        raise Refused(refused("GrantRefused", f"a file of the job cannot be read: {error}")) from error
    memory = memory_of(execution, settings) + runtime_mb
    limits = GuestLimits(
        memory=memory * MIB,
        processes=settings.processes,
        cpus=execution.spec.requirements.cpus,
        disk=settings.disk_mb * MIB,
        open_files=settings.open_files,
    )
    return JobPlan(
        need=_need(execution, memory + -(-parcel.size // MIB)),
        order=msgspec.structs.replace(order, limits=limits, binds=binds),
        parcel=parcel,
        packet=packet,
        returned={str(number): grant.source for number, grant in enumerate(grants) if grant.writable},
    )


def memory_of(execution: Execution, settings: BackendSettings) -> int:
    """Return the job's own limit in MB."""
    return execution.spec.requirements.memory_mb or settings.memory_mb


def machine_memory(megabytes: int) -> int:
    """Return the size of a machine that leaves so much to its job."""
    wanted = megabytes + GUEST_MEMORY_MB
    return next((step for step in MEMORY_STEPS_MB if step >= wanted), wanted)


def base_environment() -> dict[str, str]:
    return {"PATH": SYSTEM_PATH, "HOME": HOME, "TMPDIR": TEMPORARY, "LANG": "C.UTF-8"}


def _need(execution: Execution, megabytes: int) -> VmNeed:
    spec = execution.spec
    requirements = spec.requirements
    return VmNeed(
        namespace=execution.ref.namespace,
        memory_mb=machine_memory(megabytes),
        image=requirements.image or DEFAULT_IMAGE,
        vcpus=max(1, math.ceil(requirements.cpus or 1)),
        network=spec.grants.network,
        mode=requirements.vm_mode or VmMode.EPHEMERAL,
        labels=requirements.labels,
        job_id=execution.ref.job_id,
    )


def _grants(execution: Execution) -> list[Grant]:
    """Return the granted paths, the outer before the inner. Raises ``Refused``."""
    wanted = dict.fromkeys(execution.spec.grants.read, False) | dict.fromkeys(execution.spec.grants.write, True)
    return [_grant(path, wanted[path]) for path in sorted(wanted)]


def _grant(path: str, writable: bool) -> Grant:
    option = "--allow-write" if writable else "--allow-read"
    source = os.path.realpath(path)
    for forbidden in NEVER_GRANTED:
        if is_below(source, forbidden) or is_below(path, forbidden):
            message = f"{path} cannot be granted: {forbidden} is the machine itself, not files of yours"
            hint = f"leave {option} {path} out; every virtual machine has a {forbidden} of its own"
            raise Refused(refused("GrantRefused", message, hint=hint))
    if not os.path.exists(source):
        hint = f"create it first, or grant the directory it is to be created in: {option} {os.path.dirname(path)}"
        message = f"{option} {path}: there is no such file or directory on this machine"
        raise Refused(refused("GrantRefused", message, hint=hint))
    return Grant(source, path, writable)


def _blob(execution: Execution, digest: str) -> str:
    path = execution.blobs.get(digest)
    if path is None:
        raise Refused(refused("InputMissing", f"the blob {digest} is not on this worker"))
    return str(path)


def _words(execution: Execution) -> list[str]:
    try:
        return msgspec.json.decode(execution.arguments, type=list[str])
    except msgspec.DecodeError as error:
        message = f"the arguments of a command are a JSON list of strings: {error}"
        raise Refused(refused("InvalidArguments", message)) from error
