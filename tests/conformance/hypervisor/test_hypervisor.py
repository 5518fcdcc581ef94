"""What every hypervisor promises."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blixard.errors import MachineLost, NotEnoughMemory, NotFound
from blixard.vm.hypervisor.contract import Template
from tests.conformance.hypervisor.rig import MEMORY_MB, Machines, Rig
from tests.conformance.hypervisor.shell_guest import SECONDS, Shell, run

pytestmark = pytest.mark.timeout(300)


def test_it_says_what_runs_here(rig: Rig, tmp_path: Path) -> None:
    info = rig.hypervisor(tmp_path).info()
    assert info.name
    assert info.accelerator is not None
    assert not info.missing


async def test_a_booted_machine_answers_and_leaves_nothing(machines: Machines) -> None:
    machine = await machines.boot()
    await run(machine, "word=hello")
    assert await run(machine, "echo $word") == "hello", "a second connection finds the same agent"
    assert machine.private_memory() > 0
    await machine.destroy()
    assert await machine.wait() == "destroyed"
    assert machine.private_memory() == 0
    assert not machine.directory.exists()


async def test_a_saved_machine_is_gone_and_its_template_is_found(machines: Machines) -> None:
    machine = await machines.boot()
    template = await machines.hypervisor.save(machine, machines.directory / "templates" / "mine")
    assert await machine.wait()
    assert not machine.directory.exists()
    assert template.directory.is_dir()
    await (await machines.clone(template)).destroy()


async def test_clones_begin_where_the_template_was_saved_and_part_from_there(machines: Machines) -> None:
    first, second = await machines.clone(), await machines.clone()
    assert await run(first, "echo $origin") == "template"
    await run(first, "mine=first")
    await run(second, "mine=second")
    assert await run(first, "echo $mine") == "first"
    assert await run(second, "echo $mine") == "second"
    assert await run(await machines.clone(), "echo $mine") == ""


async def test_many_clones_at_once_each_have_memory_of_their_own(machines: Machines) -> None:
    template = await machines.template()
    clones = await asyncio.gather(*(machines.clone(template) for _ in range(20)))
    await asyncio.gather(*(run(clone, f"mine={clone.id}") for clone in clones))
    assert [await run(clone, "echo $mine") for clone in clones] == [clone.id for clone in clones]
    assert len({clone.id for clone in clones}) == 20


async def test_a_paused_machine_does_nothing_until_it_goes_on(machines: Machines) -> None:
    machine = await machines.clone()
    await machine.pause()
    async with Shell(machine) as shell:
        await shell.send("echo $origin")
        answer = asyncio.ensure_future(shell.read_line())
        done, _ = await asyncio.wait({answer}, timeout=0.5)
        assert not done
        await machine.resume()
        assert await answer == "template"
        assert (await shell.read_line()).startswith("end")


async def test_a_snapshot_lets_the_machine_go_on_and_a_fork_part_from_it(machines: Machines) -> None:
    machine = await machines.clone()
    await run(machine, "mine=before")
    template = await machines.hypervisor.snapshot(machine, machines.directory / "templates" / "fork")
    await run(machine, "mine=after")
    fork = await machines.clone(template)
    assert await run(fork, "echo $mine") == "before"
    assert await run(fork, "echo $origin") == "template"
    assert await run(machine, "echo $mine") == "after"


async def test_a_paused_machine_is_still_paused_after_its_snapshot(machines: Machines) -> None:
    machine = await machines.clone()
    await machine.pause()
    await machines.hypervisor.snapshot(machine, machines.directory / "templates" / "fork")
    async with Shell(machine) as shell:
        await shell.send("echo $origin")
        answer = asyncio.ensure_future(shell.read_line())
        done, _ = await asyncio.wait({answer}, timeout=0.5)
        assert not done
        await machine.resume()
        assert await answer == "template"


async def test_a_guest_that_shuts_down_is_gone_with_that_cause(machines: Machines) -> None:
    machine = await machines.clone()
    async with Shell(machine) as shell:
        await shell.send("poweroff -f")
    async with asyncio.timeout(SECONDS):
        assert await machine.wait() == "guest shut down"
    with pytest.raises(MachineLost, match="guest shut down"):
        await machine.open_agent()
    for ask in (machine.pause, machine.resume):
        with pytest.raises(MachineLost):
            await ask()
    assert machine.private_memory() == 0


async def test_destroy_is_allowed_twice_and_at_once(machines: Machines) -> None:
    machine = await machines.clone()
    await asyncio.gather(machine.destroy(), machine.destroy())
    await machine.destroy()
    assert not machine.directory.exists()


async def test_a_template_that_is_not_there_is_not_found(machines: Machines) -> None:
    wanted = machines.directory / "templates" / "none"
    name, place = machines.place()
    with pytest.raises(NotFound, match="template"):
        await machines.hypervisor.clone(name, Template(key="none", shape=machines.rig.shape, directory=wanted), place)
    assert machines.hypervisor.find_template(machines.rig.shape, machines.directory / "templates") is None


async def test_a_host_without_memory_refuses_with_figures(rig: Rig, machines: Machines, tmp_path: Path) -> None:
    template = await machines.template()
    poor = rig.hypervisor(tmp_path, available=MEMORY_MB - 1)
    for start in (poor.boot("vm-x", rig.shape, tmp_path / "x"), poor.clone("vm-y", template, tmp_path / "y")):
        with pytest.raises(NotEnoughMemory, match=f"{MEMORY_MB - 1} MB"):
            await start
