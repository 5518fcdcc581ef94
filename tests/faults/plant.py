"""Servers, workers and commands of the shipped program as processes that tests kill, pause and look after."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from blixard.client.blocking import Client
from blixard.client.http import HttpClient
from blixard.client.http_link import ServerAddress

PROGRAM = str(Path(sys.executable).parent / "blixard")
PATIENCE = 90.0
"""Seconds for anything that must happen, on a loaded machine."""
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 0.02


def until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait for something that other processes do; nothing rings for it."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(_LOOK_SECONDS)  # sleep: nothing rings for what other processes do


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def descendants(pid: int) -> list[psutil.Process]:
    """Return the living ones, parents before children."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def depth_below(process: psutil.Process, pid: int) -> int:
    """Return how many generations a process is below another one; 0 if it is not, or gone."""
    try:
        line = [parent.pid for parent in process.parents()]
    except psutil.NoSuchProcess:
        return 0
    return line.index(pid) + 1 if pid in line else 0


class Plant:
    """All processes of one test. Whatever they leave behind becomes our child, so that nothing gets out of sight."""

    def __init__(self, directory: Path, **settings: object) -> None:
        """``settings`` are variables without their prefix, such as ``leases__duration="2s"``."""
        self.directory = directory
        self.data_dir = directory / "data"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("BLIXARD_", "CONFIG_FILE"))}
        self.environment["BLIXARD_STORAGE__DATA_DIR"] = str(self.data_dir)
        self.environment |= {f"BLIXARD_{name.upper()}": str(value) for name, value in settings.items()}
        self._started: list[subprocess.Popen[bytes]] = []
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}
        self._clients: list[Client] = []

    def start(self, *arguments: str, name: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start the program. Its standard error goes to a file of the ``name``."""
        more = {f"BLIXARD_{key.upper()}": str(value) for key, value in settings.items()}
        with self._output(name, "err") as err, self._output(name, "out") as out:
            process = subprocess.Popen(
                [PROGRAM, *arguments], cwd=self.directory, env=self.environment | more,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def _output(self, name: str, kind: str) -> BinaryIO:
        number = len(self._started)
        return (self.directory / f"{number:03}-{name}.{kind}").open("wb")

    def serve(self, *options: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start the server and wait until it answers."""
        process = self.start("serve", "--port", str(self.port), *options, name="serve", **settings)
        until(lambda: self.answers() or process.poll() is not None, "the server answers")
        assert process.poll() is None, self.said()
        return process

    def work(self, name: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start a worker for the server, with a data directory of its own: it could be on another machine."""
        elsewhere = {"storage__data_dir": self.directory / f"worker-{name}", "worker__name": name}
        return self.start("worker", "--server", self.url, name=name, **(elsewhere | settings))

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
            return True
        return False

    def client(self) -> Client:
        client = Client(lambda: HttpClient(ServerAddress(url=self.url)))
        self._clients.append(client)
        return client

    def said(self) -> str:
        """Return all that our programs wrote to standard error."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.directory.glob("*.err")))

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """Ask it to end and return its exit code."""
        process.send_signal(signal.SIGTERM)
        return process.wait(PATIENCE)

    def left_behind(self) -> list[psutil.Process]:
        """Return the living processes that our programs have left."""
        found = [p for p in psutil.Process().children(recursive=True) if p.pid not in self._before]
        known = {process.pid for process in self._started}
        for process in found:
            if process.pid not in known and not is_alive(process):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
        return [process for process in found if is_alive(process)]

    def check_nothing_left(self) -> None:
        until(lambda: not self.left_behind(), "no process of ours is left", 30.0)

    def check_no_traceback(self) -> None:
        assert "Traceback" not in self.said(), self.said()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for process in self.left_behind():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for started in self._started:
            started.wait(PATIENCE)
        until(lambda: not self.left_behind(), "what was left is gone")


@contextlib.contextmanager
def plant(directory: Path, **settings: object) -> Iterator[Plant]:
    """Yield a plant; show what its programs said if the test fails, and end them all."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    made = Plant(directory, **settings)
    try:
        yield made
    except BaseException:
        sys.stderr.write(made.said()[-20_000:])
        raise
    finally:
        made.close()
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
