"""What the VM layer expects of a hypervisor. QEMU is the real one (``qemu.py``); ``blixard.testing`` has a double."""

from __future__ import annotations

import asyncio
import enum
from pathlib import Path
from typing import Protocol

import msgspec

from blixard.vm.image.guest_image import GuestImage


class Accelerator(enum.StrEnum):
    KVM = "kvm"
    TCG = "tcg"


class MachineShape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which template a machine is cloned from. Sizes in MB of guest memory and whole virtual processors."""

    image: GuestImage
    memory_mb: int
    vcpus: int = 1
    network: bool = False
    """A network card with user-mode networking. Without it the guest has none at all."""


class HypervisorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``accelerator`` None: no machine can run here, and ``missing`` says what the host lacks and how to get it."""

    name: str
    version: str = ""
    accelerator: Accelerator | None = None
    missing: str = ""
    notes: tuple[str, ...] = ()
    """For `blixard doctor`: why KVM is not used, what does not confine QEMU here."""


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A saved machine to clone: its memory and the state of its devices, with checksums that were verified when it was opened."""

    key: str
    shape: MachineShape
    directory: Path


class Machine(Protocol):
    """One running virtual machine. All methods on the event loop; none raises because the machine is already gone, but as said."""

    id: str
    directory: Path

    async def open_agent(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the port that the guest's agent listens on. One connection at a time. Raises ``MachineLost``.

        The port is one endless stream for the guest: it does not see that one connection ended and another began.
        """

    async def pause(self) -> None:
        """Stop its processors. Raises ``MachineLost``."""

    async def resume(self) -> None:
        """Let them go on. Raises ``MachineLost``."""

    @property
    def console(self) -> str:
        """The last few KB that the guest and the hypervisor printed; for messages about a guest that does not come up."""

    def private_memory(self) -> int:
        """Bytes that this machine alone occupies on the host; 0 when gone."""

    async def wait(self) -> str:
        """Return when the machine is gone, with the cause in words: "guest shut down", "killed by signal 9", "kernel panic: ..."."""

    async def destroy(self) -> None:
        """End it at once and leave nothing: process, sockets, files. Calling it twice, or at any time, is harmless."""


class Hypervisor(Protocol):
    def info(self) -> HypervisorInfo:
        """Return what this host allows, found by really booting once and remembered. May take seconds the first time; needs no event loop."""

    async def boot(self, machine_id: str, shape: MachineShape, directory: Path) -> Machine:
        """Boot cold. ``directory`` is the machine's own, made by the caller, removed by ``destroy``.

        Raises ``MachineLost``, ``NotSupportedHere``, ``NotEnoughMemory``.
        """

    async def save(self, machine: Machine, template: Path) -> Template:
        """Save a machine whose agent is idle as a template into a new directory, atomically.

        The machine is gone afterwards, whether or not it could be saved; ``template`` is whole or not there. What stood
        there before is replaced. ``template_path`` says where ``find_template`` looks.
        Raises ``MachineLost``, ``StoreFull`` (the disk is full), ``StoreUnavailable`` (it cannot be written).
        """

    def template_path(self, shape: MachineShape, templates: Path) -> Path:
        """Return where the template of this shape lies or will lie, ``templates/<key>``: what is to be given to ``save``.

        ``<key>`` is a hash of all that a template depends on, the host's accelerator among it: may probe, as ``info`` does.
        """

    def find_template(self, shape: MachineShape, templates: Path) -> Template | None:
        """Return the template of this shape if there is a whole one; what is corrupt or half-written is removed, never used.

        Reads and checks all of its memory the first time in a process: a few tenths of a second, safe to call in a thread.
        """

    async def clone(self, machine_id: str, template: Template, directory: Path) -> Machine:
        """Start a copy-on-write copy of the template, running when this returns. ``directory`` is as in ``boot``.

        Raises ``MachineLost``, ``NotEnoughMemory``, ``NotFound`` (the template is gone or corrupt: save it anew).
        """

    async def snapshot(self, machine: Machine, template: Path) -> Template:
        """Save a copy of a living machine, which stands still meanwhile and then goes on as it was. ``clone`` of it is a fork.

        Raises as ``save`` does, and ``NotEnoughMemory``.
        """

    def end_orphans(self, directory: Path) -> int:
        """End the machines whose directories are below ``directory`` and whose manager is dead; return how many there were.

        They are known by the lock that they hold, never by a number. The directories stay. Blocking, for a moment.
        """

    def close(self) -> None:
        """Give back the memory of opened templates. Machines go on. Allowed twice."""
