"""The loop of an executor: take a call, run it, put everything back, answer. See ../DESIGN.md."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import NoReturn

from blixard.backends.executor.calls import Ending, FunctionCaller, run_script
from blixard.backends.executor.line import DirectLine, PipelinedLine
from blixard.backends.executor.messages import Answer, Call, Calls, Task, decode_task
from blixard.backends.executor.output import Streams
from blixard.backends.executor.traces import Environment, Surroundings, unread_bytes, wait_until_read
from blixard.backends.workspace import place_inputs
from blixard.backends.zygote.kernel import adopt_orphans
from blixard.backends.zygote.messages import Launch
from blixard.domain.outcome import AttemptError

MAX_CALLS = 20_000
"""After which an executor is replaced, so that what libraries leak stays bounded."""
MAX_KNOWN_TASKS = 256


def serve(channel: socket.socket, launch: Launch) -> int:
    """Run calls until the backend closes the channel or a call makes this process unfit. Returns the exit code."""
    sys.argv = [""]
    executor = Executor(channel, launch)
    try:
        executor.run()
    finally:
        sys.stdout.flush()
    return executor.exit_code


class Executor:
    def __init__(self, channel: socket.socket, launch: Launch) -> None:
        if launch.plan is None:
            adopt_orphans()
        self._pid = os.getpid()
        self._line = DirectLine(channel) if launch.single_use else PipelinedLine(channel)
        self._streams = Streams(channel, self._line)
        self._streams.install()
        self._launch = launch
        self._callers: dict[bytes, tuple[Task, FunctionCaller]] = {}
        self._roots: set[str] = set()
        self._environment = Environment()
        self._surroundings: Surroundings | None = None
        self._calls_left = 1 if launch.single_use else MAX_CALLS
        self.exit_code = 0

    def run(self) -> None:
        while self._calls_left and (found := self._line.next()) is not None:
            self._calls_left -= 1
            answer = self._run(*found)
            if answer.retire is not None:
                self._calls_left = 0
            self._line.answer(answer)
            if answer.native_stdout or answer.native_stderr:
                wait_until_read((1, 2))  # else the next call's output could not be told from this one's

    def _run(self, calls: Calls, call: Call) -> Answer:
        task, caller = self._find(calls.task)
        self._environment.set_up(task.environment, _variables_of(calls, call))
        started_ns = time.time_ns()
        ending, duration = self._end(call, task, caller)
        if os.getpid() != self._pid:
            self._end_as_child(ending)
        self.exit_code = ending.exit_code if task.path is not None else 0
        self._streams.finish()
        retire = self._restore()
        return Answer(
            call.number,
            started_ns // 1000,
            time.time_ns() // 1000,
            duration,
            ending.exit_code,
            ending.result,
            ending.error,
            unread_bytes(1),
            unread_bytes(2),
            retire,
        )

    def _end_as_child(self, ending: Ending) -> NoReturn:
        """The job forked and its child came back here, so this is the child's end, and not an answer."""
        if ending.error is not None and ending.error.traceback is not None:
            print(ending.error.traceback, file=sys.stderr, end="")
        self._streams.finish()
        os._exit(ending.exit_code)

    def _restore(self) -> str | None:
        """Make ready for the next call; return why this process must not take one."""
        if self._launch.single_use:
            return "used once"
        self._environment.restore()
        assert self._surroundings is not None
        return self._surroundings.restore(is_thorough=self._line.is_at_rest) or (
            None if self._calls_left else "worn out"
        )

    def _find(self, encoded: bytes) -> tuple[Task, FunctionCaller]:
        known = self._callers.get(encoded)
        if known is None:
            if len(self._callers) >= MAX_KNOWN_TASKS:
                self._callers.clear()
            task = decode_task(encoded)
            known = self._callers[encoded] = (task, FunctionCaller(task))
        return known

    def _end(self, call: Call, task: Task, caller: FunctionCaller) -> tuple[Ending, float]:
        try:
            if call.inputs:
                place_inputs(self._launch.working_directory, call.inputs)
        except (OSError, ValueError) as error:
            self._remember()
            return Ending(1, error=AttemptError(type="InvalidRequest", message=str(error), retryable=False)), 0.0
        if task.path is not None:
            begun = time.perf_counter()
            return run_script(task, call.arguments), time.perf_counter() - begun
        failed = self._load(task, caller)
        begun = time.perf_counter()
        ending = failed if failed is not None else caller.call(call.arguments)
        return ending, time.perf_counter() - begun

    def _load(self, task: Task, caller: FunctionCaller) -> Ending | None:
        """Import the function if need be. What an import changes in the process stays, as it happens only once."""
        if caller.is_loaded:
            return None
        if task.root is not None and task.root not in self._roots:
            self._roots.add(task.root)
            sys.path.insert(0, task.root)
        failed = caller.load()
        self._environment.keep_changes()
        self._remember()
        return failed

    def _remember(self) -> None:
        """Take the process as it is now as what later jobs are to find."""
        if self._launch.single_use:
            return
        names = self._launch.private if self._launch.directory is not None else ()
        if self._surroundings is not None:
            self._surroundings.close()
        places = tuple(os.path.join(str(self._launch.directory), name) for name in names)
        self._surroundings = Surroundings(places)


def _variables_of(calls: Calls, call: Call) -> dict[str, str]:
    return {
        "BLIXARD_JOB_ID": call.job_id,
        "BLIXARD_ATTEMPT": str(call.attempt),
        "BLIXARD_NAMESPACE": calls.namespace,
    }
