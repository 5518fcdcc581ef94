"""The host's end of the link, against an agent that says whatever a test wants."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any  # decoded JSON

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blixard.errors import MachineLost, WrongPhase
from blixard.vm.agent_link import (
    MAX_CHANNELS,
    AgentLink,
    Channel,
    JobOrder,
    Program,
    ProgramOrder,
    connect,
    fresh_identity,
    run_program,
)
from blixard.vm.guest.protocol import (
    MAX_TO_GUEST_BYTES,
    MAX_TO_HOST_BYTES,
    VERSION,
    WINDOW,
    WINDOW_BYTES,
    FrameReader,
    Kind,
    Stream,
    frame,
)

DEADLINE = 20.0


class Agent:
    """The guest's end, in a test's hands."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = FrameReader(MAX_TO_GUEST_BYTES)
        self._heard: list[tuple[int, int, bytes]] = []

    async def hear(self) -> tuple[int, int, bytes]:
        async with asyncio.timeout(DEADLINE):
            while not self._heard:
                data = await self.reader.read(65536)
                assert data, "the host hung up"
                self._heard.extend(self._frames.feed(data))
        return self._heard.pop(0)

    async def hear_request(self) -> dict[str, Any]:
        kind, number, body = await self.hear()
        assert (kind, number) == (Kind.REQUEST, 0)
        found: dict[str, Any] = json.loads(body)
        return found

    def say(self, kind: int, number: int, body: bytes | dict[str, Any] = b"") -> None:
        self.writer.write(frame(kind, number, body if isinstance(body, bytes) else json.dumps(body).encode()))

    async def answer(self, **fields: Any) -> dict[str, Any]:
        request = await self.hear_request()
        self.say(Kind.REPLY, 0, {"id": request["id"], **fields})
        return request


class Ears:
    """A listener that keeps what it hears; ``takes`` False: it does not consume."""

    def __init__(self, *, takes: bool = True) -> None:
        self.is_started = False
        self.heard: list[tuple[int, bytes]] = []
        self._takes = takes

    def started(self) -> None:
        self.is_started = True

    def data(self, stream: int, data: bytes) -> bool:
        self.heard.append((stream, data))
        return self._takes


class World:
    def __init__(self, link: AgentLink, agent: Agent) -> None:
        self.link, self.agent = link, agent

    async def open(self, ears: Ears | None = None) -> Channel:
        channel = self.link.open(JobOrder(entry="python"), ears or Ears())
        kind, number, _ = await self.agent.hear()
        assert (kind, number) == (Kind.OPEN, channel.number)
        return channel

    async def cause(self) -> str:
        async with asyncio.timeout(DEADLINE):
            return await self.link.lost


async def make_world() -> World:
    ours, theirs = socket.socketpair()
    link = AgentLink(*await asyncio.open_unix_connection(sock=ours))
    agent = Agent(*await asyncio.open_unix_connection(sock=theirs))
    link.start()
    return World(link, agent)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = await make_world()
    yield made
    await made.link.close()
    made.agent.writer.close()


async def test_it_greets_and_reseeds(world: World) -> None:
    greeting = asyncio.create_task(world.link.greet())
    assert (await world.agent.answer(version=VERSION, python="3.11"))["op"] == "hello"
    assert (await greeting).python == "3.11"
    reseeding = asyncio.create_task(world.link.reseed(fresh_identity("vm-1")))
    request = await world.agent.answer()
    await reseeding
    assert request["op"] == "reseed"
    assert request["host_name"] == "vm-1"
    assert len(bytes.fromhex(request["seed"])) >= 64
    assert request["time_ns"] > 1_700_000_000 * 10**9


async def test_two_identities_differ() -> None:
    assert fresh_identity("a").machine_id != fresh_identity("a").machine_id


async def test_another_version_is_refused(world: World) -> None:
    greeting = asyncio.create_task(world.link.greet())
    await world.agent.answer(version=VERSION + 1)
    with pytest.raises(MachineLost, match="version"):
        await greeting
    with pytest.raises(MachineLost):
        world.link.check()


