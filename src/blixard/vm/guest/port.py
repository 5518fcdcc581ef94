"""The agent's port to the host: whole frames in, frames out as fast as the host takes them. Standard library only."""

from __future__ import annotations

import glob
import os

from blixard.vm.guest.protocol import MAX_PORT_WRITE, MAX_TO_GUEST_BYTES, Frame, FrameReader, frame

READ_BYTES = 64 * 1024
CONGESTED_BYTES = 256 * 1024
"""With so much unsent, nothing more is read from jobs."""


def open_port() -> int:
    """Return a descriptor of the virtio-serial port named for us, else of the only one."""
    places = glob.glob("/dev/virtio-ports/*agent*") or sorted(glob.glob("/dev/vport*p1"))
    if not places:
        raise SystemExit("there is no virtio-serial port in this guest")
    return os.open(places[0], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


class Port:
    """``is_muted`` while the agent talks to itself, to warm up."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_muted = False
        self._frames = FrameReader(MAX_TO_GUEST_BYTES)
        self._unsent = bytearray()

    @property
    def is_congested(self) -> bool:
        return len(self._unsent) > CONGESTED_BYTES

    def receive(self) -> list[Frame] | None:
        """Return the frames that are whole now; None: no host is connected. Raises ``Malformed``."""
        found: list[Frame] = []
        while True:
            try:
                data = os.read(self.descriptor, READ_BYTES)
            except BlockingIOError:
                return found
            if not data:
                return found or None
            found.extend(self._frames.feed(data))

    def send(self, kind: int, channel: int, body: bytes = b"") -> None:
        if not self.is_muted:
            self._unsent += frame(kind, channel, body)
            self.flush()

    def flush(self) -> None:
        """Send what the host takes now; the rest goes when it takes more."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self.descriptor, self._unsent[:MAX_PORT_WRITE])]
        except BlockingIOError:
            return

    def forget(self) -> None:
        """Begin anew: another host, or the same one again, knows nothing of what was said."""
        self._frames = FrameReader(MAX_TO_GUEST_BYTES)
        self._unsent.clear()
