"""The commands that look at jobs and change them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import JobFilter
from tests.unit.cli.conftest import Shell
from tests.unit.cli.fake_client import EPOCH, Ending


@pytest.fixture
def filled(shell: Shell) -> Shell:
    for name in ("one", "two", "three"):
        assert shell.run("submit", "--id", name, "--tag", "t", "hello.py").code == 0
    return shell


def test_jobs_prints_one_json_array(filled: Shell) -> None:
    said = filled.run("jobs", "--json")
    assert [job["id"] for job in json.loads(said.out)] == ["three", "two", "one"]
    assert {"id", "name", "state", "created_at", "exit_code", "tags"} <= set(json.loads(said.out)[0])
    assert said.err == ""


def test_no_jobs_are_an_empty_array(shell: Shell) -> None:
    assert shell.run("jobs", "--json").out == "[]\n"


def test_jobs_in_a_pipe_has_tabs_and_cuts_nothing(filled: Shell) -> None:
    header, first, *_ = [line.split("\t") for line in filled.run("jobs").out.splitlines()]
    assert header[:3] == ["ID", "STATE", "NAME"]
    assert first[:3] == ["three", "pending", "hello.py"]


def test_filters_limit_and_cursor_reach_the_client(filled: Shell) -> None:
    said = filled.run(
        "jobs", "--state", "failed", "--state", "cancelled", "--name", "n", "--tag", "t", "--queue", "q", "--batch", "map_1",
        "--since", "2026-11-23T12:00:00Z", "--until", "2026-11-23T13:00:00+01:00", "--limit", "1000", "--cursor", "0", "--json",
    )  # fmt: skip
    assert said.code == 0
    assert filled.client.filters == [
        (
            JobFilter(
                states=(JobState.FAILED, JobState.CANCELLED), name="n", tag="t", queue="q", batch="map_1", since=EPOCH, until=EPOCH,
            ),
            1000,
            "0",
        )
    ]  # fmt: skip


def test_a_list_goes_on_behind_its_cursor_or_to_its_end(filled: Shell) -> None:
    said = filled.run("jobs", "--json", "--limit", "2")
    assert [job["id"] for job in json.loads(said.out)] == ["three", "two"]
    assert said.err == "there are more: --cursor 2\n"
    assert [job["id"] for job in json.loads(filled.run("jobs", "--json", "--limit", "2", "--cursor", "2").out)] == [
        "one"
    ]
    said = filled.run("jobs", "--json", "--limit", "1", "--all")
    assert len(json.loads(said.out)) == 3
    assert said.err == ""


def test_since_may_be_an_age(filled: Shell) -> None:
    filled.run("jobs", "--since", "1h")
    where, _, _ = filled.client.filters[0]
    assert where.since is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs", "--limit", "0"], "1 to 1000"),
        (["jobs", "--limit", "1001"], "1 to 1000"),
        (["jobs", "--state", "done"], "'done' is not one of 'blocked'"),
        (["jobs", "--since", "yesterday"], "neither an age"),
        (["jobs", "extra"], "unexpected extra argument"),
        (["job"], "missing argument 'ID'"),
        (["job", "missing"], "there is no job 'missing'"),
        (["job", "not an id"], "is not an id"),
        (["job", "x" * 256], "256 characters"),
        (["job", ""], "0 characters"),
        (["logs", "missing"], "there is no job"),
        (["logs", "-f", "--attempt", "1", "one"], "exclude each other"),
        (["cancel"], "missing argument"),
        (["cancel", "missing"], "there is no job"),
        (["retry", "one"], "is pending and cannot become pending"),
        (["why", "missing"], "there is no job"),
        (["jbos"], "there is no command 'jbos'"),
        (["hello.py"], "there is no command 'hello.py'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_mistakes_are_told_in_one_error_with_exit_code_2(filled: Shell, arguments: list[str], message: str) -> None:
    said = filled.run(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err


def test_unknown_commands_suggest_the_nearest(shell: Shell) -> None:
    assert "did you mean `blixard jobs`?" in shell.run("jbos").err
    assert "did you mean `blixard run hello.py`?" in shell.run("hello.py").err


def test_an_option_of_ours_behind_the_command_is_explained(shell: Shell) -> None:
    assert "it stands before the command" in shell.run("jobs", "--data-dir", "x").err


def test_one_job_shows_everything(shell: Shell, here: Path) -> None:
    error = AttemptError(type="ValueError", message="no good", traceback="Traceback …\n", hint="try another")
    shell.runner = lambda spec, job: Ending(outcome=OutcomeKind.FAILED, exit_code=1, error=error)
    shell.run("run", "--id", "bad", "--env", "A=1", "--allow-read", str(here), "facts.py:measure", "x")
    text = shell.run("job", "bad").out
    for part in (
        "bad",
        "failed",
        '[["x"],{}]',
        "ValueError: no good",
        "Traceback …",
        "hint: try another",
        "submitted",
        str(here),
    ):
        assert part in text
    value = json.loads(shell.run("job", "--json", "bad").out)
    assert value["spec"]["payload"]["kind"] == "function"
    assert value["error"]["message"] == "no good"
    assert value["events"][0]["type"] == "submitted"
    assert value["arguments"] == [["x"], {}]


def test_last_is_the_newest_job(filled: Shell) -> None:
    assert json.loads(filled.run("job", "--json", "last").out)["id"] == "three"


def test_last_of_none_is_told(shell: Shell) -> None:
    said = shell.run("job", "last")
    assert (said.code, said.err.splitlines()[0]) == (2, "error: there is no job 'last'")


OUTPUT = (("stdout", b"one\ntw"), ("stderr", b"oops\n"), ("stdout", b"o\n"))


@pytest.fixture
def ended(shell: Shell) -> Shell:
    shell.runner = lambda spec, job: Ending(output=OUTPUT)
    shell.run("run", "--id", "one", "hello.py")
    return shell


@pytest.mark.parametrize("extra", [[], ["-f"], ["--attempt", "1"]])
def test_logs_go_to_the_streams_they_came_from(ended: Shell, extra: list[str]) -> None:
    said = ended.run("logs", *extra, "one")
    assert (said.code, said.out, said.err) == (0, "one\ntwo\n", "oops\n")


def test_timestamps_stand_before_each_line_once(ended: Shell) -> None:
    said = ended.run("logs", "--timestamps", "one")
    assert said.out == "2026-11-23T12:00:00.000000Z one\n2026-11-23T12:00:00.000000Z two\n"
    assert said.err == "2026-11-23T12:00:00.000000Z oops\n"


def test_logs_follow_until_the_job_has_ended(shell: Shell) -> None:
    shell.run("submit", "--id", "one", "hello.py")
    shell.runner = lambda spec, job: Ending(output=OUTPUT)
    said = shell.run("logs", "-f", "one")
    assert (said.code, said.out, said.err) == (0, "one\ntwo\n", "oops\n")


def test_cancel_takes_many_and_tells_each(filled: Shell) -> None:
    said = filled.run("cancel", "one", "missing", "two")
    assert said.code == 2
    assert said.out == "one\tcancelled\ntwo\tcancelled\n"
    assert "there is no job 'missing'" in said.err
    assert filled.store.jobs["three"].state is JobState.PENDING


def test_cancel_takes_a_map(shell: Shell, here: Path) -> None:
    (here / "list.txt").write_text("a\nb\n")
    shell.run("map", "facts.py:measure", "list.txt")
    for job in shell.store.jobs.values():
        job.state = JobState.PENDING
    (batch,) = shell.store.batches
    assert shell.run("cancel", batch).out == f"{batch}\t2 jobs cancelled\n"


def test_retry_makes_pending_again(filled: Shell) -> None:
    filled.run("cancel", "one")
    assert filled.run("retry", "one").out == "one\tpending\n"


def test_why_tells_what_unblocks(filled: Shell) -> None:
    said = filled.run("why", "one")
    assert said.out == ("one is pending: it waits for a worker\n  - no worker is online\n    start `blixard worker`\n")
    assert json.loads(filled.run("why", "--json", "one").out)["reasons"][0]["code"] == "no_worker"
