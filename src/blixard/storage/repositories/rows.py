"""From rows to values and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

import msgspec

from blixard.domain.grants import InputFile
from blixard.domain.job import Attempt, Job, JobAssignment, JobMetadata
from blixard.domain.outcome import AttemptError, OutcomeKind
from blixard.domain.spec import JobSpec
from blixard.domain.state_machine import JobState
from blixard.storage.database import Row

T = TypeVar("T")
_encoder = msgspec.json.Encoder()
_error_decoder = msgspec.json.Decoder(AttemptError)
_inputs_decoder = msgspec.json.Decoder(tuple[InputFile, ...])


def encode(value: object) -> str:
    """Return JSON text for a statement's parameter."""
    return _encoder.encode(value).decode()


def text(value: object) -> str:
    return cast("str", value)


def number(value: object) -> int:
    return cast("int", value)


def maybe_text(value: object) -> str | None:
    return cast("str | None", value)


def maybe_number(value: object) -> int | None:
    return cast("int | None", value)


def texts(rows: Iterable[Row]) -> list[str]:
    """Return the first column of each row."""
    return [text(row[0]) for row in rows]


def raw(value: object) -> msgspec.Raw | None:
    return None if value is None else msgspec.Raw(text(value).encode())


def error_of(value: object) -> AttemptError | None:
    return None if value is None else _error_decoder.decode(text(value))


def inputs_of(value: object) -> tuple[InputFile, ...]:
    return () if value is None else _inputs_decoder.decode(text(value))


def outcome_of(value: object) -> OutcomeKind | None:
    return None if value is None else OutcomeKind(text(value))


class SpecDecoder:
    """Decodes specs, remembering the last few: neighbouring jobs share theirs."""

    MAX_REMEMBERED = 256

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(JobSpec)
        self._remembered: dict[str, JobSpec] = {}

    def decode(self, body: str) -> JobSpec:
        spec = self._remembered.get(body)
        if spec is None:
            spec = self._decoder.decode(body)
            if len(self._remembered) >= self.MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[body] = spec
        return spec


def job_of(row: Row, specs: SpecDecoder) -> Job:
    """Return the job of a row of ``find_job``."""
    state, session, attempt = JobState(text(row[3])), maybe_text(row[19]), number(row[10])
    return Job(
        id=text(row[0]),
        namespace=text(row[1]),
        spec=specs.decode(text(row[2])),
        state=state,
        priority=number(row[4]),
        metadata=JobMetadata(
            created_at=number(row[5]),
            updated_at=number(row[6]),
            run_at=number(row[7]),
            started_at=maybe_number(row[8]),
            finished_at=maybe_number(row[9]),
            attempt=attempt,
            failures=number(row[11]),
            lost=number(row[12]),
            cancel_requested_at=maybe_number(row[13]),
        ),
        arguments=raw(row[14]) or msgspec.Raw(b"[]"),
        arguments_blob=maybe_text(row[15]),
        inputs=inputs_of(row[16]),
        batch=maybe_text(row[17]),
        batch_index=maybe_number(row[18]),
        assignment=None
        if session is None
        else JobAssignment(session=session, worker=text(row[20]), attempt=attempt, claimed_at=number(row[21])),
        result=raw(row[22]),
        result_blob=maybe_text(row[23]),
        exit_code=maybe_number(row[24]),
        error=error_of(row[25]),
        outcome=outcome_of(row[26]),
    )


def attempt_of(job_id: str, row: Row) -> Attempt:
    """Return the attempt of a row of ``list_attempts``."""
    return Attempt(
        job_id=job_id,
        attempt=number(row[0]),
        session=text(row[1]),
        worker=text(row[2]),
        claimed_at=number(row[3]),
        started_at=maybe_number(row[4]),
        finished_at=number(row[5]),
        outcome=OutcomeKind(text(row[6])),
        exit_code=maybe_number(row[7]),
        error=error_of(row[8]),
    )
