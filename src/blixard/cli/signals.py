"""Ctrl-C and its like: the first asks for an orderly end, the second leaves at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\033[?25h"


class Interrupt:
    """Set once by the first signal; ``exit_code`` is 128 plus its number."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.exit_code = 0

    def receive(self, number: int) -> None:
        if self.exit_code:
            leave_at_once(128 + number)
        self.exit_code = 128 + number
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


@contextmanager
def catch_signals() -> Iterator[Interrupt]:
    """Direct the signals of this process to an ``Interrupt`` for a while. Only in the main thread.

    What our caller told us to ignore (`nohup`, a job in the background of a script) stays ignored.
    """
    loop = asyncio.get_running_loop()
    interrupt = Interrupt()
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in numbers:
        loop.add_signal_handler(number, interrupt.receive, number)
    try:
        yield interrupt
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def leave_at_once(code: int) -> None:
    """End the process now: child workers die with it, and what they held is known to be free."""
    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
        sys.stderr.flush()
    os._exit(code)
