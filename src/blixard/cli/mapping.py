"""`map`: submits the inputs of a batch that are not submitted yet while the results of all of them come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from blixard.cli.map_inputs import MapInput, MapInputs
from blixard.cli.progress import ProgressView, Tally
from blixard.client.contract import AsyncClient
from blixard.client.endings import describe_end, index_in_batch, result_bytes
from blixard.client.submission import make_job, submit_batch
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.errors import InvalidRequest
from blixard.protocol.jobs import BatchView, JobResult

UPLOADS = 8
"""Files that are sent at the same time."""
RESULTS_WAIT_SECONDS = 20.0
COUNT_SECONDS = 1.0
"""Between two looks at how many jobs are running."""
TRACEBACKS_SHOWN = 3
FAILURES_SHOWN = 20


class MapRun:
    """One process's part in a map: it may have been begun by an earlier one, which may have been killed."""

    def __init__(
        self,
        client: AsyncClient,
        spec: JobSpec,
        inputs: MapInputs,
        batch: BatchView,
        view: ProgressView,
        *,
        as_json: bool,
        priority: int = 0,
    ) -> None:
        self._client = client
        self._spec = spec
        self._inputs = inputs
        self._batch = batch
        self._view = view
        self._write: Callable[[MapInput, JobResult, bytes], bytes] = write_json if as_json else write_text
        self._states = bytearray(len(inputs))
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._failures = 0
        self._priority = priority
        before = batch.counts.get(JobState.COMPLETED, 0)
        self.tally = Tally(total=len(inputs), before=before)

    async def run(self) -> Tally:
        """Return when every job of the map has ended and its result is written. Can be cancelled at any time."""
        async with asyncio.TaskGroup() as group:
            counting = group.create_task(self._count_running(), name="map: count")
            submitting = group.create_task(self._submit_rest(), name="map: submit")
            await self._take_results()
            await submitting
            counting.cancel()
        return self.tally

    async def _submit_rest(self) -> None:
        await submit_batch(
            self._client, self._spec, self._batch, lambda index: len(self._inputs[index].line), self._make_jobs
        )

    async def _make_jobs(self, numbers: range) -> list[NewJob]:
        return await asyncio.gather(*(self._make_job(self._inputs[number]) for number in numbers))

    async def _make_job(self, item: MapInput) -> NewJob:
        if item.file is None:
            return await make_job(self._client, item.arguments, priority=self._priority)
        async with self._uploads:
            digest = await self._client.put_blob(Path(item.line))
            if digest != item.file:
                raise InvalidRequest(
                    f"{item.line} has changed since the map began",
                    field="list",
                    hint="run the command again: changed files make a new map",
                )
            inputs = (item.input_file,) if item.input_file else ()
            return await make_job(self._client, item.arguments, inputs=inputs, priority=self._priority)

    async def _take_results(self) -> None:
        position, done = 0, False
        while not done:
            page = await self._client.batch_results(
                self._batch.id, after=position, limit=MAX_BATCH_JOBS, wait=RESULTS_WAIT_SECONDS
            )
            position, done = page.position, page.done
            await self._show_results(page.results)

    async def _show_results(self, results: Sequence[JobResult]) -> None:
        lines = []
        for result in results:
            index = index_in_batch(result)
            item = self._inputs[index]
            self._count(index, result)
            lines.append(self._write(item, result, await result_bytes(self._client, result) or b"null"))
            if result.state is not JobState.COMPLETED:
                self._tell_failure(item, result)
        if lines:
            # In a thread: a reader that is slow must not hold up the worker's answers.
            await asyncio.to_thread(self._view.print, b"".join(lines))
        self._view.show(self.tally)

    def _count(self, index: int, result: JobResult) -> None:
        """Count the job as it stands now: one that was retried meanwhile comes a second time."""
        for kind, change in ((self._states[index], -1), (_KINDS.index(result.state), 1)):
            match _KINDS[kind]:
                case JobState.COMPLETED:
                    self.tally.completed += change
                case JobState.FAILED:
                    self.tally.failed += change
                case JobState.CANCELLED:
                    self.tally.cancelled += change
        self._states[index] = _KINDS.index(result.state)

    def _tell_failure(self, item: MapInput, result: JobResult) -> None:
        self._failures += 1
        if self._failures > FAILURES_SHOWN:
            return
        if self._failures <= TRACEBACKS_SHOWN and result.error is not None and result.error.traceback:
            self._view.warn(f"{item.line}:\n{result.error.traceback.rstrip()}")
        else:
            self._view.warn(f"{item.line}: {describe_end(result)}")
        if self._failures == FAILURES_SHOWN:
            self._view.warn(f"more failures are not shown here: `blixard jobs --state failed --batch {self._batch.id}`")

    async def _count_running(self) -> None:
        while True:
            view = await self._client.batch(self._batch.id)
            self.tally.running = sum(view.counts.get(state, 0) for state in (JobState.CLAIMED, JobState.IN_PROGRESS))
            self._view.show(self.tally)
            await asyncio.sleep(COUNT_SECONDS)


_KINDS = (JobState.PENDING, JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


def write_json(item: MapInput, result: JobResult, value: bytes) -> bytes:
    """Return one line: an object with input, id, state and result, and for a job without a result its error."""
    line: dict[str, object] = {
        "input": item.line,
        "id": result.id,
        "state": result.state,
        "result": msgspec.Raw(value),
    }
    if result.error is not None:
        line["error"] = result.error
    return msgspec.json.encode(line) + b"\n"


def write_text(item: MapInput, result: JobResult, value: bytes) -> bytes:
    """Return input and result with a tab between; a job without a result is told on standard error instead."""
    if result.state is not JobState.COMPLETED:
        return b""
    return item.line.encode() + b"\t" + value + b"\n"