async def test_no_answer_within_the_time_leaves_the_link_as_it_is(world: World) -> None:
    with pytest.raises(MachineLost, match="'ping'"):
        await world.link.ping(0.05)
    late = await world.agent.hear_request()
    world.agent.say(Kind.REPLY, 0, {"id": late["id"]})
    pinging = asyncio.create_task(world.link.ping())
    await world.agent.answer()
    await pinging
    assert not world.link.lost.done()


async def test_a_job_from_order_to_end(world: World) -> None:
    ears = Ears()
    channel = await world.open(ears)
    agent = world.agent
    agent.say(Kind.EVENT, channel.number, {"event": "started"})
    agent.say(Kind.DATA, channel.number, bytes([Stream.STDOUT]) + b"hello")
    agent.say(Kind.EVENT, channel.number, {"event": "exited", "code": 3})
    agent.say(Kind.CLOSED, channel.number)
    async with asyncio.timeout(DEADLINE):
        assert (await channel.exited).code == 3
        await channel.closed
    assert ears.is_started
    assert ears.heard == [(Stream.STDOUT, b"hello")]


async def test_sending_stops_at_the_window_until_the_guest_returns_some(world: World) -> None:
    channel = await world.open()
    sending = asyncio.create_task(channel.send(Stream.FILES, bytes(WINDOW_BYTES + 10)))
    got = 0
    while got < WINDOW_BYTES:
        _, _, body = await world.agent.hear()
        got += len(body) - 1
    assert got == WINDOW_BYTES
    assert not sending.done()
    world.agent.say(Kind.WINDOW, channel.number, WINDOW.pack(10))
    _, _, body = await world.agent.hear()
    assert len(body) == 11
    async with asyncio.timeout(DEADLINE):
        await sending


async def test_what_is_consumed_is_returned_to_the_guest(world: World) -> None:
    channel = await world.open()
    for _ in range(WINDOW_BYTES // 2 // 1024):
        world.agent.say(Kind.DATA, channel.number, bytes([Stream.STDOUT]) + bytes(1024))
    kind, number, body = await world.agent.hear()
    assert (kind, number) == (Kind.WINDOW, channel.number)
    assert WINDOW.unpack(body)[0] == WINDOW_BYTES // 2


async def test_a_guest_that_sends_beyond_its_window_is_lost(world: World) -> None:
    ears = Ears(takes=False)
    channel = await world.open(ears)
    for _ in range(WINDOW_BYTES // 1024 + 1):
        world.agent.say(Kind.DATA, channel.number, bytes([Stream.STDOUT]) + bytes(1024))
    assert "protocol" in await world.cause()
    assert sum(len(data) for _, data in ears.heard) == WINDOW_BYTES
    with pytest.raises(MachineLost):
        await channel.exited


BREACHES: list[tuple[str, list[tuple[int, int, bytes]]]] = [
    ("unknown channel", [(Kind.DATA, 77, b"\x01x")]),
    ("a reply nobody asked for", [(Kind.REPLY, 0, b'{"id":12345}')]),
    ("a reply that is no JSON", [(Kind.REPLY, 0, b"\xff")]),
    ("an event on the link", [(Kind.EVENT, 0, b"{}")]),
    ("a host's frame", [(Kind.OPEN, 1, b"{}")]),
    ("empty data", [(Kind.DATA, 1, b"\x01")]),
    ("data without a stream", [(Kind.DATA, 1, b"")]),
    ("an unknown stream", [(Kind.DATA, 1, b"\x09x")]),
    ("started twice", [(Kind.EVENT, 1, b'{"event":"started"}')] * 2),
    ("an unknown event", [(Kind.EVENT, 1, b'{"event":"danced"}')]),
    ("an exit without a code", [(Kind.EVENT, 1, b'{"event":"exited"}')]),
    ("exited twice", [(Kind.EVENT, 1, b'{"event":"exited","code":0}')] * 2),
    ("data after the exit", [(Kind.EVENT, 1, b'{"event":"exited","code":0}'), (Kind.DATA, 1, b"\x01x")]),
    ("closed before it exited", [(Kind.CLOSED, 1, b"")]),
    ("a window larger than the first", [(Kind.WINDOW, 1, WINDOW.pack(1))]),
    ("a window without a size", [(Kind.WINDOW, 1, b"")]),
]


@pytest.mark.parametrize(("what", "frames"), BREACHES, ids=[what for what, _ in BREACHES])
async def test_a_breach_of_the_protocol_loses_the_machine_and_nothing_else(
    world: World, what: str, frames: list[tuple[int, int, bytes]]
) -> None:
    channel = await world.open()
    assert channel.number == 1
    for item in frames:
        world.agent.say(*item)
    assert "protocol" in await world.cause(), what
    with pytest.raises(MachineLost):
        world.link.check()


async def test_a_frame_over_the_limit_is_refused(world: World) -> None:
    world.agent.say(Kind.REPLY, 0, bytes(MAX_TO_HOST_BYTES + 1))
    assert str(MAX_TO_HOST_BYTES) in await world.cause()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.binary(max_size=100), st.sampled_from([frame(*f) for _, fs in BREACHES for f in fs]))))
