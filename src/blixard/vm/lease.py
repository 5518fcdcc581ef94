"""What a backend asks of whoever keeps virtual machines: one machine for one job."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import msgspec

from blixard.domain.requirements import VmMode

if TYPE_CHECKING:
    from blixard.vm.agent_link import AgentLink

DEFAULT_IMAGE = "default"


class VmNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a job needs of its machine. ``memory_mb`` is the whole guest's memory: the job's own and what the guest itself takes."""

    namespace: str
    memory_mb: int
    image: str = DEFAULT_IMAGE
    vcpus: int = 1
    network: bool = False
    mode: VmMode = VmMode.EPHEMERAL
    labels: dict[str, str] = {}
    job_id: str = ""
    """For whoever looks at the machines."""


class VmLease(Protocol):
    """A running machine whose agent has answered, been given fresh randomness, the time and its name, and runs nothing."""

    @property
    def id(self) -> str: ...

    @property
    def link(self) -> AgentLink: ...

    @property
    def lost(self) -> asyncio.Future[str]:
        """Done as soon as the machine is known to be gone or dead, with the cause in words. Never cancelled by a holder."""


class VmLeaser(Protocol):
    """Hands out machines. The holder of a lease is the only one to run jobs on it; others may run programs beside (``vm exec``)."""

    async def acquire(self, need: VmNeed) -> VmLease:
        """Return a machine, made or waited for. Cancelling the call gives up the wish and leaves nothing.

        Raises ``ImageNotFound``, ``NotSupportedHere``, ``NotEnoughMemory``, ``MachineLost``, ``VmUnavailable``.
        """

    async def release(self, lease: VmLease, *, broken: bool) -> None:
        """Give it back. Returns when nothing of an ephemeral or broken machine is left; a service machine is kept for others.

        ``broken``: the machine is lost or in doubt: end it, whatever its mode. Calling it twice is harmless.
        """
