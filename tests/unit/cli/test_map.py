"""`map`: one job a line, attached to again, in bounded memory, with results as they come."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from blixard.cli.map_inputs import MapInputs
from blixard.cli.progress import LINE_SECONDS, LineView, Tally, describe_progress, summarise
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BATCH_JOBS
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.requirements import Isolation
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import LimitExceeded
from tests.unit.cli.conftest import Said, Shell
from tests.unit.cli.fake_client import Ending, FakeClient
from tests.unit.cli.test_run import _send_when_waiting


def _length(spec: JobSpec, job: NewJob) -> Ending:
    ((line,), _) = json.loads(bytes(job.arguments))
    if line.startswith("bad"):
        error = AttemptError(type="ValueError", message=f"{line}!", traceback=f"Traceback …\nValueError: {line}!\n")
        return Ending(outcome=OutcomeKind.FAILED, exit_code=1, error=error)
    return Ending(result=len(line))


@pytest.fixture
def mapping(shell: Shell, here: Path) -> Shell:
    shell.runner = _length
    (here / "list.txt").write_text("a\nbbb\n\ndd\r\nbbb\n")
    return shell


def _json(said: Said) -> list[dict[str, object]]:
    return [json.loads(line) for line in said.out.splitlines()]


def test_each_line_is_one_job_and_json_tells_input_id_state_and_result(mapping: Shell) -> None:
    said = mapping.run("map", "--json", "facts.py:measure", "list.txt")
    assert said.code == 0
    assert [(line["input"], line["state"], line["result"]) for line in _json(said)] == [
        ("a", "completed", 1), ("bbb", "completed", 3), ("", "completed", 0), ("dd", "completed", 2), ("bbb", "completed", 3),
    ]  # fmt: skip
    assert {line["id"] for line in _json(said)} == set(mapping.store.jobs)
    assert all(set(line) == {"input", "id", "state", "result"} for line in _json(said))
    assert "5 jobs: 5 completed; 5 ran now" in said.err


def test_without_json_a_line_has_input_and_result(mapping: Shell) -> None:
    assert mapping.run("map", "facts.py:measure", "list.txt").out == "a\t1\nbbb\t3\n\t0\ndd\t2\nbbb\t3\n"


def test_the_list_may_come_from_standard_input(mapping: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\nthree")))
    assert mapping.run("map", "facts.py:measure", "-").out == "one\t3\nthree\t5\n"


def test_an_empty_list_is_nothing_to_do(mapping: Shell, here: Path) -> None:
    (here / "list.txt").write_text("")
    said = mapping.run("map", "facts.py:measure", "list.txt")
    assert (said.code, said.out, said.err) == (0, "", "list.txt is empty: nothing to do\n")


def test_failures_give_exit_code_1_and_are_told(mapping: Shell, here: Path) -> None:
    (here / "list.txt").write_text("good\nbad1\n")
    said = mapping.run("map", "--json", "facts.py:measure", "list.txt")
    assert said.code == 1
    failed = _json(said)[1]
    assert (failed["state"], failed["result"]) == ("failed", None)
    assert failed["error"] == {
        "type": "ValueError",
        "message": "bad1!",
        "traceback": "Traceback …\nValueError: bad1!\n",
    }
    assert "bad1:\nTraceback …\nValueError: bad1!" in said.err
    assert "2 jobs: 1 completed, 1 failed; 2 ran now" in said.err


def test_not_every_one_of_many_failures_is_told(mapping: Shell, here: Path) -> None:
    (here / "list.txt").write_text("".join(f"bad{n}\n" for n in range(100)))
    said = mapping.run("map", "facts.py:measure", "list.txt")
    assert said.err.count("Traceback") == 3
    assert said.err.count("ValueError: bad") == 20
    assert "--state failed --batch map_" in said.err


def test_the_same_command_attaches_and_runs_only_what_is_not_completed(mapping: Shell) -> None:
    mapping.most = 2
    mapping.on_connect = lambda client: _send_when_waiting(client, signal.SIGINT)
    first = mapping.run("map", "facts.py:measure", "list.txt")
    assert first.code == 130
    assert first.out == "a\t1\nbbb\t3\n"
    assert "the same command carries on" in first.err
    mapping.most = None
    mapping.on_connect = lambda client: None
    second = mapping.run("map", "facts.py:measure", "list.txt")
    assert second.code == 0
    assert "2 of 5 already completed" in second.err
    assert "5 jobs: 5 completed; 3 ran now" in second.err
    assert second.out == "a\t1\nbbb\t3\n\t0\ndd\t2\nbbb\t3\n"
    assert mapping.client.requests == []
    assert [job.attempt for job in mapping.store.jobs.values()] == [1] * 5


def test_an_interrupt_cancels_no_job(mapping: Shell) -> None:
    mapping.most = 2
    mapping.on_connect = lambda client: _send_when_waiting(client, signal.SIGTERM)
    assert mapping.run("map", "facts.py:measure", "list.txt").code == 143
    assert {job.state for job in mapping.store.jobs.values()} == {JobState.COMPLETED, JobState.PENDING}


def test_failed_jobs_of_a_map_run_again_and_completed_ones_do_not(mapping: Shell, here: Path) -> None:
    (here / "list.txt").write_text("good\nbad\n")
    mapping.run("map", "facts.py:measure", "list.txt")
    mapping.runner = lambda spec, job: Ending(result="again")
    said = mapping.run("map", "facts.py:measure", "list.txt")
    assert (said.code, said.out) == (0, 'good\t4\nbad\t"again"\n')


def test_submission_goes_on_where_it_was_stopped(mapping: Shell, here: Path) -> None:
    (here / "list.txt").write_text("".join(f"{n}\n" for n in range(2 * MAX_BATCH_JOBS + 10)))
    mapping.run("map", "facts.py:measure", "list.txt")
    assert [len(request.jobs) for request in mapping.client.requests] == [1000, 1000, 10]
    assert [request.first_index for request in mapping.client.requests] == [0, 1000, 2000]
    for job_id in list(mapping.store.jobs)[1500:]:
        del mapping.store.jobs[job_id]
    said = mapping.run("map", "facts.py:measure", "list.txt")
    assert [(request.first_index, len(request.jobs)) for request in mapping.client.requests] == [(1500, 510)]
    assert len(said.out.splitlines()) == 2010


def test_fresh_starts_anew(mapping: Shell) -> None:
    mapping.run("map", "facts.py:measure", "list.txt")
    said = mapping.run("map", "--fresh", "facts.py:measure", "list.txt")
    assert len(mapping.store.jobs) == 10
    assert "attached" not in said.err


@pytest.mark.parametrize("change", ["code", "list", "option"])
def test_a_change_makes_a_new_map_and_says_so(mapping: Shell, here: Path, change: str) -> None:
    mapping.run("map", "facts.py:measure", "list.txt")
    if change == "code":
        (here / "facts.py").write_text("def measure(path):\n    return 0\n")
    if change == "list":
        (here / "list.txt").write_text("a\n")
    extra = ["--retries", "1"] if change == "option" else []
    said = mapping.run("map", *extra, "facts.py:measure", "list.txt")
    assert "this is a new map" in said.err
    assert len(mapping.store.batches) == 2


def test_files_travel_to_their_own_job_and_nothing_is_sent_twice(mapping: Shell, here: Path) -> None:
    (here / "sub").mkdir()
    for name in ("sub/a.txt", "b.txt", "c.txt"):
        (here / name).write_text("same" if name != "c.txt" else "other")
    (here / "list.txt").write_text(f"sub/a.txt\n./b.txt\n{here}/c.txt\nno file\n")
    said = mapping.run("map", "--files", "facts.py:measure", "list.txt")
    assert said.code == 0
    jobs = mapping.client.requests[0].jobs
    assert [[item.path for item in job.inputs] for job in jobs] == [["sub/a.txt"], ["b.txt"], [f"{here}/c.txt"], []]
    assert len({item.digest for job in jobs for item in job.inputs}) == 2
    assert len(mapping.client.uploads) == 3  # the code and two contents
    (here / "b.txt").write_text("changed")
    mapping.run("map", "--files", "facts.py:measure", "list.txt")
    assert len(mapping.store.batches) == 2


def test_files_that_cannot_be_placed_are_refused(mapping: Shell, here: Path) -> None:
    (here / "list.txt").write_text(f"{here}/facts.py\n")
    said = mapping.run("map", "--files", "--isolation", "minimal", "facts.py:measure", "list.txt")
    assert (said.code, mapping.store.batches) == (2, {})
    assert "line 1" in said.err
    (here.parent / "above.txt").write_text("")
    (here / "list.txt").write_text("../above.txt\n")
    said = mapping.run("map", "--files", "facts.py:measure", "list.txt")
    assert said.code == 2
    assert "outside of the current directory" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["facts.py:measure", "missing.txt"], "there is no list missing.txt"),
        (["facts.py:measure", "."], "is a directory"),
        (["facts.py", "list.txt"], "not of the form FILE.py:FUNCTION"),
        (["facts.py:nope", "list.txt"], "has no function 'nope'"),
        (["missing.py:f", "list.txt"], "there is no file missing.py"),
        (["facts.py:measure"], "missing argument"),
        (["--input", "x", "facts.py:measure", "list.txt"], "no such option: --input"),
        (["facts.py:measure", "binary.txt"], "line 2 of the list is not UTF-8"),
    ],
)
def test_a_mistake_makes_no_map(mapping: Shell, here: Path, arguments: list[str], message: str) -> None:
    (here / "binary.txt").write_bytes(b"ok\n\xff\n")
    said = mapping.run("map", *arguments)
    assert (said.code, said.out, mapping.store.batches) == (2, "", {})
    assert message in said.err.lower().replace("utf-8", "UTF-8").replace("file.py:function", "FILE.py:FUNCTION")


@pytest.fixture
def inputs() -> Iterator[MapInputs]:
    with contextlib.closing(MapInputs()) as inputs:
        yield inputs


def _fill(inputs: MapInputs, data: bytes) -> None:
    for _ in inputs.fill(io.BytesIO(data), with_files=False, isolation=Isolation.STANDARD):
        pass


def test_a_line_at_the_limit_is_taken_and_one_beyond_is_refused(inputs: MapInputs) -> None:
    room = MAX_ARGUMENTS_BYTES - len('[[""],{}]')
    _fill(inputs, b"x" * room + b"\n" + b"x" * room)
    assert [len(inputs[n].arguments) for n in range(2)] == [MAX_ARGUMENTS_BYTES] * 2
    for beyond in (room + 1, MAX_ARGUMENTS_BYTES, MAX_ARGUMENTS_BYTES + 10):
        with pytest.raises(LimitExceeded, match="line 2"):
            _fill(inputs, b"a\n" + b"x" * beyond)


def test_a_hundred_thousand_inputs_take_next_to_no_memory(inputs: MapInputs) -> None:
    tracemalloc.start()
    _fill(inputs, b"".join(b"some/path/number/%d.txt\n" % n for n in range(100_000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert inputs[99_999].line == "some/path/number/99999.txt"
    assert len(inputs) == 100_000
    assert peak < 20_000_000


def test_a_file_that_changes_meanwhile_is_told(mapping: Shell, here: Path) -> None:
    (here / "data.txt").write_text("before")
    (here / "list.txt").write_text("data.txt\n")

    def change(client: FakeClient) -> None:
        (here / "data.txt").write_text("after")

    mapping.on_connect = change
    said = mapping.run("map", "--files", "facts.py:measure", "list.txt")
    assert said.code == 2
    assert "data.txt has changed since the map began" in said.err


def test_progress_is_told_in_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    view = LineView(clock=lambda: now)
    for second in range(101):
        now = float(second)
        view.show(Tally(total=200, completed=second, failed=0, running=2))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 / LINE_SECONDS
    assert lines[0] == "5/200 done, 0 failed, 2 running, 1/s, 3 min 15 s left"


def test_progress_counts_only_what_ran_now() -> None:
    tally = Tally(total=100, completed=60, failed=2, cancelled=1, before=50)
    assert describe_progress(tally, 10.0) == "63/100 done, 2 failed, 0 running, 1.3/s, 28 s left"
    assert summarise(tally, 10.0) == "100 jobs: 60 completed, 2 failed, 1 cancelled; 13 ran now in 10 s (1.3/s)"


def test_quiet_says_nothing_but_results(mapping: Shell) -> None:
    said = mapping.run("-q", "map", "facts.py:measure", "list.txt")
    assert said.err == ""
    assert len(said.out.splitlines()) == 5
