"""A job for a person: one row of a list, or everything about it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence

import msgspec

from blixard.cli.output import show_duration, show_time
from blixard.client.endings import describe_error
from blixard.protocol.jobs import AttemptView, EventView, JobDetail, JobView


def list_columns() -> tuple[str, ...]:
    return ("ID", "STATE", "NAME", "AGE", "DURATION", "ATTEMPT", "EXIT", "QUEUE")


def job_row(job: JobView, now: dt.datetime) -> tuple[str, ...]:
    return (
        job.id,
        str(job.state),
        job.name,
        show_age((now - job.created_at).total_seconds()),
        show_duration(job.duration),
        str(job.attempt),
        "-" if job.exit_code is None else str(job.exit_code),
        job.queue,
    )


def show_age(seconds: float) -> str:
    """Return a rough age: 5s, 12m, 3h, 4d."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def describe_job(job: JobDetail, events: Sequence[EventView]) -> str:
    """Return the text of `blixard job ID`."""
    width = 12
    lines = [f"{name:<{width}} {value}" for name, value in _facts(job) if value]
    if job.error is not None:
        lines += ["", describe_error(job.error)]
        lines += [job.error.traceback.rstrip()] if job.error.traceback else []
        lines += [f"hint: {job.error.hint}"] if job.error.hint else []
    if job.attempts:
        lines += ["", "attempts", *(f"  {_describe_attempt(attempt)}" for attempt in job.attempts)]
    if events:
        lines += ["", "events", *(f"  {show_time(event.at)}  {event.type}{_who(event)}" for event in events)]
    return "\n".join(lines)


def _facts(job: JobDetail) -> Iterator[tuple[str, str]]:
    yield "id", job.id
    yield "name", job.name
    yield "state", f"{job.state}{' (cancel requested)' if job.cancel_requested and not job.state.is_terminal else ''}"
    yield "runs", f"{job.runtime}, isolation {job.isolation}"
    yield "payload", msgspec.json.encode(job.spec.payload).decode()
    yield "arguments", f"blob {job.arguments_blob}" if job.arguments_blob else _cut(bytes(job.arguments).decode())
    yield "queue", f"{job.queue}, priority {job.priority}"
    yield "tags", ", ".join(job.tags)
    yield "environment", ", ".join(f"{name}={value}" for name, value in job.spec.environment.items())
    yield "grants", _describe_grants(job)
    yield "timeout", show_duration(job.spec.timeout) if job.spec.timeout is not None else ""
    yield "retries", f"{job.failures} failed of {job.spec.retry.retries + 1}, {job.lost} lost" if job.attempt else ""
    yield "batch", f"{job.batch}, number {job.batch_index}" if job.batch else ""
    yield "created", show_time(job.created_at)
    yield "due", show_time(job.run_at) if job.run_at > job.created_at else ""
    yield "started", show_time(job.started_at)
    yield "finished", f"{show_time(job.finished_at)}, after {show_duration(job.duration)}" if job.finished_at else ""
    yield "worker", job.worker or ""
    yield "exit code", "" if job.exit_code is None else str(job.exit_code)
    yield "result", f"blob {job.result_blob}" if job.result_blob else _cut(bytes(job.result or b"").decode())


def _cut(text: str, most: int = 2_000) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters; --json shows all)"


def _describe_grants(job: JobDetail) -> str:
    grants = job.spec.grants
    parts = [f"read {path}" for path in grants.read] + [f"write {path}" for path in grants.write]
    return ", ".join([*parts, "network"] if grants.network else parts)


def _describe_attempt(attempt: AttemptView) -> str:
    outcome = str(attempt.outcome) if attempt.outcome else "running"
    error = f": {describe_error(attempt.error)}" if attempt.error else ""
    return f"{attempt.attempt}  {show_time(attempt.claimed_at)}  {outcome} on {attempt.worker}{error}"


def _who(event: EventView) -> str:
    worker = f" on {event.worker}" if event.worker else ""
    return f" (attempt {event.attempt}{worker})" if event.attempt else ""
