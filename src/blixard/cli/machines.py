"""Virtual machines of this machine, as commands reach them: through the control sockets of the workers that keep them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from blixard.cli.invocation import Invocation
from blixard.cli.output import note
from blixard.domain.requirements import JobRequirements
from blixard.domain.vm import VmView
from blixard.errors import Conflict, ServerUnreachable, VmNotFound
from blixard.vm.control import ControlClient
from blixard.vm.owner import CONTROL, living_owners

ANSWER_SECONDS = 10.0


class Found(msgspec.Struct, frozen=True):
    """A machine and the way to the worker that keeps it."""

    vm: VmView
    client: ControlClient


def vm_directory(invocation: Invocation) -> Path:
    settings = invocation.config.settings
    return settings.vm.directory or settings.storage.data_dir / "vm"


async def find_machines(directory: Path) -> list[Found]:
    """Return the machines of every worker that lives on this directory, oldest first. One that ends meanwhile has none."""
    clients = [ControlClient(owner / CONTROL) for owner in living_owners(directory / "run")]
    answers = await asyncio.gather(*(_ask(client) for client in clients))
    found = [Found(vm, client) for client, vms in zip(clients, answers, strict=True) for vm in vms]
    return sorted(found, key=lambda item: (item.vm.created_at, item.vm.id))


async def _ask(client: ControlClient) -> list[VmView]:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await client.vms()
    except ServerUnreachable:
        return []


async def find_machine(directory: Path, wanted: str) -> Found:
    """Return the machine of this id, or of the job with this id. Raises ``VmNotFound``, ``Conflict`` when a beginning fits several."""
    found = await find_machines(directory)
    fitting = [item for item in found if wanted in {item.vm.id, item.vm.job_id}]
    fitting = fitting or [item for item in found if item.vm.id.startswith(wanted)]
    if not fitting:
        raise VmNotFound(wanted)
    if len(fitting) > 1:
        raise Conflict(
            f"{len(fitting)} virtual machines have ids that begin with {wanted!r}", hint="write more of the id"
        )
    return fitting[0]


def ensure_image(invocation: Invocation, requirements: JobRequirements) -> bool:
    """Build the default image if this job, which runs in a machine, is the first that needs it. False: a person did not want it.

    Only for jobs that run on this machine for this command: a server's worker builds by itself. Asks only at a terminal.
    """
    from blixard.client.embedded import is_served
    from blixard.infrastructure import find_missing_for_vms
    from blixard.vm.image.store import ImageStore

    settings = invocation.config.settings
    if invocation.is_remote or is_served(settings.storage.data_dir):
        return True
    store = ImageStore(vm_directory(invocation) / "images")
    wanted = requirements.image or settings.vm.image
    if wanted in store.names() or wanted != "default" or find_missing_for_vms(settings):
        return True  # it is there, or the job will be told why not
    if not confirm("The first virtual machine needs a guest image: about 100 MB from Debian, a minute. Build it now?"):
        return False
    build_image(invocation)
    return True


def build_image(invocation: Invocation) -> str:
    """Build the default image, or bring it up to date, and return its digest."""
    from blixard.cli.build_view import show_build
    from blixard.vm.image.builder import ensure_default_image
    from blixard.vm.image.store import ImageStore

    with show_build(quiet=invocation.quiet) as progress:
        return ensure_default_image(ImageStore(vm_directory(invocation) / "images"), progress).digest


def confirm(question: str) -> bool:
    """Ask at a terminal; elsewhere nobody is there to be asked, and what was asked for is done."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    sys.stderr.write(f"{question} [Y/n] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"", "y", "yes"}


def tell_step(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else note
