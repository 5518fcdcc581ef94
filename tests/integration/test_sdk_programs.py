"""Whole programs that use the SDK, each a process of its own: where their functions live, how they end, what the next one finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from blixard import App, JobState
from tests.integration.serve_rig import running

DEADLINE = 90.0
HEAD = """
import blixard
app = blixard.App("shop")

@app.job(isolation="minimal")
def total(*prices):
    return sum(prices)
"""


class Place:
    """A directory for programs, with a data directory that they share."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.directory = directory / "programs"
        self.directory.mkdir()
        self._started: list[subprocess.Popen[str]] = []
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "BLIXARD_STORAGE__DATA_DIR": str(self.data),
        }

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words,
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill what a failed test has left running."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=DEADLINE)

    def run(self, *words: str) -> str:
        """Run to the end; return what it printed. It must end well, say nothing else and leave no process of its group."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()) from None
        assert (process.returncode, err) == (0, ""), f"{out}\n{err}"
        assert processes_with(str(self.data)) == []
        return out

    def python(self, text: str) -> str:
        return self.run("python", str(self.guarded(text)))

    def guarded(self, text: str) -> Path:
        """Write a program whose body only runs in the program itself, as every program with jobs is to be written."""
        body = textwrap.indent(textwrap.dedent(text), "    ")
        return self.write("program.py", f'{HEAD}\n\nif __name__ == "__main__":\n{body}\n')


def processes_with(words: str) -> list[psutil.Process]:
    """Return the workers of this data directory that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            open_files = any(words in file.path for file in process.open_files())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if open_files:
            found.append(process)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.end()


def test_a_function_of_the_script_itself(place: Place) -> None:
    assert place.python("print(total.submit(1, 2).result(), list(total.map([3, 4])), total(5))") == "3 [3, 4] 5\n"


def test_nothing_of_the_script_runs_again_but_its_definitions(place: Place) -> None:
    assert place.python("print('once', total.submit(1).result())") == "once 1\n"


def test_functions_of_a_package_with_relative_imports(place: Place) -> None:
    place.write("shop/__init__.py", "")
    place.write("shop/rates.py", "RATE = 2\n")
    place.write("shop/tax/__init__.py", "from ..rates import RATE\n\ndef tax(price):\n    return price * RATE\n")
    place.write(
        "shop/jobs.py",
        """
        import blixard
        from . import rates
        from .tax import tax

        app = blixard.App("shop")

        @app.job
        def price(value):
            return tax(value) + rates.RATE
        """,
    )
    place.write("main.py", "from shop.jobs import price\nprint(price.submit(5).result())\n")
    assert place.run("python", "main.py") == "12\n"
    place.write("shop/__main__.py", "from .jobs import price\nprint(price.submit(6).result())\n")
    assert place.run("python", "-m", "shop") == "14\n"


def test_a_handle_in_another_process(place: Place) -> None:
    job_id = place.python("print(total.submit(1, 2).id)").strip()
    assert place.python(f"print(app.handle({job_id!r}).result())") == "3\n"
    assert place.python(f"print(app.handle({job_id!r}).state())") == "completed\n"


def test_what_was_submitted_and_left_is_run_by_the_next_that_waits(place: Place) -> None:
    job_id = place.python("print(total.submit(20, 22).id)").strip()
    listed = place.run("blixard", "jobs", "--state", "pending")
    assert job_id in listed
    assert "shop.total" in listed
    assert place.python("print(total.submit(1).result())") == "1\n"
    app = App("shop", data_dir=place.data)
    try:
        assert app.handle(job_id).result(timeout=DEADLINE) == 42
    finally:
        app.close()


def test_a_server_that_starts_later_runs_what_was_left(place: Place) -> None:
    job_id = place.python("print(total.submit(20, 22).id)").strip()
    with running(place.data, worker=True) as server:
        app = App("shop", server=server.url)
        try:
            assert app.handle(job_id).result(timeout=DEADLINE) == 42
        finally:
            app.close()


def test_a_directory_that_a_server_owns_is_used_through_it(place: Place) -> None:
    with running(place.data, worker=True):
        place.guarded("print(total.submit(1, 2).result(), list(total.map([3])))")
        process = place.start("python", "program.py")
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out, err) == (0, "3 [3]\n", "")


def test_a_fork_after_the_first_use_has_a_client_of_its_own(place: Place) -> None:
    printed = place.python(
        """
        import os

        print(total.submit(1).result(), flush=True)
        child = os.fork()
        if child == 0:
            print(total.submit(2).result(), flush=True)
            app.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(total.submit(3).result(), list(total.map([4])))
        """
    )
    assert printed == "1\n2\n3 [4]\n"


