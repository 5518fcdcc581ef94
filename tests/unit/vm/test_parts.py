"""Channels, health checker and resource monitor by themselves: messages in, messages out."""

from __future__ import annotations

import asyncio

import pytest

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmHealth, VmState
from blixard.errors import ImageNotFound, InternalError, MachineLost, NotSupportedHere, WrongPhase
from blixard.vm.channels import Channel
from blixard.vm.coordinator import READERS
from blixard.vm.health import HealthChecker
from blixard.vm.lease import VmNeed
from blixard.vm.messages import (
    Answered,
    CheckNow,
    CircuitBreakerClosed,
    CircuitBreakerHalfOpened,
    CircuitBreakerOpened,
    EndKind,
    HealthCheckFailed,
    HealthCheckPassed,
    IdleVmDetected,
    MachineGone,
    MachineReady,
    MeasureMachine,
    MemoryMeasured,
    Message,
    PingMachine,
    Refused,
    Tick,
    VmDegraded,
    VmRecovered,
    VmRemoved,
    VmShouldRecycle,
    VmStateChanged,
    VmUnhealthy,
)
from blixard.vm.monitor import MIB, ResourceMonitor
from blixard.vm.policy import MEMORY_SIZES_MB, HealthRules, MonitorRules, RoutingRules, VmShape, shape_of
from blixard.vm.pool import Permits

SHAPE = VmShape(memory_mb=256)


def book(state: VmState = VmState.BUSY, vm_id: str = "vm_1", mode: VmMode = VmMode.SERVICE) -> VmStateChanged:
    return VmStateChanged(vm_id=vm_id, state=state, shape=SHAPE, mode=mode)


# Channels


async def test_a_channel_keeps_order_and_its_bound() -> None:
    channel: Channel[int] = Channel("test", 2)
    channel.post(1)
    await channel.send(2)
    with pytest.raises(InternalError, match="full"):
        channel.post(3)
    sender = asyncio.create_task(channel.send(3))
    await asyncio.sleep(0)
    assert not sender.done()
    assert [await channel.receive(), await channel.receive()] == [1, 2]
    await sender
    channel.close()
    channel.close()
    with pytest.raises(WrongPhase):
        channel.post(4)
    with pytest.raises(WrongPhase):
        await channel.send(4)
    assert [await channel.receive(), await channel.receive()] == [3, None]


async def test_closing_wakes_whoever_waits() -> None:
    channel: Channel[int] = Channel("test", 1)
    receiver = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    channel.close()
    assert await receiver is None


def test_every_message_but_answers_has_a_reader() -> None:
    def all_kinds(kind: type[Message]) -> set[type[Message]]:
        return {kind}.union(*(all_kinds(child) for child in kind.__subclasses__()))

    carried = {
        kind
        for kind in all_kinds(Message)
        if kind.__module__ == Message.__module__ and kind.__name__ not in {"Message", "Asking"}
    }
    assert carried == {*READERS, Answered, Refused}


def test_a_permit_beyond_the_limit_is_refused() -> None:
    permits = Permits(1)
    permits.take("vm_1")
    with pytest.raises(InternalError, match="number 2 of 1"):
        permits.take("vm_2")
    permits.give_back("vm_1")
    permits.take("vm_2")
    assert permits.most == 1


@pytest.mark.parametrize("memory", [1, 128, 129, 300, 1025, 65536])
def test_a_shape_is_the_next_size_that_serves(memory: int) -> None:
    shape = shape_of(VmNeed(namespace="red", memory_mb=memory, vcpus=3))
    assert shape.memory_mb == min(size for size in MEMORY_SIZES_MB if size >= memory)
    assert shape.vcpus == 4
    with pytest.raises(NotSupportedHere):
        shape_of(VmNeed(namespace="red", memory_mb=65537))
    with pytest.raises(NotSupportedHere):
        shape_of(VmNeed(namespace="red", memory_mb=1, vcpus=33))


# Health

RULES = HealthRules(
    interval=10, timeout=2, failure_threshold=3, recovery_threshold=2, breaker_threshold=2, breaker_seconds=60
)


def checker() -> HealthChecker:
    health = HealthChecker(RULES)
    health.handle(Tick(at=100.0))
    health.handle(book())
    health.handle(MachineReady(vm_id="vm_1"))
    return health


def ping(health: HealthChecker, at: float, cause: str = "") -> list[Message]:
    """Let its turn come and answer: what follows from the answer."""
    assert health.handle(Tick(at=at)) == [PingMachine(vm_id="vm_1", timeout=2)]
    assert health.handle(Tick(at=at + 100)) == [], "asked twice without an answer"
    health.handle(Tick(at=at))
    return health.handle(
        HealthCheckFailed(vm_id="vm_1", cause=cause) if cause else HealthCheckPassed(vm_id="vm_1", seconds=0.1)
    )


def test_a_machine_is_degraded_recovers_and_dies_by_its_answers() -> None:
    health = checker()
    assert health.handle(Tick(at=109)) == []  # its turn has not come
    assert ping(health, 110) == []
    assert ping(health, 120, "silence") == [VmDegraded(vm_id="vm_1", cause="silence")]
    assert ping(health, 130, "silence") == []
    assert ping(health, 140) == []
    assert ping(health, 150) == [VmRecovered(vm_id="vm_1")]
    assert ping(health, 160, "silence") == [VmDegraded(vm_id="vm_1", cause="silence")]
    assert ping(health, 170, "silence") == []
    (dead,) = ping(health, 180, "silence")
    assert isinstance(dead, VmUnhealthy)
    assert "3 pings in a row failed: silence" in dead.cause
    assert health.handle(Tick(at=300)) == []  # nobody asks it again


