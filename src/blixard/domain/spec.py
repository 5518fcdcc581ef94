"""The spec of a job: all that is the same for every job of one kind, stored once and shared by its jobs."""

from __future__ import annotations

import hashlib

import msgspec

from blixard.domain.grants import Grants, check_grants
from blixard.domain.limits import (
    DEFAULT_OUTPUT_BYTES,
    MAX_ENVIRONMENT,
    MAX_LABELS,
    MAX_NAME_LENGTH,
    MAX_SPEC_BYTES,
    MAX_TAGS,
    MAX_TIMEOUT_SECONDS,
    MIB,
)
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload, Runtime, runtime_of
from blixard.domain.requirements import JobRequirements, check_requirements
from blixard.domain.retry import RetryPolicy, check_retry_policy
from blixard.errors import InvalidRequest, LimitExceeded

DEFAULT_QUEUE = "default"
MAX_OUTPUT_BYTES = 1024 * MIB


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``timeout`` is seconds for one attempt (None: no limit); ``max_output_bytes`` caps stdout and stderr of one attempt together."""

    name: str
    payload: Payload
    queue: str = DEFAULT_QUEUE
    requirements: JobRequirements = JobRequirements()
    retry: RetryPolicy = RetryPolicy()
    timeout: float | None = None
    environment: dict[str, str] = {}
    grants: Grants = Grants()
    tags: tuple[str, ...] = ()
    max_output_bytes: int = DEFAULT_OUTPUT_BYTES

    @property
    def runtime(self) -> Runtime:
        return runtime_of(self.payload)


_encoder = msgspec.json.Encoder(order="sorted")


def encode_spec(spec: JobSpec) -> str:
    """Return the canonical JSON: equal specs give equal text."""
    return _encoder.encode(spec).decode()


def spec_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_spec(spec: JobSpec) -> None:
    """Raise ``InvalidRequest`` (or ``LimitExceeded``) that names the first field that is wrong."""
    _check_text("name", spec.name)
    _check_text("queue", spec.queue)
    _check_payload(spec.payload)
    check_requirements(spec.requirements, spec.runtime)
    check_retry_policy(spec.retry)
    check_grants(spec.grants)
    if spec.timeout is not None and not 0 < spec.timeout <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequest(
            f"timeout is {spec.timeout:g} s; above 0 and up to {MAX_TIMEOUT_SECONDS:g} s is allowed",
            field="timeout",
            hint="leave it out for no limit",
        )
    if not 0 <= spec.max_output_bytes <= MAX_OUTPUT_BYTES:
        raise InvalidRequest(
            f"max_output_bytes is {spec.max_output_bytes}; 0 to {MAX_OUTPUT_BYTES} is allowed", field="max_output_bytes"
        )
    for field, size, most in (
        ("tags", len(spec.tags), MAX_TAGS),
        ("environment", len(spec.environment), MAX_ENVIRONMENT),
        ("requirements.labels", len(spec.requirements.labels), MAX_LABELS),
    ):
        if size > most:
            raise LimitExceeded(f"{field} has {size} entries; {most} are allowed", field=field)
    for name in spec.environment:
        if not name or "=" in name or "\0" in name or "\0" in spec.environment[name]:
            raise InvalidRequest(f"{name!r} cannot be the name of an environment variable", field="environment")
    for tag in spec.tags:
        _check_text("tags", tag)
    if (size := len(encode_spec(spec))) > MAX_SPEC_BYTES:
        raise LimitExceeded(f"the job's spec is {size} bytes of JSON; {MAX_SPEC_BYTES} are allowed", field="spec")


def _check_text(field: str, value: str) -> None:
    if not 1 <= len(value) <= MAX_NAME_LENGTH:
        raise InvalidRequest(f"{field} has {len(value)} characters; 1 to {MAX_NAME_LENGTH} are allowed", field=field)
    if not value.isprintable():
        raise InvalidRequest(f"{field} {value!r} has characters that cannot be printed", field=field)


def _check_payload(payload: Payload) -> None:
    match payload:
        case CommandPayload(argv=argv) if not argv or not argv[0] or any("\0" in a for a in argv):
            raise InvalidRequest("a command needs a program as its first word", field="payload.argv")
        case FunctionPayload(function=function):
            module, _, name = function.partition(":")
            if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
                raise InvalidRequest(f"{function!r} is not of the form module:function", field="payload.function")
