"""One attempt from its blobs to its stored result: prepare, execute, store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

import msgspec

from blixard.backends.contract import Execution, StopReason
from blixard.domain.limits import MAX_INLINE_RESULT_BYTES, MAX_RESULT_BYTES
from blixard.domain.outcome import Outcome
from blixard.errors import BlixardError, InternalError
from blixard.services.clock import Clock
from blixard.worker import outcomes
from blixard.worker.backoff import Backoff
from blixard.worker.gateway import WorkerGateway
from blixard.worker.held import HeldAttempt, Phase
from blixard.worker.local_files import LocalFiles
from blixard.worker.log_shipper import LogShipper
from blixard.worker.sync_link import REPEATABLE

T = TypeVar("T")
logger = logging.getLogger(__name__)


class AttemptRunner:
    """Never raises for anything that happens to a job: every attempt ends in an ``Outcome``."""

    def __init__(self, gateway: WorkerGateway, files: LocalFiles, logs: LogShipper, clock: Clock) -> None:
        self._gateway = gateway
        self._files = files
        self._logs = logs
        self._clock = clock

    def begin(self, held: HeldAttempt) -> bool:
        """Hand it to its backend and return True if nothing must be awaited before. Then ``held`` hears of its end."""
        bulk = held.kind.bulk
        if bulk is None or held.claim.arguments_blob is not None:
            return False
        if held.digests:
            ready = self._files.pin_ready(held.digests)
            if ready is None:
                return False
            held.blobs = ready
        claim = held.claim
        held.phase = Phase.EXECUTING
        try:
            bulk.submit(
                Execution(
                    ref=held.ref,
                    spec=held.kind.spec,
                    arguments=bytes(claim.arguments),
                    inputs=claim.inputs,
                    blobs=held.blobs,
                ),
                held,
            )
        except Exception as error:  # the edge of a job: one that breaks a backend must not end the others
            logger.exception("the backend broke under %s", held.ref)
            held.ended(outcomes.broken(error))
        return True

    async def execute(self, held: HeldAttempt) -> Outcome:
        """Bring what the job needs, and run it. Repeats while the store cannot be reached, until interrupted."""
        try:
            if held.digests:
                found = self._files.pin_ready(held.digests) or await self._move(held, self._fetch(held))
                if found is None:
                    return outcomes.not_started(held.stop_reason or StopReason.RELEASE)
                held.blobs = found
            return await self._run(held)
        except (BlixardError, OSError) as error:
            return outcomes.not_prepared(error)

    def release(self, held: HeldAttempt) -> None:
        """It has ended: its blobs may go."""
        if held.blobs:
            self._files.unpin(held.blobs)

    def interrupt(self, held: HeldAttempt, reason: StopReason) -> None:
        """Stop it early. What has ended is only stopped from storing its output, and only if the lease is lost."""
        if held.phase is Phase.EXECUTING:
            assert held.kind.backend is not None
            held.kind.backend.interrupt(held.ref, reason)
            return
        if held.phase is Phase.PREPARING:
            held.stop_reason = reason
        elif not held.lost:
            return
        if held.moving is not None:
            held.moving.cancel()

    def is_large(self, outcome: Outcome) -> bool:
        return outcome.result is not None and len(bytes(outcome.result)) > MAX_INLINE_RESULT_BYTES

    async def store(self, held: HeldAttempt, outcome: Outcome) -> Outcome:
        """Store the rest of the output and a large result, and return the outcome as it is reported."""
        stored = await self._move(held, self._store(held, outcome))
        return stored if stored is not None else outcome

    async def _run(self, held: HeldAttempt) -> Outcome:
        if held.stop_reason is not None:
            return outcomes.not_started(held.stop_reason)
        backend = held.kind.backend
        if backend is None:
            raise InternalError(f"this worker has no backend for {held.kind.spec.requirements}")
        claim = held.claim
        arguments = bytes(claim.arguments)
        if claim.arguments_blob is not None:
            arguments = await asyncio.to_thread(held.blobs[claim.arguments_blob].read_bytes)
        execution = Execution(
            ref=held.ref, spec=held.kind.spec, arguments=arguments, inputs=claim.inputs, blobs=held.blobs
        )
        held.phase = Phase.EXECUTING
        try:
            return await backend.execute(execution, held)
        except Exception as error:  # the edge of a job: one that breaks a backend must not end the others
            logger.exception("the backend broke under %s", held.ref)
            return outcomes.broken(error)

    async def _move(self, held: HeldAttempt, work: Coroutine[None, None, T]) -> T | None:
        """Await ``work``, which ``interrupt`` may end: then return None."""
        task = asyncio.create_task(work)  # this coroutine owns it: awaited in any case, cancelled with us
        held.moving = task
        try:
            return await task
        except asyncio.CancelledError:
            if held.stop_reason is None and not held.lost:
                raise
            return None
        finally:
            held.moving = None

    async def _fetch(self, held: HeldAttempt) -> dict[str, Path]:
        backoff = Backoff(self._clock)
        while True:
            try:
                return await self._files.pin(held.digests, held.kind.bundle)
            except REPEATABLE as error:
                logger.warning("the blobs of %s did not come and are asked for again: %s", held.ref.job_id, error)
            await backoff.pause()

    async def _store(self, held: HeldAttempt, outcome: Outcome) -> Outcome:
        if self.is_large(outcome):
            outcome = await self._store_result(outcome)
        if held.has_output:
            over = outcome.output_bytes - held.kind.spec.max_output_bytes
            await self._logs.finish(held.ref, dropped=max(over, 1) if outcome.output_truncated else 0)
        return outcome

    async def _store_result(self, outcome: Outcome) -> Outcome:
        content = bytes(outcome.result or b"")
        if len(content) > MAX_RESULT_BYTES:
            return outcomes.too_large(outcome, len(content))
        backoff = Backoff(self._clock)
        while True:
            try:
                digest = await self._gateway.put_blob(content)
                return msgspec.structs.replace(outcome, result=None, result_blob=digest)
            except REPEATABLE as error:
                logger.warning("a result was not taken and is sent again: %s", error)
            except BlixardError as error:
                return outcomes.not_prepared(error)
            await backoff.pause()
