"""The backend's side of the zygote: starts it, sends it requests, and notices its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from blixard.backends.packets import packet_pair, send_packet
from blixard.backends.zygote.messages import READY, Launch, Role, SpawnRequest, encode
from blixard.errors import NotSupportedHere

START_SECONDS = 60.0
"""Within which a zygote must be ready. Usually a tenth of a second; a swapping machine takes longer."""
STOP_SECONDS = 10.0
_LAUNCH = Path(__file__).with_name("launch.py")
_PASSED_ON = ("LD_LIBRARY_PATH",)
"""Without which some interpreters do not start. Everything else of the worker's environment stays with the worker."""


class ZygoteClient:
    """One zygote process. ``on_end`` is called once when it has ended without ``stop``."""

    def __init__(self, *, lock_fd: int | None, on_end: Callable[[], None]) -> None:
        self._lock_fd = lock_fd
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process and wait until it can fork. Raises ``NotSupportedHere`` if it cannot."""
        loop = asyncio.get_running_loop()
        control, its_end = packet_pair()
        self._control = control
        control.setblocking(False)
        with its_end:
            self._process = self._popen(its_end.fileno())
        self._ready = loop.create_future()
        loop.add_reader(control, self._hear)
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._ready
        except BaseException:
            await self.stop()
            raise

    def _popen(self, control: int) -> subprocess.Popen[bytes]:
        inherited = [control] if self._lock_fd is None else [control, self._lock_fd]
        words = [sys.executable, "-I", "-X", "utf8", str(_LAUNCH), str(control), str(os.getpid())]
        return subprocess.Popen(
            [*words, *map(str, inherited[1:])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=inherited,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"} | {n: os.environ[n] for n in _PASSED_ON if n in os.environ},
            cwd="/",
        )

    def spawn(self, launch: Launch, descriptors: Mapping[Role, int]) -> None:
        """Ask for a runner. Raises ``BlockingIOError`` when too many requests wait, ``ConnectionError`` when the zygote has ended."""
        if self._control is None:
            raise ConnectionResetError("the zygote has ended")
        request = SpawnRequest(tuple(descriptors), launch)
        send_packet(self._control, encode(request), tuple(descriptors.values()))

    async def stop(self) -> None:
        """End the zygote and with it all that it forked; returns when it is gone."""
        self._close()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _hear(self) -> None:
        assert self._control is not None
        with contextlib.suppress(BlockingIOError):
            try:
                message = self._control.recv(64)
            except ConnectionError:
                message = b""
            if message == READY:
                self._resolve(None)
            elif not message:
                self._lose()

    def _lose(self) -> None:
        was_ready = self._ready is not None and self._ready.done()
        self._close()
        self._resolve(
            NotSupportedHere("the process that jobs are forked from could not start", hint="run `blixard doctor`")
        )
        if was_ready:
            self._on_end()

    def _resolve(self, error: Exception | None) -> None:
        if self._ready is None or self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)

    def _close(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
