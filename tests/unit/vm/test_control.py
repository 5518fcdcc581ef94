"""The control socket between processes, and the commands that use it."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from blixard.domain.vm import VmState
from blixard.errors import Conflict, ServerUnreachable, VmNotFound
from blixard.vm.agent_link import GuestError, GuestExit, ProgramOrder
from blixard.vm.control import (
    ControlClient,
    ControlServer,
    ForkOne,
    ListEvents,
    PauseOne,
    ProgramInput,
    ResumeOne,
    RunProgram,
    SnapshotOne,
    StopOne,
)
from blixard.vm.coordinator import VmEvent
from blixard.vm.guest.protocol import Stream
from blixard.vm.owner import CONTROL, living_owners
from tests.unit.vm.rig import DEADLINE, Rig, make_config, running, service


class FakeChannel:
    """A program in a guest: it says what it is told, ends at the end of its input or at a signal."""

    def __init__(self, order: ProgramOrder, listener: Any) -> None:  # Any: the link's listener, called as it calls it
        loop = asyncio.get_running_loop()
        self.order = order
        self.exited: asyncio.Future[GuestExit] = loop.create_future()
        self.heard = bytearray()
        self.sizes: list[tuple[int, int]] = []
        self._listener = listener
        if order.argv == ("absent",):
            error = GuestError(type="NotFound", message="there is no program absent")
            loop.call_soon(self.exited.set_result, GuestExit(code=127, error=error))
        else:
            loop.call_soon(listener.data, Stream.STDERR, b"ready\n")

    async def send(self, stream: int, data: bytes) -> None:
        assert stream == Stream.STDIN
        self._listener.data(Stream.STDOUT, data.upper())

    def end(self, stream: int) -> None:
        self._finish(3)

    def signal(self, number: int) -> None:
        self._finish(-number)

    def kill(self) -> None:
        self._finish(-9)

    def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    def consumed(self, count: int) -> None: ...

    def _finish(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(GuestExit(code=code))


def open_programs(rig: Rig, vm_id: str) -> list[FakeChannel]:
    """Let programs run in this machine; they appear in the list."""
    opened: list[FakeChannel] = []

    def open_channel(order: ProgramOrder, listener: object) -> FakeChannel:
        opened.append(FakeChannel(order, listener))
        return opened[-1]

    cast("Any", rig.links[vm_id]).open = open_channel
    return opened


def client_of(rig: Rig) -> ControlClient:
    (owner,) = living_owners(rig.manager.config.directory / "run")
    assert owner == rig.manager.directory
    return ControlClient(owner / CONTROL)


async def test_everything_that_another_process_may_ask(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        client = client_of(rig)
        assert stat.S_IMODE(client.path.stat().st_mode) == 0o600
        assert await client.vms() == []
        vm_id = await rig.manager.start_vm(service())
        (view,) = await client.vms()
        assert view == rig.manager.get_vm(vm_id)
        await client.ask(PauseOne(vm=vm_id), type(None))
        assert rig.manager.get_vm(vm_id).state is VmState.PAUSED
        with pytest.raises(Conflict, match="is paused") as caught:
            async with client.program(RunProgram(vm=vm_id, argv=("ps",))):
                pytest.fail("it cannot run there")
        assert "vm resume" in (caught.value.hint or "")
        await client.ask(ResumeOne(vm=vm_id), type(None))
        name = await client.ask(SnapshotOne(vm=vm_id), str)
        fork = await client.ask(ForkOne(vm=name), str)
        assert {vm.id for vm in await client.vms()} == {vm_id, fork}
        await client.ask(StopOne(vm=fork), type(None))
        with pytest.raises(VmNotFound, match=fork):
            await client.ask(StopOne(vm=fork), type(None))
        assert "SnapshotTaken" in {event.type for event in await client.ask(ListEvents(), list[VmEvent])}


async def test_a_program_has_streams_a_size_and_an_exit_code(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, asyncio.timeout(DEADLINE):
        vm_id = await rig.manager.start_vm(service())
        opened = open_programs(rig, vm_id)
        request = RunProgram(vm=vm_id, argv=("sh",), terminal=True, rows=50, columns=132, environment={"TERM": "x"})
        async with client_of(rig).program(request) as program:
            assert (await program.read()).data == b"ready\n"
            await program.send(ProgramInput(size=(10, 20)))
            await program.send(ProgramInput(data=b"hello"))
            piece = await program.read()
            assert (piece.stream, piece.data) == (1, b"HELLO")
            await program.send(ProgramInput(end=True))
            assert (await program.read()).code == 3
        assert (opened[0].order.rows, opened[0].order.columns, opened[0].order.terminal) == (50, 132, True)
        assert opened[0].sizes == [(10, 20)]


async def test_signals_a_program_that_is_not_there_and_a_caller_who_hangs_up(tmp_path: Path) -> None:
    async with running(tmp_path) as rig, asyncio.timeout(DEADLINE):
        vm_id = await rig.manager.start_vm(service())
        opened = open_programs(rig, vm_id)
        client = client_of(rig)
        async with client.program(RunProgram(vm=vm_id, argv=("sleep",))) as program:
            await program.read()
            await program.send(ProgramInput(signal=15))
            assert (await program.read()).code == 143
        async with client.program(RunProgram(vm=vm_id, argv=("absent",))) as program:
            last = await program.read()
            assert (last.code, last.error) == (127, "there is no program absent")
        async with client.program(RunProgram(vm=vm_id, argv=("sleep",))) as program:
            await program.read()
        assert (await opened[-1].exited).code == -9


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b'{"op":"dance"}\n', b'{"op":"stop"}\n', b"\xff\xfe\n", b"[1]\n"])
async def test_what_it_cannot_read_it_refuses(tmp_path: Path, line: bytes) -> None:
    async with running(tmp_path) as rig:
        directory = os.open(rig.manager.directory, os.O_PATH)
        try:
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{CONTROL}")
        finally:
            os.close(directory)
        writer.write(line)
        answer = msgspec.json.decode(await reader.readline())
        assert answer["code"] == "invalid_request"
        writer.close()
        assert await client_of(rig).vms() == []  # it goes on


async def test_a_manager_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable, match="does not answer"):
        await ControlClient(tmp_path / CONTROL).vms()
    rig = Rig(tmp_path, make_config(tmp_path))
    await ControlServer(rig.manager, tmp_path / CONTROL).stop()  # before start


async def test_a_directory_deeper_than_a_socket_name_may_be_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    async with running(deep) as rig:
        assert await client_of(rig).vms() == []
