"""Help, versions, tokens, settings, checks, and how errors and bugs are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blixard.cli import checks
from blixard.cli.checks import Status
from blixard.cli.quantities import read_megabytes, read_seconds
from blixard.cli.root import COMMANDS
from blixard.errors import (
    BlixardError,
    Forbidden,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobTimedOut,
    LeaseLost,
    OutcomeUnknown,
    StoreFull,
    WaitTimedOut,
)
from tests.unit.cli.conftest import Shell

PROGRAM = str(Path(sys.executable).parent / "blixard")
SUBCOMMANDS = [
    *(["token", "create"], ["token", "list"], ["token", "revoke"], ["config", "show"]),
    *(["image", "list"], ["image", "build"], ["image", "prune"]),
    *(["vm", name] for name in ("setup", "exec", "shell", "pause", "resume", "stop", "snapshot", "fork")),
]


@pytest.mark.parametrize(
    "command", [*([name] for name in COMMANDS if name not in {"token", "config", "image", "vm"}), *SUBCOMMANDS]
)
def test_every_command_has_help_with_an_example(shell: Shell, command: list[str]) -> None:
    said = shell.run(*command, "--help")
    assert said.code == 0
    assert said.out.startswith(f"Usage: blixard {' '.join(command)}")
    assert (
        f"Examples:\n    blixard {' '.join(command)}" in said.out
        or f" {command[-1]}" in said.out.partition("Examples:")[2]
    )
    assert said.err == ""


def test_help_lists_every_command_and_imports_none(shell: Shell) -> None:
    program = (
        "import sys\nfrom blixard.cli.main import run_command_line\nrun_command_line(['--help'])\n"
        "print([m for m in sys.modules if m.split('.')[0] in {'pydantic_settings', 'rich', 'litestar', 'httpx', 'apsw', 'asyncio', 'wasmtime'}"
        " or m.startswith(('blixard.cli.commands', 'blixard.client', 'blixard.config'))], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert done.stderr == "[]\n"


def test_help_is_quick() -> None:
    """0.3 s is promised; the bound here leaves room for a loaded machine."""
    best = min(_time_help() for _ in range(5))
    assert best < 1.0


def _time_help() -> float:
    began = time.perf_counter()
    subprocess.run([PROGRAM, "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


@pytest.mark.parametrize(
    ("shell_name", "variables"),
    [
        ("bash", {"COMP_WORDS": "blixard jo", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "blixard jo"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "blixard jo", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_the_shell_completes_commands(shell_name: str, variables: dict[str, str]) -> None:
    environment = {**os.environ, "_BLIXARD_COMPLETE": f"complete_{shell_name}", **variables}
    done = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert "jobs" in done.stdout
    assert "job" in done.stdout
    assert "serve" not in done.stdout


def test_completion_can_be_shown(shell: Shell) -> None:
    done = subprocess.run([PROGRAM, "--show-completion", "bash"], capture_output=True, text=True, check=False)
    assert "_BLIXARD_COMPLETE=complete_bash" in done.stdout


def test_the_version_is_printed_in_three_ways(shell: Shell) -> None:
    text = shell.run("version").out
    assert text.startswith("blixard ")
    assert shell.run("--version").out == text
    assert json.loads(shell.run("version", "--json").out)["version"] in text


def test_a_token_is_printed_once_and_alone_on_standard_output(shell: Shell) -> None:
    said = shell.run("token", "create", "laptop", "--scope", "read", "--scope", "submit", "--expires", "30d")
    assert (said.code, said.out) == (0, "blx_secret\n")
    assert "not shown again" in said.err
    assert json.loads(shell.run("token", "list", "--json").out)[0]["scopes"] == ["read", "submit"]
    listed = shell.run("token", "list").out
    assert "blx_secret" not in listed
    assert "valid" not in listed.splitlines()[0]
    assert shell.run("token", "revoke", "token_0").out == "token_0\trevoked\n"
    assert "\trevoked\t" in shell.run("token", "list").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token", "create"], "missing argument 'NAME'"),
        (["token", "create", "x"], "missing option '--scope'"),
        (["token", "create", "x", "--scope", "all"], "'all' is not one of"),
        (["token", "create", "x", "--scope", "read", "--expires", "soon"], "--expires: 'soon'"),
        (["token", "revoke", "nope"], "there is no token 'nope'"),
        (["config", "shw"], "no such command"),
        (["serve", "--port", "99999"], "out of range"),
        (["worker", "--label", "zone"], "NAME=VALUE"),
        (["worker", "--type", "gpu"], "'gpu' is not one of"),
        (["--server", "ftp://x", "jobs"], "does not start with http://"),
        (["--config", "missing.toml", "jobs"], "missing.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_told_in_one_error(shell: Shell, arguments: list[str], message: str) -> None:
    said = shell.run(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err


def test_settings_are_shown_with_their_sources(shell: Shell, here: Path) -> None:
    (here / "other.toml").write_text("[worker]\nslots = 3\n")
    said = shell.run("--data-dir", "/srv/data", "--config", "other.toml", "config", "show", "--sources")
    assert 'data_dir = "/srv/data"' in said.out
    assert "# command line" in said.out
    assert "# other.toml:2" in said.out
    values = {item["key"]: item for item in json.loads(shell.run("config", "show", "--json").out)}
    assert values["worker.slots"] == {"key": "worker.slots", "value": "0", "source": "built-in"}
    assert "#" not in shell.run("config", "show").out


def test_a_secret_is_not_shown(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIXARD_TOKEN", "blx_very_secret")
    assert "very_secret" not in shell.run("config", "show").out


def test_prune_stats_and_workers_answer(shell: Shell) -> None:
    shell.run("submit", "hello.py")
    assert shell.run("prune").out == "removed 3 jobs\n"
    assert json.loads(shell.run("prune", "--json").out) == {"jobs": 3, "blobs": 0}
    assert json.loads(shell.run("stats", "--json").out)["jobs"] == {"pending": 1}
    assert "all queues\t0\t1" in shell.run("stats").out
    assert shell.run("workers", "--json").out == "[]\n"
    assert "no worker is online" in shell.run("workers").err


def test_doctor_says_what_works(shell: Shell, here: Path) -> None:
    said = shell.run("--data-dir", str(here / "data"), "doctor", "--json")
    found = {item["check"]: item for item in json.loads(said.out)}
    assert said.code == 0
    assert found["python"]["status"] == "ok"
    assert {"sqlite", "data directory", "user namespaces", "bubblewrap", "cgroups", "server", "clock"} <= set(found)
    assert {"process jobs, minimal", "process jobs, standard", "wasm jobs, minimal"} <= set(found)
    assert not (here / "data").exists()
    assert "CHECK\tSTATUS" in shell.run("doctor").out


def test_doctor_ends_with_1_when_something_essential_is_missing(shell: Shell, here: Path) -> None:
    said = shell.run("--data-dir", str(here / "hello.py/data"), "doctor")
    assert said.code == 1
    assert "BLIXARD_STORAGE__DATA_DIR" in said.out


def test_a_check_that_breaks_is_an_answer() -> None:
    def broken() -> Iterator[checks.Finding]:
        raise OSError("no /proc here")

    assert checks._guarded("x", broken)[0] == checks.Finding(
        check="x", status=Status.MISSING, found="OSError: no /proc here"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("x"), 2),
        (Forbidden("x"), 2),
        (JobFailed("x", job_id="a", exit_code=7), 7),
        (JobFailed("x", job_id="a"), 1),
        (JobTimedOut("x", job_id="a"), 124),
        (JobCancelled("x", job_id="a"), 130),
        (LeaseLost("x"), 125),
        (StoreFull("x"), 125),
        (OutcomeUnknown("x"), 125),
        (WaitTimedOut("x"), 124),
        (InternalError("x"), 125),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BlixardError) else None,
)
def test_every_kind_of_error_has_its_exit_code_and_no_traceback(shell: Shell, error: BlixardError, code: int) -> None:
    error.hint = "do this"
    shell.on_connect = lambda client: setattr(client, "open_error", error)
    said = shell.run("jobs")
    assert (said.code, said.out, said.err) == (code, "", "error: x\nhint: do this\n")


def test_a_bug_is_told_shortly_and_at_length_when_asked(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = ZeroDivisionError("division by zero")
    shell.on_connect = lambda client: setattr(client, "open_error", bug)
    said = shell.run("jobs")
    assert said.code == 125
    assert said.err.startswith("error: unexpected ZeroDivisionError: division by zero\nhint: ")
    assert "Traceback" in shell.run("--verbose", "jobs").err
    monkeypatch.setenv("BLIXARD_DEBUG", "1")
    assert "Traceback" in shell.run("jobs").err


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("1.5s", 1.5), ("5m", 300), ("2h", 7200), ("7d", 604800), ("100ms", 0.1)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert read_seconds(text, "--timeout") == seconds


@pytest.mark.parametrize(("text", "megabytes"), [("512", 512), ("512MiB", 512), ("2GiB", 2048), ("1B", 1), ("1MB", 1)])
def test_sizes_have_units(text: str, megabytes: int) -> None:
    assert read_megabytes(text, "--memory") == megabytes