def test_whatever_a_guest_sends_the_host_hears_a_cause(pieces: list[bytes]) -> None:
    async def play() -> None:
        world = await make_world()
        channel = await world.open()
        for piece in pieces:
            world.agent.writer.write(piece)
        world.agent.writer.close()
        assert await world.cause()
        assert channel.exited.done()
        await world.link.close()

    asyncio.run(play())


async def test_an_agent_that_hangs_up_ends_everything_that_waits(world: World) -> None:
    channel = await world.open()
    pinging = asyncio.create_task(world.link.ping())
    sending = asyncio.create_task(channel.send(Stream.STDIN, bytes(2 * WINDOW_BYTES)))
    await world.agent.hear()
    world.agent.writer.close()
    for task in (pinging, sending, channel.exited, channel.closed):
        with pytest.raises(MachineLost):
            async with asyncio.timeout(DEADLINE):
                await task


async def test_no_more_channels_than_the_limit(world: World) -> None:
    for _ in range(MAX_CHANNELS):
        world.link.open(JobOrder(entry="python"), Ears())
    with pytest.raises(WrongPhase, match=str(MAX_CHANNELS)):
        world.link.open(JobOrder(entry="python"), Ears())


async def test_a_program_s_output_is_returned_only_as_it_is_read(world: World) -> None:
    program = Program(world.link, ProgramOrder(argv=("cat",)))
    await world.agent.hear()
    for _ in range(WINDOW_BYTES // 2 // 1024):
        world.agent.say(Kind.DATA, program.channel.number, bytes([Stream.STDOUT]) + bytes(1024))
    async with asyncio.timeout(DEADLINE):
        for _ in range(WINDOW_BYTES // 2 // 1024):
            piece = await program.read()
            assert piece is not None
    assert (await world.agent.hear())[0] == Kind.WINDOW


async def test_a_program_is_run_to_its_end(world: World) -> None:
    running = asyncio.create_task(run_program(world.link, ("true",), stdin=b"in"))
    kinds = [(await world.agent.hear())[0] for _ in range(3)]
    assert kinds == [Kind.OPEN, Kind.DATA, Kind.END]
    world.agent.say(Kind.DATA, 1, bytes([Stream.STDERR]) + b"oh")
    world.agent.say(Kind.EVENT, 1, {"event": "exited", "code": 1})
    async with asyncio.timeout(DEADLINE):
        end, out, err = await running
    assert (end.code, out, err) == (1, b"", b"oh")


async def test_connecting_gives_up_with_the_cause_when_the_agent_is_dead() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(MachineLost):
        await connect(lambda: asyncio.open_unix_connection(sock=ours))


async def test_closing_is_harmless_at_any_time(world: World) -> None:
    await world.link.close()
    await world.link.close()
    with pytest.raises(MachineLost):
        await world.link.ping()
