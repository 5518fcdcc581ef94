"""Programs go on over the restart of their server, in a notebook too, and their input files reach the job."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from blixard import App, Executor, JobState, gather
from tests.integration import sdk_jobs as jobs
from tests.integration.serve_rig import Running, running

DEADLINE = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def app_of(server: Running) -> Iterator[App]:
    app = App("suite", server=server.url)
    try:
        yield app
    finally:
        app.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_waits_goes_on_when_the_server_is_back(tmp_path: Path, number: int) -> None:
    settings = {"port": free_port(), "shutdown_grace": 1.0}
    with running(tmp_path, settings) as first, app_of(first) as app:
        add = app.job(isolation="minimal")(jobs.add)
        handles = [add.submit(n) for n in range(3)]
        found: dict[str, object] = {}
        executor = Executor(app, isolation="minimal")
        future = executor.submit(pow, 2, 8)
        waits = {
            "result": lambda: handles[0].result(DEADLINE),
            "gather": lambda: gather(*handles, timeout=DEADLINE),
            "map": lambda: list(add.map(range(20), timeout=DEADLINE)),
            "window": lambda: list(add.map(range(20), timeout=DEADLINE, max_in_flight=3)),
        }
        threads = [
            threading.Thread(target=lambda n=name, w=wait: found.update({n: w()})) for name, wait in waits.items()
        ]
        for thread in threads:
            thread.start()
        # No worker runs here, so nothing can end before the restart; all of it is under way.
        deadline = time.monotonic() + DEADLINE
        while app.client.stats().jobs.get(JobState.PENDING) != 3 + 1 + 20 + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # nothing rings when a thread has submitted
        first.signal(number)
        first.end()
        with running(tmp_path, settings, worker=True) as second:
            assert second.url == first.url
            for thread in threads:
                thread.join(DEADLINE)
            assert found == {
                "result": 1,
                "gather": [1, 2, 3],
                "map": list(range(1, 21)),
                "window": list(range(1, 21)),
            }
            assert future.result(DEADLINE) == 256
            executor.shutdown()
            assert app.client.stats().jobs[JobState.COMPLETED] == 3 + 1 + 20 + 20


@pytest.mark.parametrize("isolation", ["minimal", "standard"])
def test_input_files_lie_in_the_working_directory_of_the_job(tmp_path: Path, isolation: str) -> None:
    file = tmp_path / "note.txt"
    file.write_text("bread")
    app = App("suite", data_dir=tmp_path / "data")
    try:
        read = app.job(isolation=isolation, input={"in/note.txt": file})(jobs.read)
        assert read.submit("in/note.txt").result(DEADLINE) == "bread"
        assert list(read.map(["in/note.txt"] * 2)) == ["bread", "bread"]
        assert read.options(input=[file]).submit("note.txt").result(DEADLINE) == "bread"
    finally:
        app.close()


def test_a_notebook_can_submit_wait_and_await(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("BLIXARD_STORAGE__DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    source = """
    import blixard
    app = blixard.App("notebook")

    @app.job(isolation="minimal")
    def double(number):
        return 2 * number
    """
    (tmp_path / "my_jobs.py").write_text(textwrap.dedent(source))
    cells = [
        "import blixard\nfrom my_jobs import app, double",
        "print(double.submit(1).result(), list(double.map(range(3))))",
        "print(await (await double.submit_async(2)).result_async(), [v async for v in double.map_async(range(3))])",
        "print(blixard.gather(double.submit(3), double.submit(4)))",
        "try:\n    app.job(lambda: 1).submit()\nexcept blixard.InvalidRequest as error:\n    print(error)",
        "def typed(): pass\ntry:\n    app.job(typed).submit()\nexcept blixard.InvalidRequest as error:\n    print(error.hint)",
        "with blixard.Executor(app, isolation='minimal') as executor:\n    print(list(executor.map(pow, [2, 3], [3, 2])))",
        "app.close()",
    ]
    code: dict[str, object] = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    book = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [{**code, "id": f"cell-{place}", "source": cell} for place, cell in enumerate(cells)],
    }
    notebook = nbformat.from_dict(book)  # type: ignore[no-untyped-call]  # it has no types
    client = NotebookClient(
        notebook, timeout=DEADLINE, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs).strip() for cell in notebook.cells]
    assert printed == [
        "",
        "2 [0, 2, 4]",
        "4 [0, 2, 4]",
        "[6, 8]",
        "a lambda has no name by which a worker could find it",
        "put it into a file (my_jobs.py) and import it from there",
        "[8, 9]",
        "",
    ]
