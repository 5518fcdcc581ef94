"""How long and how large: machines that nobody uses, and service machines that have had their time or memory."""

from __future__ import annotations

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmState
from blixard.vm.messages import (
    IdleVmDetected,
    MeasureMachine,
    MemoryMeasured,
    Message,
    Tick,
    VmRemoved,
    VmShouldRecycle,
    VmStateChanged,
)
from blixard.vm.policy import MonitorRules, RoutingRules

MIB = 1024 * 1024


class Watched:
    def __init__(self, message: VmStateChanged, at: float) -> None:
        self.book = message
        self.born_at = at
        self.free_since = at
        self.is_told = False
        """Its recycling has been asked for."""


class ResourceMonitor:
    """Does no I/O: told of ticks, states and measurements, it says what is idle and what should be replaced.

    The router decides what becomes of it; a running job is never ended from here.
    """

    def __init__(self, rules: MonitorRules, routing: RoutingRules) -> None:
        self._rules = rules
        self._routing = routing
        self._watched: dict[str, Watched] = {}
        self._now = 0.0
        self._measured_at = float("-inf")

    def handle(self, message: Message) -> list[Message]:
        match message:
            case Tick(at=at):
                return self._tick(at)
            case VmStateChanged():
                self._follow(message)
            case VmRemoved(vm_id=vm_id):
                self._watched.pop(vm_id, None)
            case MemoryMeasured(vm_id=vm_id, private_memory=size) if watched := self._watched.get(vm_id):
                return self._weigh(vm_id, watched, size)
        return []

    def _follow(self, message: VmStateChanged) -> None:
        watched = self._watched.setdefault(message.vm_id, Watched(message, self._now))
        if message.state is not VmState.READY or watched.book.state is not VmState.READY:
            watched.free_since = self._now
        watched.book = message

    def _tick(self, at: float) -> list[Message]:
        self._now = at
        found: list[Message] = []
        for vm_id, watched in self._watched.items():
            found += self._judge(vm_id, watched)
        if at - self._measured_at >= self._rules.interval:
            self._measured_at = at
            found += [MeasureMachine(vm_id=vm_id) for vm_id in self._watched]
        return found

    def _judge(self, vm_id: str, watched: Watched) -> list[Message]:
        if watched.book.state is VmState.STOPPING:
            return []
        age, free = self._now - watched.born_at, self._now - watched.free_since
        if watched.book.mode is VmMode.SERVICE and age >= self._routing.max_uptime and not watched.is_told:
            watched.is_told = True
            return [VmShouldRecycle(vm_id=vm_id, cause=f"it has been up for {age:.0f} s")]
        if watched.book.state is VmState.READY and free >= self._routing.idle_shutdown:
            return [IdleVmDetected(vm_id=vm_id, cause=f"nobody has used it for {free:.0f} s")]
        return []

    def _weigh(self, vm_id: str, watched: Watched, size: int) -> list[Message]:
        limit = int(watched.book.shape.memory_mb * MIB * self._rules.memory_share)
        if watched.book.mode is not VmMode.SERVICE or size <= limit or watched.is_told:
            return []
        watched.is_told = True
        cause = f"it occupies {size // MIB} MB of its {watched.book.shape.memory_mb} MB"
        return [VmShouldRecycle(vm_id=vm_id, cause=cause)]
