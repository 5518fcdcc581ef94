"""What all backends share that run jobs in processes forked from the zygote: queue, slots, pipelines, timeouts, interrupts.

A subclass says what this host allows and how one attempt is launched. See DESIGN.md.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path

import msgspec

from blixard.backends.attempt import MAX_BATCH, MAX_BATCH_BYTES, MAX_SPAWNS, Attempt, Pace, Waiter
from blixard.backends.contract import (
    BackendInfo,
    BackendSettings,
    EndObserver,
    Execution,
    ExecutionObserver,
    StopReason,
)
from blixard.backends.executor.messages import Answer, Call, Calls, Task, encode
from blixard.backends.outcomes import ended_early, now, outcome_of_answer, outcome_of_exit, refused, timed_out
from blixard.backends.runner import Runner
from blixard.backends.slots import Slots
from blixard.backends.workspace import remove_tree
from blixard.backends.zygote.client import ZygoteClient
from blixard.backends.zygote.messages import Exited, InputPlace, Launch, SpawnFailed
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.payload import FunctionPayload, ScriptPayload
from blixard.domain.spec import JobSpec
from blixard.errors import InternalError, NotSupportedHere

TICK_SECONDS = 0.02
"""How often heads of executors are looked at while anything runs: for timeouts, and to tell that they started."""
MAX_KNOWN_SPECS = 256
STOP_SECONDS = 30.0
ZYGOTE_TRIES = 3
"""One that ends while it starts may have been killed; only when that happens every time the host is at fault."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt runs: by a fresh runner that ``launch`` describes, with a call if it is Python.

    ``is_warm``: any executor that was launched for the same ``code`` will do.
    """

    launch: Launch
    task: bytes | None = None
    is_warm: bool = False
    code: str | None = None


class Refused(Exception):
    """An attempt cannot be run as it stands; the outcome says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.error)
        self.outcome = outcome


class _Known(msgspec.Struct):
    """What is worked out once per spec."""

    spec: JobSpec
    pace: Pace
    warm: Plan | None = None