def test_a_pool_of_processes_may_use_the_app(place: Place) -> None:
    place.write(
        "pool.py",
        HEAD
        + textwrap.dedent("""
        import multiprocessing

        def work(number):
            return total.submit(number, 1).result()

        if __name__ == "__main__":
            assert total.submit(1).result() == 1
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                print(pool.map(work, range(4)))
        """),
    )
    assert place.run("python", "pool.py") == "[1, 2, 3, 4]\n"


def test_a_program_without_a_guard_is_told_and_does_not_submit_for_ever(place: Place) -> None:
    place.write("program.py", HEAD + "print(total.submit(1).result())\n")
    process = place.start("python", "program.py")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (1, "")
    assert 'put what submits jobs under `if __name__ == "__main__":`' in err
    assert processes_with(str(place.data)) == []
    assert place.python("print(len(app.client.jobs().jobs))") == "1\n"


def test_a_job_has_no_queue_of_its_own(place: Place) -> None:
    place.write(
        "nested.py",
        HEAD
        + textwrap.dedent("""
        @app.job(isolation="minimal")
        def outer():
            return total.submit(1).result()

        if __name__ == "__main__":
            try:
                outer.submit().result()
            except blixard.JobFailed as error:
                print(error.message)
        """),
    )
    assert "whose home vanishes with it" in place.run("python", "nested.py")


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "raise SystemExit(0)",
        "import atexit; atexit.register(print, 'bye')",
        "total.submit(1)",
        "next(total.map([1, 2]))",
    ],
)
def test_a_program_ends_without_traceback_and_without_processes(place: Place, ending: str) -> None:
    printed = place.python(f"print(total.submit(1).result(), flush=True)\n{ending}\n")
    assert printed.splitlines()[0] == "1"


def test_a_program_that_ends_amid_a_map_leaves_the_rest_to_the_next(place: Place) -> None:
    place.python("results = total.map(range(2000), resume=True)\nprint(next(results))")
    assert place.python("print(sum(total.map(range(2000), resume=True)))") == f"{sum(range(2000))}\n"


def test_an_error_in_the_program_is_the_only_traceback(place: Place) -> None:
    place.guarded("total.submit(1).result()\nraise RuntimeError('mine')\n")
    process = place.start("python", "program.py")
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert err.count("Traceback") == 1
    assert err.rstrip().endswith("RuntimeError: mine")
    assert processes_with(str(place.data)) == []


def test_ctrl_c_while_waiting_is_a_keyboard_interrupt_and_nothing_more(place: Place) -> None:
    place.write(
        "program.py",
        HEAD
        + textwrap.dedent("""
        import time

        @app.job(isolation="minimal")
        def sleep(seconds):
            time.sleep(seconds)

        if __name__ == "__main__":
            job = sleep.submit(600)
            total.submit(1).result()
            print(job.id, flush=True)
            try:
                job.result()
            except KeyboardInterrupt:
                print("interrupted", job.state(), flush=True)
        """),
    )
    process = place.start("python", "program.py")
    assert process.stdout is not None
    job_id = process.stdout.readline().strip()
    app = App("shop", data_dir=place.data)
    try:
        deadline = time.monotonic() + DEADLINE
        while app.handle(job_id).state() is not JobState.IN_PROGRESS:
            assert time.monotonic() < deadline
            time.sleep(0.02)  # nothing rings for another process's job
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (0, "")
        assert out.startswith("interrupted ")
        assert app.handle(job_id).state() in {JobState.PENDING, JobState.CLAIMED, JobState.IN_PROGRESS}
    finally:
        app.close()


def test_killed_amid_a_map_it_loses_nothing_and_runs_nothing_twice(place: Place) -> None:
    marks = place.directory / "marks"
    marks.mkdir()
    place.write(
        "program.py",
        f"""
        import os, pathlib, blixard
        app = blixard.App("shop")

        @app.job(isolation="minimal")
        def mark(number):
            with open({str(marks)!r} + f"/{{number}}", "a") as file:
                file.write("x")
            return number

        if __name__ == "__main__":
            for value in mark.map(range(3000), resume=True):
                print(value, flush=True)
        """,
    )
    process = place.start("python", "program.py")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(10)] == [f"{number}\n" for number in range(10)]
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert place.run("python", "program.py") == "".join(f"{number}\n" for number in range(3000))
    app = App("shop", data_dir=place.data)
    try:
        page = app.client.jobs(limit=1000)
        assert {job.state for job in page.jobs} == {JobState.COMPLETED}
        assert app.client.stats().jobs.get(JobState.COMPLETED) == 3000
    finally:
        app.close()
    assert len(list(marks.iterdir())) == 3000
