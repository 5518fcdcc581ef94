"""The manager as its callers see it, on machines in memory: leases, modes, the pool, health, phases, and faults."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any  # what a parametrised need consists of

import pytest

from blixard.domain.requirements import VmMode
from blixard.domain.vm import VmHealth, VmState
from blixard.errors import (
    Conflict,
    ImageNotFound,
    MachineLost,
    NotEnoughMemory,
    NotSupportedHere,
    Unavailable,
    VmNotFound,
    VmUnavailable,
    WrongPhase,
)
from blixard.storage.locks import FileLock
from blixard.vm.coordinator import Phase
from blixard.vm.lease import VmLease, VmNeed
from blixard.vm.owner import LOCK
from tests.unit.vm.rig import DEADLINE, Rig, make_config, need, running, service


async def test_a_job_of_its_own_gets_a_fresh_machine_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        lease = await rig.acquire(need(job_id="job_1"))
        view = rig.manager.get_vm(lease.id)
        assert (view.state, view.mode, view.job_id, view.namespace) == (
            VmState.BUSY,
            VmMode.EPHEMERAL,
            "job_1",
            "red",
        )
        directory = rig.machine(lease.id).directory
        await rig.manager.release(lease, broken=False)
        assert rig.hypervisor.living == []
        assert not directory.exists()
        assert lease.lost.done()
        other = await rig.acquire(need())
        assert other.id != lease.id
        names = {identity.host_name for link in rig.links.values() for identity in link.identities}
        machines = {identity.machine_id for link in rig.links.values() for identity in link.identities}
        assert names >= {lease.id, other.id}
        assert len(machines) == sum(len(link.identities) for link in rig.links.values())
        await rig.manager.release(other, broken=False)
        await rig.manager.release(other, broken=False)  # twice is harmless


async def test_one_template_serves_all_who_need_it_at_the_same_time(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        leases = await asyncio.gather(*(rig.acquire(need()) for _ in range(3)))
        booted = [machine for machine in rig.hypervisor.machines if machine.id.startswith("template")]
        assert len(booted) == 1
        await asyncio.gather(*(rig.manager.release(lease, broken=False) for lease in leases))


async def test_a_service_machine_serves_one_namespace_job_after_job(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        red = await rig.acquire(service("red"))
        blue = await rig.acquire(service("blue"))
        assert red.id != blue.id
        await rig.manager.release(red, broken=False)
        await rig.manager.release(blue, broken=False)
        again = await rig.acquire(service("red"))
        assert again.id == red.id
        await rig.manager.release(red, broken=True)  # the lease of the job before: not this one's
        assert rig.manager.get_vm(again.id).state is VmState.BUSY
        await rig.manager.release(again, broken=False)
        assert rig.manager.get_vm(again.id).jobs == 2


@pytest.mark.parametrize("unlike", [{"memory_mb": 1000}, {"vcpus": 2}, {"network": True}, {"image": "other"}])
async def test_a_service_machine_that_does_not_fit_is_left_alone(tmp_path: Path, unlike: dict[str, Any]) -> None:
    async with running(tmp_path) as rig:
        first = await rig.acquire(service())
        await rig.manager.release(first, broken=False)
        second = await rig.acquire(service(**unlike))
        assert second.id != first.id
        await rig.manager.release(second, broken=False)


async def test_maximum_never_gets_a_service_machine(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        used = await rig.acquire(service())
        await rig.manager.release(used, broken=False)
        fresh = await rig.acquire(need())
        assert fresh.id != used.id
        await rig.manager.release(fresh, broken=False)


async def test_jobs_wait_for_room_and_are_served_in_their_order(tmp_path: Path) -> None:
    async with running(tmp_path, max_vms=2) as rig:
        held = [await rig.acquire(need()) for _ in range(2)]
        order: list[int] = []

        async def wait(number: int) -> VmLease:
            lease = await rig.acquire(need())
            order.append(number)
            return lease

        waiting = []
        for number in range(3):
            waiting.append(asyncio.create_task(wait(number)))
            await rig.until(lambda count=number + 1: rig.manager.stats().waiting == count)  # type: ignore[misc]  # bound now
        assert rig.manager.most_permits == 2
        for lease in held:
            await rig.manager.release(lease, broken=False)
        for task in waiting:
            await rig.manager.release(await task, broken=False)
        assert order == [0, 1, 2]
        assert rig.manager.most_permits == 2


async def test_whoever_gives_up_leaves_nothing_at_any_moment(tmp_path: Path) -> None:
    """The wish is cancelled after 0, 1, 2, ... turns of the loop, until it was quick enough to get its machine."""
    hits = 0
    async with running(tmp_path, max_vms=1) as rig:
        await rig.manager.release(await rig.acquire(need()), broken=False)
        for turns in range(400):
            wish = asyncio.create_task(rig.manager.acquire(need()))
            for _ in range(turns):
                await asyncio.sleep(0)
            if wish.done():
                await rig.manager.release(wish.result(), broken=False)
                break
            wish.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wish
            hits += 1
            lease = await rig.acquire(need())  # the only permit is free again
            await rig.manager.release(lease, broken=False)
    assert hits > 5


async def test_a_pool_is_filled_behind_the_jobs_and_never_above_the_limit(tmp_path: Path) -> None:
    async with running(tmp_path, max_vms=3, pool=2) as rig:
        assert rig.hypervisor.machines == []  # nothing boots before it is needed
        lease = await rig.acquire(need())
        await rig.until(lambda: len(rig.manager.list_vms(VmState.READY)) == 2)
        spare = rig.manager.list_vms(VmState.READY)[0].id
        again = await rig.acquire(need())
        assert again.id in {vm.id for vm in rig.manager.list_vms(VmState.BUSY)}
        assert len(rig.links[again.id].identities) == 2, "a machine that was kept ready is reseeded for its job"
        assert again.id == spare or again.id != lease.id
        await rig.manager.release(lease, broken=False)
        await rig.manager.release(again, broken=False)
        assert rig.manager.most_permits <= 3


async def test_what_is_kept_ready_makes_room_for_a_job_of_another_size(tmp_path: Path) -> None:
    async with running(tmp_path, max_vms=2, pool=1) as rig:
        lease = await rig.acquire(need())
        await rig.until(lambda: len(rig.manager.list_vms(VmState.READY)) == 1)
        large = await rig.acquire(need(memory_mb=1024))
        assert rig.manager.get_vm(large.id).memory_mb == 1024
        for each in (lease, large):
            await rig.manager.release(each, broken=False)


async def test_idle_machines_end_and_the_pool_rests(tmp_path: Path) -> None:
    async with running(tmp_path, pool=1, idle_shutdown=0.05) as rig:
        await rig.manager.release(await rig.acquire(need()), broken=False)
        await rig.until(lambda: rig.manager.list_vms() == [])
        assert any(event.type == "IdleVmDetected" for event in rig.manager.events())


async def test_a_service_machine_is_replaced_after_its_jobs_and_never_during_one(tmp_path: Path) -> None:
    async with running(tmp_path, max_jobs_per_vm=2, max_uptime=3600) as rig:
        ids = []
        for _ in range(4):
            lease = await rig.acquire(service())
            ids.append(lease.id)
            assert not lease.lost.done()
            await rig.manager.release(lease, broken=False)
        assert ids[0] == ids[1] != ids[2] == ids[3]


async def test_a_service_machine_past_its_time_finishes_its_job_first(tmp_path: Path) -> None:
    async with running(tmp_path, max_uptime=0.01) as rig:
        lease = await rig.acquire(service())
        await rig.until(lambda: any(event.type == "VmShouldRecycle" for event in rig.manager.events()))
        assert rig.manager.get_vm(lease.id).state is VmState.BUSY
        assert not lease.lost.done()
        await rig.manager.release(lease, broken=False)
        await rig.until(lambda: rig.manager.list_vms() == [])


async def test_a_machine_that_dies_tells_its_job_the_cause(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        lease = await rig.acquire(need())
        rig.machine(lease.id).end("killed by signal 9")
        assert await asyncio.wait_for(lease.lost, DEADLINE) == "killed by signal 9"
        await rig.manager.release(lease, broken=True)
        assert rig.hypervisor.living == []


async def test_a_machine_that_hangs_is_degraded_then_dead(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        lease = await rig.acquire(need())
        rig.links[lease.id].is_answering = False
        cause = await asyncio.wait_for(asyncio.shield(lease.lost), DEADLINE)
        assert "pings in a row failed" in cause
        await rig.manager.release(lease, broken=True)
        kinds = [event.type for event in rig.manager.events()]
        assert kinds.index("VmDegraded") < kinds.index("VmUnhealthy")


async def test_a_degraded_machine_recovers_and_may_be_checked_by_hand(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        lease = await rig.acquire(need())
        rig.links[lease.id].is_answering = False
        assert await rig.manager.check_vm(lease.id) in {VmHealth.DEGRADED, VmHealth.UNHEALTHY}
        rig.links[lease.id].is_answering = True
        if not lease.lost.done():
            await rig.until(lambda: lease.lost.done() or rig.manager.get_vm(lease.id).health is VmHealth.HEALTHY)
        await rig.manager.release(lease, broken=False)
        with pytest.raises(VmNotFound):
            await rig.manager.check_vm("vm_none")


async def test_a_dead_machine_that_was_kept_ready_costs_its_job_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, pool=1, max_vms=4) as rig:
        first = await rig.acquire(need())
        await rig.until(lambda: len(rig.manager.list_vms(VmState.READY)) == 1)
        spare = rig.manager.list_vms(VmState.READY)[0].id
        rig.links[spare].is_answering = False
        second = await rig.acquire(need())
        assert second.id != spare
        for lease in (first, second):
            await rig.manager.release(lease, broken=False)


async def test_machines_that_fail_to_start_open_the_breaker(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.manager.prepare(need())
        rig.hypervisor.faults["clone"] = [MachineLost("no such luck") for _ in range(3)]
        for _ in range(3):
            with pytest.raises(MachineLost, match="no such luck"):
                await rig.acquire(need())
        with pytest.raises(VmUnavailable, match="the last 3 virtual machines of this size failed"):
            await rig.acquire(need())
        other = await rig.acquire(need(memory_mb=1024))  # another size is not concerned
        await rig.manager.release(other, broken=False)


async def test_pause_resume_snapshot_and_fork(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        lease = await rig.acquire(service())
        await rig.manager.pause_vm(lease.id)
        assert rig.manager.get_vm(lease.id).state is VmState.PAUSED
        assert rig.machine(lease.id).is_paused
        with pytest.raises(Conflict, match="is paused"):
            await rig.manager.reach_vm(lease.id)
        await rig.manager.resume_vm(lease.id)
        assert rig.manager.get_vm(lease.id).state is VmState.BUSY
        name = await rig.manager.snapshot_vm(lease.id)
        forks = [await rig.manager.fork_vm(source) for source in (name, lease.id)]
        assert len({lease.id, *forks}) == 3
        with pytest.raises(Unavailable, match="no room"):
            await rig.manager.fork_vm(lease.id)
        for vm_id in forks:
            await rig.manager.stop_vm(vm_id)
        await rig.manager.release(lease, broken=False)
        with pytest.raises(VmNotFound):
            await rig.manager.pause_vm(forks[0])


async def test_a_machine_stopped_by_hand_tells_its_job(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        lease = await rig.acquire(need())
        await rig.manager.stop_vm(lease.id)
        assert lease.lost.result() == "stopped by hand"
        await rig.manager.release(lease, broken=True)


# What is asked in vain


async def test_an_image_that_does_not_exist(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        with pytest.raises(ImageNotFound, match="missing-one"):
            await rig.acquire(need(image="missing-one"))


async def test_more_memory_than_the_host_has(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        with pytest.raises(NotEnoughMemory, match=r"8192 MB.*4096 MB"):
            await rig.acquire(need(memory_mb=8000))
        with pytest.raises(NotSupportedHere, match="at most"):
            await rig.acquire(need(memory_mb=10_000_000))


async def test_a_host_without_a_hypervisor(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.hypervisor.missing = "there is no qemu-system-x86_64"
        with pytest.raises(NotSupportedHere, match="no qemu-system-x86_64"):
            await rig.acquire(need())


async def test_no_service_machine_and_none_may_be_made(tmp_path: Path) -> None:
    async with running(tmp_path, auto_create=False) as rig:
        with pytest.raises(NotSupportedHere, match="auto_create"):
            await rig.acquire(service())
        vm_id = await rig.manager.start_vm(service())
        lease = await rig.acquire(service())
        assert lease.id == vm_id
        await rig.manager.release(lease, broken=False)


async def test_without_preference_a_service_job_gets_a_machine_of_its_own(tmp_path: Path) -> None:
    async with running(tmp_path, prefer_service=False) as rig:
        lease = await rig.acquire(service())
        assert rig.manager.get_vm(lease.id).mode is VmMode.EPHEMERAL
        await rig.manager.release(lease, broken=False)


# Phases


async def test_calls_in_the_wrong_phase_say_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path, make_config(tmp_path))
    with pytest.raises(WrongPhase):
        await rig.manager.acquire(need())
    with pytest.raises(WrongPhase):
        rig.manager.start_background_tasks()
    await rig.manager.start()
    await rig.manager.start()  # twice is harmless
    with pytest.raises(WrongPhase):
        rig.manager.start_background_tasks()
    await rig.manager.shutdown()
    with pytest.raises(VmUnavailable):
        await rig.manager.acquire(need())
    with pytest.raises(WrongPhase):
        await rig.manager.start()
    rig.assert_nothing_left()


async def test_shutdown_before_start_twice_and_during_it(tmp_path: Path) -> None:
    never_started = Rig(tmp_path, make_config(tmp_path))
    await never_started.manager.shutdown()
    await never_started.manager.shutdown()
    assert never_started.manager.phase is Phase.STOPPED
    rig = Rig(tmp_path, make_config(tmp_path))
    starting = asyncio.create_task(rig.manager.start())
    await asyncio.sleep(0)
    await asyncio.gather(rig.manager.shutdown(), rig.manager.shutdown())
    await asyncio.gather(starting, return_exceptions=True)
    rig.assert_nothing_left()


async def test_shutdown_answers_everybody_who_waits(tmp_path: Path) -> None:
    rig = Rig(tmp_path, make_config(tmp_path, max_vms=1))
    await rig.manager.start()
    lease = await rig.acquire(need())
    waiting = [asyncio.create_task(rig.manager.acquire(need())) for _ in range(3)]
    await rig.until(lambda: rig.manager.stats().waiting == 3)
    await rig.manager.shutdown()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, VmUnavailable)
    assert lease.lost.result() == "the VM manager stops"
    await rig.manager.release(lease, broken=True)
    rig.assert_nothing_left()


async def test_shutdown_while_machines_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path, make_config(tmp_path))
    await rig.manager.start()
    rig.hold.clear()
    waiting = [asyncio.create_task(rig.manager.acquire(need())) for _ in range(3)]
    await rig.until(lambda: len(rig.manager.list_vms(VmState.STARTING)) == 3)
    await rig.manager.shutdown()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, VmUnavailable | MachineLost)
    rig.assert_nothing_left()


async def test_the_next_manager_removes_what_a_dead_one_left(tmp_path: Path) -> None:
    run = tmp_path / "vm" / "run"
    dead, alive = run / "dead", run / "alive"
    for directory in (dead / "vm_1", alive / "vm_2"):
        directory.mkdir(parents=True)
    (dead / LOCK).touch()
    lock = FileLock.acquire(alive / LOCK)
    try:
        rig = Rig(tmp_path, make_config(tmp_path))
        await rig.manager.start()
        assert not dead.exists()
        assert (alive / "vm_2").exists()
        await rig.manager.shutdown()
    finally:
        lock.release()


# Everything at once


@pytest.mark.parametrize("seed", range(6))
async def test_under_random_faults_every_lease_ends_and_nothing_leaks(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    counts = {"jobs": 0, "faults": 0, "given up": 0}

    async def job(rig: Rig, wanted: VmNeed) -> None:
        wish = asyncio.create_task(rig.manager.acquire(wanted))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() * 0.01)  # sleep: a job takes a random time
            wish.cancel()
            counts["given up"] += 1
        result = (await asyncio.gather(wish, return_exceptions=True))[0]
        if isinstance(result, BaseException):
            assert isinstance(result, asyncio.CancelledError | MachineLost | VmUnavailable), result
            return
        counts["jobs"] += 1
        if not result.lost.done():
            assert rig.manager.get_vm(result.id).namespace == wanted.namespace
        await asyncio.sleep(chance.random() * 0.01)  # sleep: a job takes a random time
        await rig.manager.release(result, broken=result.lost.done())

    async def harm(rig: Rig) -> None:
        while True:
            await asyncio.sleep(0.003)  # sleep: faults come one after the other
            living = rig.hypervisor.living
            if living and chance.random() < 0.3:
                chance.choice(living).end("killed for a test")
                counts["faults"] += 1
            elif chance.random() < 0.1:
                rig.hypervisor.faults.setdefault("clone", []).append(MachineLost("for a test"))
                counts["faults"] += 1

    async with running(tmp_path, max_vms=4, pool=1, max_jobs_per_vm=3) as rig:
        await rig.manager.prepare(need())
        villain = asyncio.create_task(harm(rig))
        needs = [
            need(chance.choice(("red", "blue")), chance.choice(list(VmMode)), memory_mb=chance.choice((256, 512)))
            for _ in range(120)
        ]
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            for wanted in needs:
                group.create_task(job(rig, wanted))
                await asyncio.sleep(chance.random() * 0.004)  # sleep: jobs come at random times
        villain.cancel()
        await asyncio.gather(villain, return_exceptions=True)
        assert rig.manager.most_permits <= 4
    print(f"seed {seed}: {counts}")
    assert counts["jobs"] > 10, counts
    assert counts["faults"] > 3, counts
    assert counts["given up"] > 3, counts
