"""Why a machine ended, in words."""

from __future__ import annotations

import re
import signal
from pathlib import Path

_PANIC = re.compile(r"Kernel panic - not syncing: ([^\n]{1,200})")
_MAX_COMPLAINT = 500
_STATUS_OF_SIGNAL = 128


def count_oom_kills() -> int:
    """Return how many processes the host's kernel has killed for lack of memory since it started; 0 if it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except OSError:
        pass
    return 0


def explain_end(status: int, *, console: str, complaint: str, oom_kills: int) -> str:
    """Return the cause of an end that we did not bring about.

    ``status`` is bubblewrap's: a signal's number negative or above 128; ``oom_kills``: how many the kernel killed meanwhile.
    """
    number = -status if status < 0 else status - _STATUS_OF_SIGNAL
    if number in {sign.value for sign in signal.Signals}:
        return _explain_signal(number, oom_kills)
    panics: list[str] = _PANIC.findall(console)
    if panics:
        return f"kernel panic: {panics[-1].strip()}"
    if status == 0:
        return "guest shut down"
    return f"QEMU failed: {_last_words(complaint) or f'exit code {status}'}"


def _explain_signal(number: int, oom_kills: int) -> str:
    if number == signal.SIGKILL and oom_kills:
        return f"killed by signal {number}: the host ran out of memory"
    if number == signal.SIGSYS:
        return f"killed by signal {number}: QEMU made a forbidden system call"
    return f"killed by signal {number}"


def _last_words(complaint: str) -> str:
    lines = [line for line in complaint.splitlines() if line.strip() and "warning:" not in line]
    return " ".join(lines)[-_MAX_COMPLAINT:]
