"""Running one claimed call in the thread of a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blixard.backends.executor.calls import Ending, FunctionCaller
from blixard.backends.executor.messages import Task
from blixard.domain.outcome import AttemptError
from blixard.domain.payload import FunctionPayload
from blixard.testing.inline_worker import InlineCall, InlineEnding


class Variables:
    """Environment variables of the jobs that run now. Jobs of several threads overlap: the last to end puts back what was there first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: list[Mapping[str, str]] = []
        self._before: dict[str, str | None] = {}

    @contextlib.contextmanager
    def set(self, values: Mapping[str, str]) -> Iterator[None]:
        layer = dict(values)
        with self._lock:
            self._before = {name: os.environ.get(name) for name in layer} | self._before
            self._layers.append(layer)
            os.environ.update(layer)
        try:
            yield
        finally:
            with self._lock:
                self._layers = [other for other in self._layers if other is not layer]
                self._put_back(layer)

    def _put_back(self, names: Iterable[str]) -> None:
        for name in names:
            found = next((layer[name] for layer in reversed(self._layers) if name in layer), None)
            value = self._before.pop(name) if found is None else found
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_call(call: InlineCall, variables: Variables) -> InlineEnding:
    """Call the function and say how it ended; read and write values as a worker does. Only functions can be run so."""
    payload = call.spec.payload
    if not isinstance(payload, FunctionPayload):
        message = "only Python functions run within a test; this job is another thing"
        error = AttemptError(type="NotInline", message=message, retryable=False)
        return InlineEnding(call=call, exit_code=1, result=None, error=error)
    with _surroundings(call, variables):
        ending = _outside_of_loops(call, payload)
    return InlineEnding(call=call, exit_code=ending.exit_code, result=ending.result, error=ending.error)


def _outside_of_loops(call: InlineCall, payload: FunctionPayload) -> Ending:
    """Run it here, or in a thread if an event loop runs here: a coroutine function needs a loop of its own."""
    if not _is_in_loop():
        return _run(call, payload)
    with ThreadPoolExecutor(1, thread_name_prefix="blixard inline job") as pool:
        return pool.submit(_run, call, payload).result()


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run(call: InlineCall, payload: FunctionPayload) -> Ending:
    task = Task(
        root=None,
        function=payload.function,
        encoding=payload.encoding,
        path=None,
        environment=call.spec.environment,
        memory_mb=call.spec.requirements.memory_mb,
    )
    caller = FunctionCaller(task)
    return caller.load() or caller.call(call.arguments)


@contextlib.contextmanager
def _surroundings(call: InlineCall, variables: Variables) -> Iterator[None]:
    """Give the job its variables, and its input files if it has any."""
    names = {
        "BLIXARD_JOB_ID": call.ref.job_id,
        "BLIXARD_ATTEMPT": str(call.ref.attempt),
        "BLIXARD_NAMESPACE": call.ref.namespace,
    }
    with variables.set({**names, **call.spec.environment}), contextlib.ExitStack() as stack:
        if call.inputs:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blixard-inline-")))
            for place, content in call.inputs.items():
                target = directory / place
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            stack.enter_context(contextlib.chdir(directory))
        yield
