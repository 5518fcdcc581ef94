from __future__ import annotations

import asyncio
import subprocess
import sys
import time

from blixard.vm.hypervisor.idleness import QUIET_WINDOWS, WINDOW_SECONDS, wait_until_idle, wanted_seconds

BUSY = """
import sys, time
end = time.process_time() + float(sys.argv[1])
while time.process_time() < end:
    pass
print("done", flush=True)
sys.stdin.read()
"""


def start(busy_seconds: float) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", BUSY, str(busy_seconds)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_a_busy_process_is_waited_for() -> None:
    with await asyncio.to_thread(start, 1.5) as process:
        await wait_until_idle(process.pid, 60)
        assert wanted_seconds(process.pid) > 1.4
        process.kill()


async def test_patience_comes_to_an_end() -> None:
    with await asyncio.to_thread(start, 60.0) as process:
        begun = time.monotonic()
        await wait_until_idle(process.pid, 0.5)
        assert 0.5 <= time.monotonic() - begun < 30
        process.kill()


async def test_a_process_that_is_gone_is_idle() -> None:
    begun = time.monotonic()
    await wait_until_idle(2**22 + 1, 60)
    assert time.monotonic() - begun < 30
    assert time.monotonic() - begun >= QUIET_WINDOWS * WINDOW_SECONDS
