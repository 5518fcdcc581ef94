"""One attempt on one machine: sends the job, hears it, ends it when it must end early."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from blixard.backends.contract import BackendSettings, Execution, ExecutionObserver, StopReason
from blixard.backends.contract import Stream as OutputStream
from blixard.backends.microvm.files import ReturnedFiles
from blixard.backends.microvm.plan import JobPlan
from blixard.backends.outcomes import now
from blixard.backends.wasm.wire import RunReport, decode_report
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import CommandPayload, WasmPayload
from blixard.errors import MachineLost
from blixard.vm.agent_link import Channel, GuestExit
from blixard.vm.guest.orders import ANSWER_TAG, FAILURE_TAG, decode_failure, decode_python_answer
from blixard.vm.guest.protocol import MAX_PACKET_BYTES, Malformed, PacketJoiner, Stream, packed
from blixard.vm.lease import VmLease

KILL_SECONDS = 30.0
"""After which a guest that was told to kill a job, or to clear up behind it, counts as hung."""
SETUP_SECONDS = 120.0
"""For the guest to take the job and begin it, besides the time that its files need."""
SLOWEST_BYTES_PER_SECOND = 1024 * 1024
CAUSE_SECONDS = 2.0
"""A broken link is heard at once; what became of the machine a moment later."""
STDIN_CHUNK = 128 * 1024
_T = TypeVar("_T")
_STREAMS = {Stream.STDOUT: OutputStream.STDOUT, Stream.STDERR: OutputStream.STDERR}


class Run:
    """Create, ``run`` once. ``stop`` may be called at any time."""

    def __init__(
        self,
        execution: Execution,
        observer: ExecutionObserver,
        plan: JobPlan,
        lease: VmLease,
        settings: BackendSettings,
    ) -> None:
        self.ending: OutcomeKind | None = None
        """Why it is being ended early."""
        self.started_at: int | None = None
        self.output_bytes = 0
        self.packets: list[bytes] = []
        self.is_broken = False
        """What speaks for the job is not our code any more."""
        self.trouble_with_files = ""
        """Why what the job wrote could not be put where it was granted."""
        self._execution = execution
        self._observer = observer
        self._plan = plan
        self._lease = lease
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._left = execution.spec.max_output_bytes
        self._joiner = PacketJoiner(MAX_PACKET_BYTES)
        self._channel: Channel | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._abandoned: asyncio.Future[str] = self._loop.create_future()
        self._files = ReturnedFiles(plan.returned) if plan.returned else None
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def run(self) -> GuestExit:
        """Return how the job ended, when nothing of it runs in the guest any more. Raises ``MachineLost``."""
        self._channel = channel = self._lease.link.open(self._plan.order, self)
        self._hang_after(SETUP_SECONDS + self._plan.parcel.size / SLOWEST_BYTES_PER_SECOND, "has not begun the job")
        if self.ending is not None:
            channel.kill()
        helpers = [asyncio.create_task(self._send(), name="send a job")]
        if self._files is not None:
            helpers.append(asyncio.create_task(self._write_files(self._files), name="write a job's files"))
        try:
            end = await self._wait_for(channel.exited)
            if self._files is not None:
                self._pieces.put_nowait(None)
                await helpers[-1]
            return end
        finally:
            for timer in self._timers:
                timer.cancel()
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            if self._files is not None:
                self._files.close()

    async def clear(self) -> None:
        """Return when nothing of the job is left in the guest. Raises ``MachineLost``."""
        assert self._channel is not None
        self._hang_after(KILL_SECONDS, "has not cleared up behind a job")
        try:
            await self._wait_for(self._channel.closed)
        finally:
            for timer in self._timers:
                timer.cancel()

    def stop(self, reason: StopReason) -> None:
        """Somebody wants its end."""
        if reason is StopReason.CANCEL and self.ending is None:
            self.ending = OutcomeKind.CANCELLED
            if self.started_at is None:
                self._kill()
            elif self._channel is not None:
                self._channel.signal(signal.SIGTERM)
                self._timers.append(self._loop.call_later(self._settings.grace_seconds, self._kill))
        elif reason is StopReason.KILL:
            self.ending = OutcomeKind.LOST
            self._kill()

    # -- what the guest says ------------------------------------------------------------------------------------------

    def started(self) -> None:
        self.started_at = now()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._observer.started(self.started_at)
        timeout = self._execution.spec.timeout
        if timeout is not None:
            self._timers.append(self._loop.call_later(timeout, self._time_out))

    def data(self, stream: int, data: bytes) -> bool:
        if stream in _STREAMS:
            self._pass_on(_STREAMS[stream], data)
        elif stream == Stream.PACKET:
            self._take_packets(data)
        else:
            self._pieces.put_nowait(data)
            return self._files is None
        return True

    def _pass_on(self, stream: OutputStream, data: bytes) -> None:
        self.output_bytes += len(data)
        data = data[: self._left]
        if data and not self._abandoned.done():
            self._left -= len(data)
            self._observer.output(now(), stream, data)

    def _take_packets(self, data: bytes) -> None:
        if self.is_broken:
            return
        for packet in self._joiner.feed(data):
            self.packets.append(packet)
            if len(self.packets) > 1 or not is_from_runner(self._execution, packet):
                self.break_off()
                return

    def break_off(self) -> None:
        """The job has got hold of its runner's channel: believe nothing more, and end it."""
        self.is_broken = True
        self._kill()

    # -- what the guest is told ---------------------------------------------------------------------------------------

    async def _send(self) -> None:
        """Send files, order and stdin. What goes wrong with the machine is heard elsewhere."""
        channel = self._channel
        assert channel is not None
        try:
            await self._send_all(channel, Stream.FILES, self._plan.parcel.stream())
            if self._plan.packet is not None:
                await channel.send(Stream.PACKET, packed(self._plan.packet))
            channel.end(Stream.FILES)
            if self._execution.stdin is not None:
                await self._send_all(channel, Stream.STDIN, _read(str(self._execution.stdin)))
            channel.end(Stream.STDIN)
        except MachineLost:
            return
        except OSError as error:
            self._abandon(f"a file of the job cannot be read: {error}")

    @staticmethod
    async def _send_all(channel: Channel, stream: int, pieces: Iterator[bytes]) -> None:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await channel.send(stream, piece)

    def _time_out(self) -> None:
        if self.ending is None:
            self.ending = OutcomeKind.TIMED_OUT
            self._kill()

    def _kill(self) -> None:
        if self._channel is not None:
            self._channel.kill()
            self._hang_after(KILL_SECONDS, "has not ended a job that it was told to kill")

    def _hang_after(self, seconds: float, what: str) -> None:
        self._timers.append(
            self._loop.call_later(seconds, self._abandon, f"the guest hangs: it {what} in {seconds:g} s")
        )

    def _abandon(self, cause: str) -> None:
        if not self._abandoned.done():
            self._abandoned.set_result(cause)

    async def _wait_for(self, end: asyncio.Future[_T]) -> _T:
        """Wait for the end, or for the machine's. Raises ``MachineLost``."""
        lost = self._lease.lost
        ends: set[asyncio.Future[_T] | asyncio.Future[str]] = {end, lost, self._abandoned}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if end.done() and end.exception() is None:
            return end.result()
        if self._abandoned.done():
            raise MachineLost(self._abandoned.result())
        if not lost.done():
            await asyncio.wait([lost], timeout=CAUSE_SECONDS)
        if lost.done():
            raise MachineLost(lost.result())
        return end.result()

    # -- files that come back -----------------------------------------------------------------------------------------

    async def _write_files(self, files: ReturnedFiles) -> None:
        assert self._channel is not None
        while (piece := await self._pieces.get()) is not None:
            if not self.trouble_with_files:
                try:
                    await asyncio.to_thread(files.feed, piece)
                except Malformed as error:
                    self._abandon(str(error))
                except OSError as error:
                    self.trouble_with_files = f"what the job wrote cannot be put where it was granted: {error}"
            self._channel.consumed(len(piece))


def is_from_runner(execution: Execution, packet: bytes) -> bool:
    """Say whether the packet is one that our code in the guest sends, or looks like it."""
    payload = execution.spec.payload
    try:
        if packet[:1] == FAILURE_TAG:
            decode_failure(packet[1:])
            return True
        if packet[:1] != ANSWER_TAG or isinstance(payload, CommandPayload):
            return False
        if isinstance(payload, WasmPayload):
            return isinstance(decode_report(packet[1:]), RunReport)
        decode_python_answer(packet[1:])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _read(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while data := file.read(STDIN_CHUNK):
            yield data