class RunnerBackend(abc.ABC):
    """Implements ``ExecutionBackend`` but ``info``."""

    def __init__(self, settings: BackendSettings) -> None:
        self.settings = settings
        self._slots = settings.shared_slots or Slots(settings.slots)
        self._slots.join(self)
        self._waiting: deque[Attempt] = deque()
        self._attempts: dict[AttemptRef, Attempt] = {}
        self._alive: set[Runner] = set()
        self._executors: list[Runner] = []  # those of _alive that can be reused
        self._known: dict[int, _Known] = {}
        self._zygote: ZygoteClient | None = None
        self._starting: asyncio.Task[None] | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._is_stopping = False
        self._is_started = False
        self._all_gone = asyncio.Event()
        self._number = 0
        self._directories = 0

    # -- for subclasses -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def info(self) -> BackendInfo: ...

    @abc.abstractmethod
    def plan(self, execution: Execution) -> Plan:
        """Say how to run the attempt. Raises ``Refused``. Called for every attempt that cannot share the plan of its spec."""

    def amend(self, execution: Execution, outcome: Outcome) -> Outcome:  # noqa: ARG002 -- for subclasses that know more
        """Return the outcome as it is to be told. Called once per attempt, when nothing of it is left."""
        return outcome

    def new_directory(self) -> str:
        """Return the path of a private directory for one runner; its supervisor makes and removes it."""
        self._directories += 1
        return str(self.settings.scratch / f"{type(self).__name__}-{id(self):x}-{self._directories}")

    # -- the contract -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the zygote. Raises ``NotSupportedHere``."""
        info = self.info()
        if not info.isolations:
            raise NotSupportedHere(f"{info.name}: {'; '.join(info.missing.values())}", hint="run `blixard doctor`")
        self._is_stopping = False
        self._is_started = True
        await self._ensure_zygote()

    async def stop(self) -> None:
        self._is_stopping = True
        self._is_started = False
        for attempt in list(self._waiting):
            self._finish(attempt, ended_early(OutcomeKind.RELEASED, ""))
        self._waiting.clear()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._end_runners()
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            await zygote.stop()
        self._cancel_timers()
        await asyncio.to_thread(self._remove_directories)

    async def execute(self, execution: Execution, observer: ExecutionObserver) -> Outcome:
        waiter = Waiter(observer)
        self.submit(execution, waiter)
        try:
            return await waiter.outcome()
        except asyncio.CancelledError:  # our caller was: end the job, and return when nothing of it is left
            if execution.ref in self._attempts:
                self.interrupt(execution.ref, StopReason.KILL)
                await waiter.outcome()
            raise

    def submit(self, execution: Execution, observer: EndObserver) -> None:
        if self._is_stopping or not self._is_started:
            observer.ended(ended_early(OutcomeKind.RELEASED, ""))
            return
        attempt = Attempt(execution, observer)
        self._attempts[execution.ref] = attempt
        self._waiting.append(attempt)
        if self._soon is None:
            self._dispatch_soon()

    def interrupt(self, ref: AttemptRef, reason: StopReason) -> None:
        attempt = self._attempts.get(ref)
        if attempt is None or attempt.is_done:
            return
        if attempt.runner is not None and not attempt.runner.is_single_use:
            self._requeue(attempt.runner.settle())
        if attempt.is_done:
            return
        if attempt.runner is None:
            self._interrupt_waiting(attempt, reason)
        else:
            self._interrupt_running(attempt, attempt.runner, reason)
        self._dispatch_soon()

    # -- interrupts ---------------------------------------------------------------------------------------------------

    def _interrupt_waiting(self, attempt: Attempt, reason: StopReason) -> None:
        kinds = {
            StopReason.CANCEL: ended_early(OutcomeKind.CANCELLED, "cancelled before it started"),
            StopReason.RELEASE: ended_early(OutcomeKind.RELEASED, ""),
            StopReason.KILL: ended_early(OutcomeKind.LOST, "the lease ended before it started"),
        }
        self._finish(attempt, kinds[reason])

    def _interrupt_running(self, attempt: Attempt, runner: Runner, reason: StopReason) -> None:
        if reason is StopReason.CANCEL and attempt.ending is None:
            attempt.ending = OutcomeKind.CANCELLED
            attempt.kill_at = asyncio.get_running_loop().time() + self.settings.grace_seconds
            runner.terminate()
        elif reason is StopReason.KILL:
            attempt.ending = OutcomeKind.LOST
            runner.kill()

    # -- dispatch -----------------------------------------------------------------------------------------------------

    def _dispatch_soon(self) -> None:
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give waiting attempts, in their order, to runners, as long as there is room."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        while self._waiting and not self._is_stopping:
            attempt = self._waiting[0]
            placed = 1
            if not attempt.is_done:
                try:
                    placed = self._place(attempt)
                except Refused as refusal:
                    self._finish(attempt, refusal.outcome)
            if not placed:
                break
            for _ in range(placed):
                self._waiting.popleft()
        self._arm_tick()

    def _place(self, attempt: Attempt) -> int:
        """Start the first attempt that waits or put it, and more of its kind, behind others. Return how many found a place."""
        known = self._known_of(attempt.execution)
        if known.warm is not None and _may_share(attempt.execution):
            return self._place_warm(attempt, known.warm, known.pace)
        if not self._slots.may_take(self):
            return 0
        plan = self.plan(attempt.execution)
        if plan.is_warm:
            if known.warm is None:
                known.warm = plan
            return self._place_warm(attempt, plan, known.pace)
        return int(self._launch(attempt, plan))

    def _known_of(self, execution: Execution) -> _Known:
        spec = execution.spec
        known = self._known.get(id(spec))
        if known is None or known.spec is not spec:
            if len(self._known) >= MAX_KNOWN_SPECS:
                self._known.clear()
            known = self._known[id(spec)] = _Known(spec, Pace())
        return known

    def busy_slots(self) -> int:
        return sum(1 for runner in self._alive if runner.sent or not self._is_idle(runner))

    def wants_slot(self) -> bool:
        return bool(self._waiting) and not self._is_stopping

    def slot_is_free(self) -> None:
        if self._waiting:
            self._dispatch_soon()

    def _is_idle(self, runner: Runner) -> bool:
        return not runner.is_single_use and not runner.sent and not runner.is_ending

    def _place_warm(self, attempt: Attempt, plan: Plan, pace: Pace) -> int:
        if self._slots.must_yield(self):
            return 0
        best = self._best_executor(plan, pace)
        if self._slots.may_take(self):
            if best is None or best.sent:
                best = self._spawn_executor(plan) or best
        elif best is not None and not best.sent:
            return 0
        return 0 if best is None else self._send(best, self._batch(attempt, best, pace), plan, pace)

    def _best_executor(self, plan: Plan, pace: Pace) -> Runner | None:
        """Return one of this code that is idle, else the one with the fewest calls before it that has room."""
        best: Runner | None = None
        for runner in self._executors:
            if runner.code == plan.code and not runner.is_ending:
                if not runner.sent:
                    return runner
                if len(runner.sent) < min(runner.depth, pace.depth) and (
                    best is None or len(runner.sent) < len(best.sent)
                ):
                    best = runner
        return best

    def _batch(self, first: Attempt, runner: Runner, pace: Pace) -> list[Attempt]:
        """Return the first attempt and those right behind it that may go with it in one packet: a fair share of all that wait."""
        share = -(-len(self._waiting) // self.settings.slots)
        most = min(share, MAX_BATCH, self._depth(runner, pace) - len(runner.sent))
        batch = [first]
        if most <= 1 or not _may_share(first.execution):
            return batch
        spec, namespace = first.execution.spec, first.execution.ref.namespace
        size = len(first.execution.arguments)
        for attempt in itertools.islice(self._waiting, 1, most):
            execution = attempt.execution
            size += len(execution.arguments)
            if execution.spec is not spec or execution.ref.namespace != namespace or size > MAX_BATCH_BYTES:
                break
            if attempt.is_done or not _may_share(execution):
                break
            batch.append(attempt)
        return batch

    def _depth(self, runner: Runner, pace: Pace) -> int:
        return min(runner.depth, pace.depth) if runner.sent else pace.depth

    def _send(self, runner: Runner, batch: Sequence[Attempt], plan: Plan, pace: Pace | None) -> int:
        """Return how many were sent: all or none."""
        for number, attempt in enumerate(batch, self._number + 1):
            attempt.number = number
        self._number += len(batch)
        depth = 1 if pace is None else self._depth(runner, pace)
        if not runner.send(batch, encode(_calls(batch, plan))):
            return 0
        runner.depth = depth
        for attempt in batch:
            attempt.runner = runner
            attempt.pace = pace
        return len(batch)

    def _spawn_executor(self, plan: Plan) -> Runner | None:
        """Start an executor; one of other code that has nothing to do makes room for it."""
        if len(self._executors) >= self.settings.slots:
            idle = next((r for r in self._executors if not r.sent and not r.is_ending), None)
            if idle is not None:
                idle.kill()
        return self._spawn(plan, None)

    def _launch(self, attempt: Attempt, plan: Plan) -> bool:
        """Start a runner for this attempt alone."""
        runner = self._spawn(plan, attempt.execution.stdin)
        if runner is None:
            return False
        attempt.started_at = now()
        if plan.task is not None:
            self._send(runner, [attempt], plan, None)
        else:
            attempt.runner = runner
            runner.sent.append(attempt)
            runner.head_since = asyncio.get_running_loop().time()
        return True

    def _spawn(self, plan: Plan, stdin: Path | None) -> Runner | None:
        if self._zygote is None:
            self._start_zygote_soon()
            return None
        runner = Runner(self, code=plan.code, is_single_use=not plan.is_warm)
        launch = plan.launch
        if plan.is_warm:
            launch = self.warm_launch()
        try:
            runner.spawn(self._zygote, launch, stdin)
        except BlockingIOError:
            return None  # the tick tries again
        except ConnectionError:
            return None  # its end is noticed in a moment
        self._alive.add(runner)
        if not runner.is_single_use:
            self._executors.append(runner)
        return runner

    def warm_launch(self) -> Launch:
        """Return how a reusable executor is started. Only for backends that plan warm attempts."""
        raise InternalError(f"{type(self).__name__} plans no warm attempts")

    # -- the zygote ---------------------------------------------------------------------------------------------------

    async def _ensure_zygote(self) -> None:
        if self._zygote is None:
            self._start_zygote_soon()
        if self._starting is not None:
            await asyncio.wait({self._starting})
            if not self._starting.cancelled():  # it is when ``stop`` comes in between
                self._starting.result()

    def _start_zygote_soon(self) -> None:
        if self._starting is None or self._starting.done():
            self._start_task(self._start_zygote())

    def _start_task(self, work: Coroutine[None, None, None]) -> None:
        self._starting = asyncio.get_running_loop().create_task(work, name="start zygote")
        # Who waits for it gets its error; if nobody does, the waiting attempts have been told.
        self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _start_zygote(self) -> None:
        try:
            self._zygote = await self._try_zygotes()
        except (NotSupportedHere, OSError) as error:  # a TimeoutError, too
            self._give_up_waiting(f"the process that jobs are forked from could not start: {error}")
            raise
        self._dispatch_soon()

    async def _try_zygotes(self) -> ZygoteClient:
        for tries_left in reversed(range(ZYGOTE_TRIES)):
            zygote = ZygoteClient(lock_fd=self.settings.lock_fd, on_end=self._lose_zygote)
            try:
                await zygote.start()
            except NotSupportedHere:
                if not tries_left:
                    raise
            else:
                return zygote
        raise AssertionError("unreachable")

    def _give_up_waiting(self, reason: str) -> None:
        while self._waiting:
            self._finish(self._waiting.popleft(), ended_early(OutcomeKind.LOST, reason))

    def _lose_zygote(self) -> None:
        """It died: every supervisor dies with it and says so; new work needs a new one."""
        zygote, self._zygote = self._zygote, None
        if zygote is not None and not self._is_stopping:
            self._start_task(self._replace(zygote))

    async def _replace(self, dead: ZygoteClient) -> None:
        await dead.stop()
        await self._start_zygote()

    # -- what runners tell --------------------------------------------------------------------------------------------

    def answered(self, runner: Runner, attempt: Attempt, answer: Answer) -> None:
        attempt.runner = None
        if attempt.pace is not None:
            attempt.pace.learn(answer.duration)
        if attempt.ending is not None:
            self._finish(attempt, self._early_outcome(attempt, answer.started_at))
        else:
            self._finish(attempt, outcome_of_answer(answer))
        if runner.is_ending and not runner.is_gone:
            runner.kill()  # the job was told to end and did so nicely; its executor has heard the signal, too
        if self._waiting and self._soon is None:
            self._dispatch_soon()
        if not runner.sent:
            self._slots.freed()

    def gone(self, runner: Runner, unread: list[Attempt], end: Exited | SpawnFailed | None) -> None:
        self._alive.discard(runner)
        with contextlib.suppress(ValueError):
            self._executors.remove(runner)
        # An executor that ended without having taken any call cannot be blamed on a job, but it must not go on for ever.
        if isinstance(end, SpawnFailed):
            for attempt in unread:
                attempt.trouble = end.message
        self._requeue(unread, count=not runner.sent and not runner.has_answered)
        for attempt in runner.sent:
            attempt.runner = None
            self._finish_without_answer(attempt, runner, end)
        runner.sent.clear()
        if not self._alive:
            self._all_gone.set()
        self._dispatch_soon()
        self._slots.freed()

    def _finish_without_answer(self, attempt: Attempt, runner: Runner, end: Exited | SpawnFailed | None) -> None:
        if attempt.ending is not None:
            self._finish(attempt, self._early_outcome(attempt, attempt.started_at))
        elif runner.is_broken and attempt is runner.suspect:
            self._finish(attempt, refused("ChannelMisused", "the job wrote into descriptor 3, which is Blixard's own"))
        elif runner.is_broken:
            reason = "it, or another job of its process, wrote into descriptor 3, which is Blixard's own"
            self._finish(attempt, ended_early(OutcomeKind.LOST, reason, attempt.started_at))
        elif isinstance(end, SpawnFailed) and end.is_fault_of_job:
            self._finish(attempt, refused(end.error_type, end.message, exit_code=end.exit_code))
        elif isinstance(end, SpawnFailed) or (end is None and not runner.has_begun and not runner.has_channel):
            if end is not None:
                attempt.trouble = end.message
            self._requeue([attempt], count=True)
        elif end is None:
            self._finish(
                attempt, ended_early(OutcomeKind.LOST, "its process was ended from outside", attempt.started_at)
            )
        else:
            spec = attempt.execution.spec
            is_function = isinstance(spec.payload, FunctionPayload)
            memory = spec.requirements.memory_mb
            self._finish(
                attempt, outcome_of_exit(end.code, attempt.started_at, is_function=is_function, memory_mb=memory)
            )

    def _early_outcome(self, attempt: Attempt, started_at: int | None) -> Outcome:
        if attempt.ending is OutcomeKind.TIMED_OUT:
            return timed_out(attempt.execution.spec.timeout or 0.0, started_at)
        if attempt.ending is OutcomeKind.CANCELLED:
            return ended_early(OutcomeKind.CANCELLED, "cancelled while it ran", started_at)
        return ended_early(OutcomeKind.LOST, "the worker ended it", started_at)

    def _requeue(self, attempts: list[Attempt], *, count: bool = False) -> None:
        """Put attempts that nothing has begun back to the front, in their order. ``count``: their runner failed them."""
        for attempt in reversed(attempts):
            attempt.runner = None
            attempt.spawns += count
            if attempt.ending is not None:
                self._finish(attempt, self._early_outcome(attempt, None))
            elif attempt.spawns >= MAX_SPAWNS:
                self._finish(
                    attempt,
                    ended_early(OutcomeKind.LOST, f"it could not be started in {MAX_SPAWNS} tries: {attempt.trouble}"),
                )
            else:
                self._waiting.appendleft(attempt)

    def _finish(self, attempt: Attempt, outcome: Outcome) -> None:
        if self._attempts.get(attempt.execution.ref) is attempt:
            del self._attempts[attempt.execution.ref]
        attempt.finish(self.amend(attempt.execution, outcome))

    # -- the tick -----------------------------------------------------------------------------------------------------

    def _arm_tick(self) -> None:
        if self._tick is None and (self._waiting or any(runner.sent for runner in self._alive)):
            self._tick = asyncio.get_running_loop().call_later(TICK_SECONDS, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        for runner in list(self._alive):
            if runner.sent:
                self._look_at(runner)
        self._dispatch()

    def _look_at(self, runner: Runner) -> None:
        runner.hear()  # a late tick must not punish a job that has ended in time
        time = asyncio.get_running_loop().time()
        elapsed = time - runner.head_since
        if not runner.sent or runner.is_gone or elapsed < TICK_SECONDS:
            return
        if not runner.is_single_use:
            self._give_room(runner, elapsed)
        if not runner.sent:
            return
        head = runner.sent[0]
        if head.started_at is None:
            head.started_at = now() - int(elapsed * 1e6)
        head.start()
        self._check_time(runner, head, elapsed, time)

    def _give_room(self, runner: Runner, elapsed: float) -> None:
        """The head runs long: what waits behind it may run elsewhere, and its pipes can be read as they fill."""
        self._known_of(runner.sent[0].execution).pace.slow_down(elapsed)
        self._requeue(runner.settle())
        if len(runner.sent) == 1:
            runner.listen_to_pipes()

    def _check_time(self, runner: Runner, head: Attempt, elapsed: float, time: float) -> None:
        timeout = head.execution.spec.timeout
        if timeout is not None and elapsed >= timeout and head.ending is None:
            head.ending = OutcomeKind.TIMED_OUT
            runner.kill()
        elif head.kill_at is not None and time >= head.kill_at:
            head.kill_at = None
            runner.kill()

    # -- stopping -----------------------------------------------------------------------------------------------------

    async def _end_runners(self) -> None:
        for runner in list(self._alive):
            self._requeue(runner.settle())
            for attempt in runner.with_it():
                attempt.ending = attempt.ending or OutcomeKind.LOST
        for attempt in list(self._waiting):
            self._finish(attempt, ended_early(OutcomeKind.RELEASED, ""))
        self._waiting.clear()
        self._all_gone.clear()
        for runner in list(self._alive):
            runner.kill()
        if self._alive:
            with contextlib.suppress(TimeoutError):  # the end of the zygote will end them
                async with asyncio.timeout(STOP_SECONDS):
                    await self._all_gone.wait()

    def _cancel_timers(self) -> None:
        for handle in (self._tick, self._soon):
            if handle is not None:
                handle.cancel()
        self._tick = self._soon = None

    def _remove_directories(self) -> None:
        for path in self._own_directories():
            remove_tree(str(path))

    def _own_directories(self) -> Iterator[Path]:
        if self.settings.scratch.is_dir():
            yield from self.settings.scratch.glob(f"{type(self).__name__}-{id(self):x}-*")


def python_task(execution: Execution, root: str | None) -> bytes:
    """Return the encoded task of a Python job; ``root`` is the bundle as the job sees it."""
    spec = execution.spec
    match spec.payload:
        case FunctionPayload(function=function, encoding=encoding):
            task = Task(root, function, str(encoding), None, spec.environment, spec.requirements.memory_mb)
        case ScriptPayload(path=path):
            task = Task(root, None, "json", path, spec.environment, spec.requirements.memory_mb)
        case _:
            raise TypeError(f"{type(spec.payload).__name__} is not Python")
    return encode(task)


def _may_share(execution: Execution) -> bool:
    """Whether the plan of its spec is its own, too."""
    return not execution.inputs and execution.stdin is None


def _calls(batch: Sequence[Attempt], plan: Plan) -> Calls:
    assert plan.task is not None
    calls = []
    for attempt in batch:
        execution = attempt.execution
        inputs = input_places(execution) if plan.is_warm else ()
        calls.append(Call(attempt.number, execution.ref.job_id, execution.ref.attempt, execution.arguments, inputs))
    return Calls(batch[0].execution.ref.namespace, plan.task, tuple(calls))


def input_places(execution: Execution) -> tuple[InputPlace, ...]:
    return tuple(InputPlace(str(execution.blobs[item.digest]), item.path) for item in execution.inputs)
