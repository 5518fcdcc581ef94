"""The way of job output from a worker to the store: in order, in batches, and before the job's end is reported."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from blixard.backends.contract import Stream
from blixard.domain.lease import AttemptRef
from blixard.domain.limits import KIB, MIB
from blixard.domain.log import LogRecord
from blixard.errors import BlixardError, SessionExpired
from blixard.protocol.workers import LogBatch
from blixard.services.clock import Clock
from blixard.worker.backoff import Backoff
from blixard.worker.gateway import WorkerGateway
from blixard.worker.sync_link import REPEATABLE

FLUSH_SECONDS = 0.02
FLUSH_BYTES = 64 * KIB
MAX_CALL_BYTES = 1 * MIB
MAX_BUFFERED_BYTES = 64 * MIB
"""Of all attempts together, while the store does not take it; what comes on top is dropped and counted."""
RECORD_OVERHEAD = 64
"""What a record costs beside its data: a job that writes single bytes must not fill the memory either."""
MERGE_MICROSECONDS = 20_000
logger = logging.getLogger(__name__)


class ExpiryListener(Protocol):
    def expired(self, error: SessionExpired) -> None: ...


class _Record:
    __slots__ = ("at", "data", "stream")

    def __init__(self, at: int, stream: Stream, data: bytes) -> None:
        self.at = at
        self.stream = stream
        self.data = bytearray(data)


class _Output:
    """What is not stored yet of one attempt. ``stored`` bytes are; ``ended``: nothing more comes."""

    __slots__ = ("done", "dropped", "ended", "records", "ref", "stored")

    def __init__(self, ref: AttemptRef) -> None:
        self.ref = ref
        self.records: deque[_Record] = deque()
        self.stored = 0
        self.dropped = 0
        self.ended = False
        self.done: asyncio.Future[None] | None = None

    def add(self, at: int, stream: Stream, data: bytes) -> int:
        """Keep ``data`` and return what it costs."""
        last = self.records[-1] if self.records else None
        if last and last.stream is stream and at - last.at < MERGE_MICROSECONDS and len(last.data) < FLUSH_BYTES:
            last.data += data
            return len(data)
        self.records.append(_Record(at, stream, data))
        return len(data) + RECORD_OVERHEAD

    def finish(self) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(None)


class LogShipper:
    """Buffers the output of a session's attempts and appends it to the store, one call at a time, each repeated until answered."""

    def __init__(self, gateway: WorkerGateway, session: str, clock: Clock, listener: ExpiryListener) -> None:
        self._gateway = gateway
        self._session = session
        self._clock = clock
        self._listener = listener
        self._outputs: dict[AttemptRef, _Output] = {}
        self._pending: dict[AttemptRef, _Output] = {}
        self._buffered = 0
        self._urgent = asyncio.Event()
        self._something = asyncio.Event()

    def write(self, ref: AttemptRef, at: int, stream: Stream, data: bytes) -> None:
        """Take output of a running attempt. Never blocks; drops it, counted, when ``MAX_BUFFERED_BYTES`` are waiting."""
        output = self._outputs.get(ref)
        if output is None:
            output = self._outputs[ref] = _Output(ref)
        if self._buffered + len(data) > MAX_BUFFERED_BYTES:
            output.dropped += len(data)
            return
        self._buffered += output.add(at, stream, data)
        self._pending[ref] = output
        self._something.set()
        if self._buffered >= FLUSH_BYTES:
            self._urgent.set()

    async def finish(self, ref: AttemptRef, *, dropped: int = 0) -> None:
        """Return once everything that the attempt wrote is stored and its log closed, or the lease is known to be lost.

        ``dropped`` bytes were over the attempt's cap and did not come here.
        """
        output = self._outputs.get(ref)
        if output is None:
            return
        output.dropped += dropped
        output.ended = True
        output.done = asyncio.get_running_loop().create_future()
        self._pending[ref] = output
        self._something.set()
        self._urgent.set()
        await output.done

    def forget(self, ref: AttemptRef) -> None:
        """Throw away what is not stored: the attempt is not ours any more."""
        output = self._outputs.pop(ref, None)
        self._pending.pop(ref, None)
        if output is not None:
            self._buffered -= sum(len(r.data) + RECORD_OVERHEAD for r in output.records)
            output.records.clear()
            output.finish()

    async def run(self) -> None:
        """Ship until cancelled or the session has expired."""
        while True:
            await self._something.wait()
            await self._wait_for_more()
            self._something.clear()
            self._urgent.clear()
            try:
                while self._pending:
                    await self._ship()
            except SessionExpired as error:
                self._listener.expired(error)
                return

    async def _wait_for_more(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._urgent.wait()
        except TimeoutError:
            return

    async def _ship(self) -> None:
        batches = self._next_batches()
        refused = batches if len(batches) == 1 else []
        if not await self._append(batches):
            # One stale attempt refuses the call for all: each goes by itself, and only the stale one is dropped.
            refused = refused or [batch for batch in batches if not await self._append([batch])]
            for batch in refused:
                self.forget(batch.ref)

    def _next_batches(self) -> list[LogBatch]:
        batches = []
        room = MAX_CALL_BYTES
        while self._pending and room > 0:
            output = self._pending.pop(next(iter(self._pending)))
            records = self._take(output, room)
            room -= sum(len(record.data) for record in records)
            ended = output.ended and not output.records
            batches.append(
                LogBatch(
                    ref=output.ref,
                    offset=output.stored,
                    records=records,
                    ended=ended,
                    dropped=output.dropped if ended else 0,
                )
            )
            if output.records:
                self._pending[output.ref] = output
        return batches

    def _take(self, output: _Output, room: int) -> list[LogRecord]:
        taken = []
        while output.records and room > 0:
            record = output.records.popleft()
            self._buffered -= len(record.data) + RECORD_OVERHEAD
            room -= len(record.data)
            taken.append(LogRecord(record.at, str(record.stream), bytes(record.data)))
        return taken

    async def _append(self, batches: Sequence[LogBatch]) -> bool:
        """Store the batches and return True, or return False if one of them is refused. Raises ``SessionExpired``."""
        backoff = Backoff(self._clock)
        while True:
            try:
                await self._gateway.append_logs(self._session, batches)
                break
            except SessionExpired:
                raise
            except REPEATABLE as error:
                logger.debug("output was not taken and is sent again: %s", error)
            except BlixardError as error:
                logger.warning("output of %s is refused: %s", [batch.ref.job_id for batch in batches], error)
                return False
            await backoff.pause()
        for batch in batches:
            self._note_stored(batch)
        return True

    def _note_stored(self, batch: LogBatch) -> None:
        output = self._outputs.get(batch.ref)
        if output is None:
            return
        output.stored += sum(len(record.data) for record in batch.records)
        if batch.ended:
            del self._outputs[batch.ref]
            output.finish()
