"""Leases: claim, start, finish, lose. Every write is guarded by (state, attempt, session)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import msgspec

from blixard.domain.lease import AttemptRef, ClaimedJob, FinishedAttempt, StartedAttempt
from blixard.domain.limits import MAX_ATTEMPTS
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.retry import RetryPolicy
from blixard.domain.state_machine import JobState
from blixard.storage.database import Database, Params, Row
from blixard.storage.repositories.rows import encode, inputs_of, maybe_text, number, raw, text
from blixard.storage.statements import Statements

_retry_decoder = msgspec.json.Decoder(RetryPolicy)


class Ended(msgspec.Struct, frozen=True):
    """A job whose attempt a statement ended, and what it became."""

    job_id: str
    state: JobState
    class_id: int
    batch: str | None


class RetryFacts(msgspec.Struct, frozen=True):
    failures: int
    policy: RetryPolicy


def _claimed_of(row: Row) -> ClaimedJob:
    return ClaimedJob(
        ref=AttemptRef(text(row[0]), text(row[1]), number(row[2])),
        spec=number(row[3]),
        arguments=raw(row[4]) or msgspec.Raw(b"[]"),
        arguments_blob=maybe_text(row[5]),
        inputs=inputs_of(row[6]),
    )


def _claimed_of_all(rows: list[Row]) -> list[ClaimedJob]:
    rows.sort(key=lambda row: (-number(row[7]), row[8], row[9]))
    return [_claimed_of(row) for row in rows]


def _ref(row: Row) -> AttemptRef:
    return AttemptRef(text(row[0]), text(row[1]), number(row[2]))


class LeaseRepository:
    def __init__(self, database: Database, statements: Statements) -> None:
        self._database = database
        self._sql = statements

    async def claim(
        self, *, session: str, worker: str, number: int, classes: Iterable[int], want: int, now: int
    ) -> list[ClaimedJob]:
        """Lease up to ``want`` due jobs, best first. The same number again claims nothing: see ``claimed_by``."""
        params: Params = {
            "session": session,
            "worker": worker,
            "number": number,
            "classes": encode(list(classes)),
            "want": want,
            "now": now,
            "max_attempts": MAX_ATTEMPTS,
        }
        return _claimed_of_all(await self._database.write(self._sql["claim_jobs"], params))

    async def claimed_by(self, session: str, number: int) -> list[ClaimedJob]:
        """Return what that sync claimed and the session still holds."""
        rows = await self._database.read(self._sql["find_claimed"], {"session": session, "number": number})
        return _claimed_of_all(rows)

    async def start(self, session: str, started: Sequence[StartedAttempt], now: int) -> None:
        """Mark leases as in progress since ``now``; stale ones change nothing."""
        reports = [(s.ref.namespace, s.ref.job_id, s.ref.attempt, now) for s in started]
        params: Params = {"session": session, "reports": encode(reports), "now": now}
        await self._database.write(self._sql["start_attempts"], params)

    async def finish(
        self,
        namespace: str,
        session: str,
        finished: Sequence[FinishedAttempt],
        retry_at: dict[AttemptRef, int],
        now: int,
    ) -> set[AttemptRef]:
        """End attempts; return those that changed. Stale reports change nothing and are not returned."""
        completed: dict[str, FinishedAttempt] = {}
        others = []
        for item in finished:
            if _is_plain(item, namespace) and item.ref.job_id not in completed:
                completed[item.ref.job_id] = item
            else:
                others.append(item)
        ended = await asyncio.gather(
            self._complete(namespace, session, completed, now), self._finish(session, others, retry_at, now)
        )
        changed = set().union(*ended)
        return {item.ref for item in finished if (item.ref.job_id, item.ref.attempt) in changed}

    async def _complete(
        self, namespace: str, session: str, completed: dict[str, FinishedAttempt], now: int
    ) -> set[tuple[str, int]]:
        if not completed:
            return set()
        reports = {
            job_id: (item.ref.attempt, _started_at(item.outcome, now), _result_text(item.outcome))
            for job_id, item in completed.items()
        }
        params: Params = {"namespace": namespace, "session": session, "reports": encode(reports), "now": now}
        return _changed(await self._database.write(self._sql["complete_attempts"], params))

    async def _finish(
        self, session: str, finished: Sequence[FinishedAttempt], retry_at: dict[AttemptRef, int], now: int
    ) -> set[tuple[str, int]]:
        if not finished:
            return set()
        reports = [_report(item, retry_at.get(item.ref), now) for item in finished]
        params: Params = {"session": session, "reports": encode(reports), "now": now}
        return _changed(await self._database.write(self._sql["finish_attempts"], params))

    async def already_ended(self, session: str, refs: Iterable[AttemptRef]) -> set[AttemptRef]:
        """Return those that this session has ended before: a repeated report, not a stale one."""
        params: Params = {"session": session, "reports": encode(list(refs))}
        return {_ref(row) for row in await self._database.read(self._sql["find_attempt_outcomes"], params)}

    async def retry_facts(self, refs: Iterable[AttemptRef]) -> dict[tuple[str, str], RetryFacts]:
        """Return failures so far and retry policy by (namespace, job id)."""
        ids = [(ref.namespace, ref.job_id) for ref in refs]
        rows = await self._database.read(self._sql["find_retry_facts"], {"ids": encode(ids)})
        return {
            (text(r[0]), text(r[1])): RetryFacts(
                number(r[2]), RetryPolicy() if r[3] is None else _retry_decoder.decode(text(r[3]))
            )
            for r in rows
        }

    async def cancelled(self, session: str) -> list[AttemptRef]:
        """Return the leases of a session whose end was asked for."""
        return [_ref(row) for row in await self._database.read(self._sql["list_cancelled"], {"session": session})]

    async def held_by(self, session: str) -> dict[AttemptRef, int]:
        """Return all leases of a session with the number of the sync that claimed each."""
        rows = await self._database.read(self._sql["list_leases"], {"session": session})
        return {_ref(row): number(row[3]) for row in rows}

    async def lose(
        self, session: str, *, refs: Sequence[AttemptRef] | None, message: str, limit: int, now: int
    ) -> list[Ended]:
        """Take leases away, those of ``refs`` or any, at most ``limit``; started ones count as lost, others go back free."""
        params: Params = {
            "session": session,
            "refs": "[]" if refs is None else encode(refs),
            "message": message,
            "limit": limit,
            "max_attempts": MAX_ATTEMPTS,
            "now": now,
        }
        rows = await self._database.write(self._sql["lose_leases"], params)
        return [Ended(text(r[0]), JobState(text(r[1])), number(r[2]), maybe_text(r[3])) for r in rows]


def _is_plain(item: FinishedAttempt, namespace: str) -> bool:
    """Say whether ``complete_attempts`` can tell how it ended."""
    outcome = item.outcome
    return (
        outcome.kind is OutcomeKind.COMPLETED
        and outcome.error is None
        and outcome.exit_code is None
        and outcome.result_blob is None
        and item.ref.namespace == namespace
    )


def _changed(rows: list[Row]) -> set[tuple[str, int]]:
    return {(text(row[0]), number(row[1])) for row in rows}


def _started_at(outcome: Outcome, now: int) -> int | None:
    """The worker's clock tells how long it ran, ours when: retention trusts no worker's clock."""
    if outcome.started_at is None or outcome.finished_at is None:
        return None
    return now - max(0, outcome.finished_at - outcome.started_at)


def _result_text(outcome: Outcome) -> str | None:
    """Return the JSON text of the result; a null is none."""
    result = None if outcome.result is None else bytes(outcome.result)
    return None if result is None or result == b"null" else result.decode()


def _report(item: FinishedAttempt, retry_at: int | None, now: int) -> tuple[object, ...]:
    """Return one element of ``finish_attempts``."""
    ref, outcome = item.ref, item.outcome
    return (
        ref.namespace,
        ref.job_id,
        ref.attempt,
        outcome.kind,
        _started_at(outcome, now),
        now,
        outcome.exit_code,
        _result_text(outcome),
        outcome.result_blob,
        outcome.error,
        outcome.error is None or outcome.error.retryable,
        retry_at,
    )
