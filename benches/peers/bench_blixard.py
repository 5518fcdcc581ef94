"""Blixard in a kit that measures job queues, under the kit's own rules: ``bench_blixard.py KIT_DIR -n 10000 --runs 3``.

A server process without a worker of its own stores the jobs; a worker with two slots drains them over HTTP; functions run at isolation
minimal and results are stored. Prints one JSON line as every other peer of the kit does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KIT = os.environ.get("PEERS_KIT") or (sys.argv.pop(1) if len(sys.argv) > 1 else "")
os.environ["PEERS_KIT"] = str(Path(KIT).resolve())
sys.path[:0] = [os.environ["PEERS_KIT"], str(HERE)]

import msgspec  # noqa: E402 - the kit's directory comes first
from _common import Peer, Store, free_port, main, wait_port  # type: ignore[import-not-found]  # noqa: E402 - the kit's

from blixard.bundling import Bundler  # noqa: E402 - see above
from blixard.client import Client, open_client  # noqa: E402 - see above
from blixard.config import AppConfig  # noqa: E402 - see above
from blixard.domain.job import NewJob  # noqa: E402 - see above
from blixard.domain.payload import FunctionPayload  # noqa: E402 - see above
from blixard.domain.requirements import Isolation, JobRequirements  # noqa: E402 - see above
from blixard.domain.spec import JobSpec  # noqa: E402 - see above
from blixard.protocol.jobs import SubmitRequest  # noqa: E402 - see above

PROGRAM = [sys.executable, "-m", "blixard"]


class Server(Store):  # type: ignore[misc]  # the kit has no types
    """``blixard serve`` on a fresh data directory."""

    settings = "SQLite WAL synchronous=FULL, group commit"

    def __init__(self, directory: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        data = ["--data-dir", f"{directory}/data"]
        command = [*PROGRAM, *data, "serve", "--no-worker", "--port", str(port)]
        with Path(f"{directory}/server.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.pid = self.process.pid
        wait_port(port)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class P(Peer):  # type: ignore[misc]  # the kit has no types
    """The kit's view of Blixard."""

    name, dists, store_class = "blixard", "blixard apsw msgspec", Server
    worker_note = "1 worker, 2 slots, isolation minimal, results stored"
    settings = "defaults"
    batch_note = "submit_many, 1000 a call"
    result_note = "client.result"
    child_env = {"PYTHONPATH": f"{os.environ['PEERS_KIT']}:{HERE}", "PEERS_KIT": os.environ["PEERS_KIT"]}  # noqa: RUF012 - the kit's way

    def setup(self) -> None:
        settings = AppConfig.load_with_layers({"server.url": self.store.url}).settings
        self.client = Client(lambda: open_client(settings))
        self.specs = {name: self.make_spec(name) for name in ("noop", "slow")}

    def make_spec(self, name: str) -> JobSpec:
        code = Bundler().bundle_reference(f"{HERE}/noop_jobs.py:{name}")
        assert code.bundle is not None  # it is no installed package
        digest = self.client.put_blob(code.bundle.archive)
        return JobSpec(
            name=name,
            payload=FunctionPayload(function=code.function, bundle=digest),
            requirements=JobRequirements(isolation=Isolation.MINIMAL),
            environment={"PEER_RUNLOG": os.environ["PEER_RUNLOG"]},
        )

    @staticmethod
    def job(number: int) -> NewJob:
        return NewJob(arguments=msgspec.Raw(b"[[%d],{}]" % number))

    def enqueue_one(self, i: int, fn: str = "noop") -> str:
        return self.client.submit(self.specs[fn], self.job(i))

    def enqueue_batch(self, ids: list[int]) -> None:
        self.client.submit_many(SubmitRequest(spec=self.specs["noop"], jobs=[self.job(i) for i in ids]))

    def wait_result(self, handle: str, i: int) -> None:
        assert self.client.result(handle, timeout=60).state == "completed", i

    def unfinished(self) -> int:
        return sum(n for state, n in self.client.stats().jobs.items() if not state.is_terminal)

    def workers(self) -> list[list[str]]:
        data = ["--data-dir", f"{self.dir}/worker"]
        return [[*PROGRAM, *data, "worker", "--server", self.store.url, "--slots", "2"]]

    def close(self) -> None:
        self.client.close()


if __name__ == "__main__":
    begun = time.monotonic()
    main(P)
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
