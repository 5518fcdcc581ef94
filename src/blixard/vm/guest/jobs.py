"""One job in the guest, from its order to the moment when nothing of it is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any  # decoded JSON

from blixard.backends.packets import InvalidPacket, PacketReader, close_all, send_packet
from blixard.vm.guest.channels import Inlet, Outlet
from blixard.vm.guest.files import ChangedFiles, FilePlacer
from blixard.vm.guest.orders import OUTPUT_TAGS
from blixard.vm.guest.protocol import CHUNK_BYTES, KILL, WINDOW, Kind, Malformed, PacketJoiner, Stream, packed
from blixard.vm.guest.runner import Bind, encode_launch

if TYPE_CHECKING:
    from blixard.vm.guest.agent import Agent


class Job:
    """Takes its files, launches, passes its output on, and tells its end."""

    def __init__(self, agent: Agent, number: int, order: dict[str, Any]) -> None:
        self.agent = agent
        self.number = number
        self.outlet = Outlet(agent, number)
        self._order = order
        binds = order.get("binds", [])
        self._binds: list[dict[str, Any]] = binds
        own = frozenset(bind["name"] for bind in binds if bind.get("writable"))
        self._room = agent.take_room(is_fresh=bool(binds))
        self._placer: FilePlacer | None = FilePlacer(self._room.directory, own)
        self._changed = ChangedFiles(self._room.directory, own) if own else None
        self._back: Iterator[bytes] | None = None
        self._packets = PacketJoiner()
        self._early: list[bytes] = []
        self._is_launched = False
        self._is_wanted = True
        self._code: int | None = None
        self._error: dict[str, Any] | None = None
        self._left = int(order.get("max_output", 1 << 40))
        self._output_bytes = 0
        self._inlet: Inlet | None = None

    # -- what the host sends ------------------------------------------------------------------------------------------

    def take(self, kind: int, body: bytes) -> None:
        match kind:
            case Kind.DATA:
                self._take_data(body[0], body[1:])
            case Kind.END:
                self._take_end(body[0])
            case Kind.WINDOW:
                self.outlet.credit += WINDOW.unpack(body)[0]
                self.advance()
            case Kind.SIGNAL:
                self._take_signal(WINDOW.unpack(body)[0])

    def _take_data(self, stream: int, data: bytes) -> None:
        if stream == Stream.STDIN and self._inlet is not None:
            self._inlet.feed(data)
            return
        self.agent.port.send(Kind.WINDOW, self.number, WINDOW.pack(len(data)))
        if stream == Stream.FILES:
            self._take_files(data)
        elif stream == Stream.PACKET:
            for packet in self._packets.feed(data):
                self._take_packet(packet)
        elif stream != Stream.STDIN:
            raise Malformed(f"data of the stream {stream} for a job")

    def _take_files(self, data: bytes) -> None:
        if self._placer is None:
            return
        try:
            self._placer.feed(data)
        except OSError as error:
            self._placer.abandon()
            self._placer = None
            self._fail("FilesNotPlaced", f"the job's files cannot be put into the guest: {error}")

    def _take_packet(self, packet: bytes) -> None:
        if not self._is_launched:
            self._early.append(packet)
        elif self._room.channel is not None:
            self._send_packet(packet)

    def _send_packet(self, packet: bytes) -> None:
        assert self._room.channel is not None
        try:
            send_packet(self._room.channel, packet)
        except OSError as error:  # it ended before it was told; its end says the rest
            self.agent.note(f"a job's order was not taken: {error}")

    def _take_end(self, stream: int) -> None:
        if stream == Stream.FILES:
            self._launch()
        elif stream == Stream.STDIN and self._inlet is not None:
            self._inlet.end()

    def _take_signal(self, number: int) -> None:
        if number == KILL or not self._is_launched:
            self._is_wanted = False
            self._room.group.kill()
        else:
            self._room.signal(number)

    # -- the job ------------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        """All files are there: begin."""
        room = self._room
        if self._placer is None or not self._is_wanted:
            self._stay_unstarted()
            return
        self._placer.end()
        try:
            if self._changed is not None:
                self._changed.remember()
            if not room.pid:
                room.spawn([self._bind(bind) for bind in self._binds])
                self.agent.watch(room)
            room.limit(self._order["limits"], self._placer.bytes_written)
        except OSError as error:
            self._fail("RoomFailed", f"the job's place in the guest cannot be made: {error}")
            self._stay_unstarted()
            return
        self._listen()
        self._is_launched = True
        self.agent.children[room.pid] = self._ended
        launch = encode_launch(self._order["entry"], self._order.get("argv", []), self._order.get("environment", {}))
        self.agent.port.send(Kind.EVENT, self.number, b'{"event":"started"}')
        for packet in (launch, *self._early):
            self._send_packet(packet)
        self._early.clear()
        if room.status is not None:  # its runner died while it waited
            self._ended(room.status)
            self.advance()

    def _bind(self, bind: dict[str, Any]) -> Bind:
        return Bind(f"{self._room.directory}/binds/{bind['name']}", bind["path"], bool(bind.get("writable")))

    def _listen(self) -> None:
        room = self._room
        assert room.channel is not None
        self._inlet = Inlet(self.agent, self.number, room.descriptors.pop("stdin"))
        room.channel.setblocking(True)  # sending an order may wait for a moment; reading is hasty
        reader = PacketReader(room.channel, is_hasty=True)
        self.outlet.listen(room.channel.fileno(), lambda: self._read_packet(reader))
        self.outlet.listen(room.descriptors["stdout"], lambda: self._read(Stream.STDOUT, room.descriptors["stdout"]))
        self.outlet.listen(room.descriptors["stderr"], lambda: self._read(Stream.STDERR, room.descriptors["stderr"]))

    def _stay_unstarted(self) -> None:
        """Nothing of the job has run, or ever will."""
        room = self._room
        self._code = -KILL
        if room.pid and room.status is None:
            room.group.kill()
            self.agent.children.pop(room.pid, None)
            os.waitpid(room.pid, 0)
        self.advance()

    def _fail(self, kind: str, message: str) -> None:
        if self._error is None:
            self._error = {"type": kind, "message": message}

    # -- what the job sends -------------------------------------------------------------------------------------------

    def _read(self, stream: int, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, CHUNK_BYTES)
        except BlockingIOError:
            return self._code is None or not self._room.group.is_empty()
        self._write(stream, data)
        return bool(data)

    def _write(self, stream: int, data: bytes) -> None:
        """Send output up to the cap; count all of it."""
        self._output_bytes += len(data)
        data = data[: self._left]
        self._left -= len(data)
        self.outlet.send(stream, data)

    def _read_packet(self, reader: PacketReader) -> bool:
        try:
            received = reader.receive()
        except BlockingIOError:
            return self._code is None or not self._room.group.is_empty()
        except InvalidPacket as error:
            self._misused(str(error))
            return False
        if received is None:
            return False
        packet, descriptors = received
        close_all(descriptors)
        if packet[:1] and packet[0] in OUTPUT_TAGS:
            self._write(Stream.STDOUT if packet[0] == OUTPUT_TAGS[0] else Stream.STDERR, bytes(packet[1:]))
        else:
            self.outlet.send(Stream.PACKET, packed(bytes(packet)))
        return True

    def _misused(self, why: str) -> None:
        """What speaks in the channel is not our code: the job has got hold of it. End it."""
        self._error = {"type": "ChannelMisused", "message": why, "is_fault_of_job": True}
        self._room.group.kill()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _ended(self, status: int) -> None:
        self._code = os.waitstatus_to_exitcode(status)
        if not self._room.group.is_empty():
            self._room.group.kill()

    def advance(self) -> None:
        """Go on as far as possible; called when anything has changed."""
        self.outlet.push()
        self.outlet.arrange()
        if self._code is None or not self._room.group.is_empty() or not self.outlet.drain():
            return
        if self._changed is not None and not self._send_back():
            return
        self._tell_end()

    def _send_back(self) -> bool:
        """Send changed files as long as there is credit; say whether all is sent."""
        assert self._changed is not None
        if self._back is None:
            self._back = self._changed.stream() if self._is_launched else iter(())
        while self.outlet.is_open:
            piece = next(self._back, None)
            if piece is None:
                return self.outlet.is_empty
            self.outlet.send(Stream.FILES, piece)
        return False

    def _tell_end(self) -> None:
        room = self._room
        end: dict[str, Any] = {"event": "exited", "code": self._code, "output_bytes": self._output_bytes}
        end["out_of_memory"] = room.group.was_out_of_memory()
        if self._error is not None:
            end["error"] = self._error
        self.agent.tell(self.number, end)
        if self._inlet is not None:
            self._inlet.close()
        if self._placer is not None:
            self._placer.abandon()
        room.close()
        room.clear()
        self.agent.jobs_done += 1
        self.agent.close_channel(self.number)

    def abandon(self) -> None:
        """The host is gone: end it, tell nobody."""
        self.outlet.drop()
        self._changed = None
        if not self._is_launched:
            self._stay_unstarted()
        else:
            self._room.group.kill()