def test_a_paused_machine_is_not_asked_and_begins_anew() -> None:
    health = checker()
    health.handle(book(VmState.PAUSED))
    assert health.handle(Tick(at=500)) == []
    health.handle(book(VmState.BUSY))
    assert health.handle(Tick(at=505)) == []
    assert ping(health, 510) == []


def test_a_ping_that_is_overtaken_by_a_pause_counts_nothing() -> None:
    health = checker()
    health.handle(Tick(at=110))
    health.handle(book(VmState.PAUSED))
    assert health.handle(HealthCheckFailed(vm_id="vm_1", cause="paused")) == []


def test_whoever_checks_by_hand_gets_an_answer_in_any_case() -> None:
    health = checker()
    assert health.handle(CheckNow(ticket="t", vm_id="vm_1")) == [PingMachine(vm_id="vm_1", timeout=2)]
    assert health.handle(CheckNow(ticket="u", vm_id="vm_1")) == []
    passed = HealthCheckPassed(vm_id="vm_1", seconds=0.1)
    healthy = VmHealth.HEALTHY
    assert health.handle(passed) == [Answered(ticket="t", value=healthy), Answered(ticket="u", value=healthy)]
    health.handle(CheckNow(ticket="v", vm_id="vm_1"))
    (gone,) = health.handle(VmRemoved(vm_id="vm_1"))
    assert isinstance(gone, Refused)
    (unknown,) = health.handle(CheckNow(ticket="w", vm_id="vm_1"))
    assert isinstance(unknown, Refused)


def fail_start(health: HealthChecker, error: Exception | None) -> list[Message]:
    health.handle(book(VmState.STARTING, "vm_2"))
    out = health.handle(
        MachineGone(vm_id="vm_2", kind=EndKind.FAILED, cause="no", error=error)  # type: ignore[arg-type]  # of our tree
    )
    health.handle(VmRemoved(vm_id="vm_2"))
    return out


def test_a_breaker_opens_half_opens_and_closes() -> None:
    health = checker()
    assert fail_start(health, MachineLost("a")) == []
    (opened,) = fail_start(health, MachineLost("b"))
    assert isinstance(opened, CircuitBreakerOpened)
    assert (opened.shape, opened.seconds) == (SHAPE, 60)
    assert "the last 2" in opened.cause
    assert "because: b" in opened.cause
    assert not [m for m in health.handle(Tick(at=159)) if isinstance(m, CircuitBreakerHalfOpened)]
    assert CircuitBreakerHalfOpened(shape=SHAPE) in health.handle(Tick(at=160))
    assert isinstance(fail_start(health, MachineLost("c"))[0], CircuitBreakerOpened)
    assert CircuitBreakerHalfOpened(shape=SHAPE) in health.handle(Tick(at=220))
    assert CircuitBreakerClosed(shape=SHAPE) in health.handle(MachineReady(vm_id="vm_1"))


def test_what_is_no_fault_of_machines_opens_no_breaker() -> None:
    """Wrong wishes, and running machines that end: a job may do that to its own."""
    health = checker()
    for error in (ImageNotFound("x"), None, ImageNotFound("y"), None):
        assert fail_start(health, error) == []


# Monitor


def watch(state: VmState, mode: VmMode = VmMode.SERVICE) -> ResourceMonitor:
    monitor = ResourceMonitor(
        MonitorRules(interval=10, memory_share=0.5), RoutingRules(max_uptime=100, idle_shutdown=30)
    )
    monitor.handle(Tick(at=1000.0))
    monitor.handle(book(state, mode=mode))
    return monitor


def judged(messages: list[Message]) -> list[type[Message]]:
    return [type(message) for message in messages if not isinstance(message, MeasureMachine)]


def test_idle_is_who_was_ready_for_long() -> None:
    monitor = watch(VmState.READY)
    assert judged(monitor.handle(Tick(at=1029))) == []
    assert judged(monitor.handle(Tick(at=1030))) == [IdleVmDetected]
    monitor.handle(book(VmState.BUSY))
    monitor.handle(book(VmState.READY))
    assert judged(monitor.handle(Tick(at=1050))) == []
    assert judged(monitor.handle(Tick(at=1060))) == [IdleVmDetected]
    monitor.handle(book(VmState.STOPPING))
    assert judged(monitor.handle(Tick(at=1090))) == []


def test_a_service_machine_past_its_time_is_told_of_once() -> None:
    monitor = watch(VmState.BUSY)
    assert judged(monitor.handle(Tick(at=1099))) == []
    assert judged(monitor.handle(Tick(at=1100))) == [VmShouldRecycle]
    assert judged(monitor.handle(Tick(at=1101))) == []
    assert judged(watch(VmState.BUSY, VmMode.EPHEMERAL).handle(Tick(at=5000))) == []


def test_memory_is_measured_and_weighed() -> None:
    monitor = watch(VmState.BUSY)
    assert monitor.handle(Tick(at=1010)) == [MeasureMachine(vm_id="vm_1")]
    assert monitor.handle(Tick(at=1015)) == []
    assert monitor.handle(MemoryMeasured(vm_id="vm_1", private_memory=128 * MIB)) == []
    (found,) = monitor.handle(MemoryMeasured(vm_id="vm_1", private_memory=128 * MIB + 1))
    assert isinstance(found, VmShouldRecycle)
    assert monitor.handle(MemoryMeasured(vm_id="vm_1", private_memory=256 * MIB)) == []
    monitor.handle(VmRemoved(vm_id="vm_1"))
    assert monitor.handle(Tick(at=2000)) == []
