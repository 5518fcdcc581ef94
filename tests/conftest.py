"""For all tests: a fresh session's signals, whatever started us.

A shell that puts a command into the background has it ignore SIGINT, and nohup SIGHUP; programs that the tests start would inherit that.
"""

from __future__ import annotations

import signal

for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)
