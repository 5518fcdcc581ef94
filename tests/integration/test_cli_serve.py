"""`blixard serve` and `blixard worker` as a person starts and stops them."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_cli import LOOP, PATIENCE, SCRIPT, Terminal, finish, read_line


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    terminal.write("script.py", SCRIPT)
    yield terminal
    terminal.close()


def serve(terminal: Terminal, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    process = terminal.start("serve", "--port", "0", *options)
    line = read_line(process)
    assert line.startswith("listening on http://127.0.0.1:"), (line, process.poll())
    return process, line.split()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_runs_jobs_and_stops_cleanly(terminal: Terminal, number: signal.Signals) -> None:
    process, url = serve(terminal)
    done = terminal.run("--server", url, "run", "--isolation", "minimal", "script.py", "--", "4")
    assert (done.code, done.out) == (4, "out 4\n")
    # Without --server the data directory leads to its server.
    here = terminal.run("run", "--isolation", "minimal", "script.py", "--", "5")
    assert (here.code, here.out) == (5, "out 5\n")
    assert len(json.loads(terminal.run("--server", url, "jobs", "--json").out)) == 2
    process.send_signal(number)
    assert finish(process).code == 0


def test_a_second_server_is_refused_by_directory_and_by_port(terminal: Terminal, tmp_path: Path) -> None:
    _, url = serve(terminal, "--no-worker")
    same_directory = terminal.run("serve", "--port", "0")
    assert (same_directory.code, same_directory.out) == (2, "")
    assert "another server owns" in same_directory.err
    other = terminal.run("--data-dir", str(tmp_path / "other"), "serve", "--port", url.rpartition(":")[2])
    assert (other.code, other.out) == (2, "")
    assert url.rpartition(":")[2] in other.err
    assert "Traceback" not in same_directory.err + other.err


def test_a_worker_works_for_a_server_that_has_none(terminal: Terminal) -> None:
    _, url = serve(terminal, "--no-worker")
    submitted = terminal.run("--server", url, "submit", "--isolation", "minimal", "script.py", "--", "0")
    assert "no worker is online" in submitted.err
    job_id = submitted.out.strip()
    assert "worker" in terminal.run("--server", url, "why", job_id).out
    following = terminal.start("--server", url, "logs", "-f", job_id)
    worker = terminal.start("worker", "--server", url, "--type", "process", "--slots", "2")
    assert finish(following).out == "out 0\n"
    workers = json.loads(terminal.run("--server", url, "workers", "--json").out)
    assert [(item["state"], item["offer"]["slots"]) for item in workers] == [("online", 2)]
    worker.send_signal(signal.SIGTERM)
    assert finish(worker).code == 0


def test_a_server_others_can_reach_needs_a_token_first(terminal: Terminal) -> None:
    refused = terminal.run("serve", "--port", "0", "--host", "0.0.0.0")
    assert (refused.code, refused.out) == (2, "")
    assert "blixard token create" in refused.err
    token = terminal.run("token", "create", "me", "--scope", "admin").out.strip()
    process, url = serve(terminal, "--no-worker")
    terminal.environment["BLIXARD_TOKEN"] = token
    assert terminal.run("--server", url, "jobs", "--json").out == "[]\n"
    terminal.environment["BLIXARD_TOKEN"] = "blx_wrong"
    wrong = terminal.run("--server", url, "jobs", "--json")
    assert (wrong.code, wrong.out) == (2, "")
    process.terminate()
    process.wait(timeout=PATIENCE)


def test_a_run_that_loses_its_server_names_the_job(terminal: Terminal) -> None:
    terminal.write("loop.py", LOOP)
    process, url = serve(terminal)
    running = terminal.start("--server", url, "run", "--isolation", "minimal", "loop.py")
    assert read_line(running) == "started\n"
    (job,) = terminal.jobs("--state", "in_progress")
    process.kill()
    done = finish(running)
    assert done.code == 125
    assert f"{job['id']} is stored and goes on" in done.err
    assert "Traceback" not in done.err
