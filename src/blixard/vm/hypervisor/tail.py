"""The last words of a process: what it printed, bounded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

MAX_TAIL_BYTES = 16 * 1024
_READ_BYTES = 64 * 1024


class Tail:
    """Reads a pipe to its end on the event loop and keeps the last 16 KiB; whoever writes is never kept waiting for long."""

    def __init__(self, descriptor: int, ended: Callable[[], None]) -> None:
        """``descriptor`` is taken over; ``ended`` is called once every writer has closed its end."""
        self._descriptor = descriptor
        self._ended = ended
        self._kept = bytearray()
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    @property
    def text(self) -> str:
        """What was printed, with control characters taken out: the guest wrote it."""
        words = self._kept.decode(errors="replace").replace("\r\n", "\n")
        return "".join(sign for sign in words if sign == "\n" or sign.isprintable())

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def _read(self) -> None:
        try:
            part = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._close()
            return
        self._kept += part
        del self._kept[:-MAX_TAIL_BYTES]

    def _close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        self._ended()
