"""What a job is declared with."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from typing import TypedDict

import msgspec

from blixard.domain.grants import Grants
from blixard.domain.limits import DEFAULT_OUTPUT_BYTES, MAX_PRIORITY
from blixard.domain.payload import Encoding, Payload
from blixard.domain.requirements import Isolation, JobRequirements, VmMode
from blixard.domain.retry import RetryPolicy
from blixard.domain.spec import DEFAULT_QUEUE, JobSpec, check_spec
from blixard.errors import InvalidRequest


class OptionArguments(TypedDict, total=False):
    """Keyword arguments of ``@app.job`` and ``options``; ``JobOptions`` says what each means."""

    name: str
    queue: str
    isolation: str
    retries: int
    retry: RetryPolicy
    timeout: float | None
    env: Mapping[str, str]
    allow_read: Sequence[str | os.PathLike[str]]
    allow_write: Sequence[str | os.PathLike[str]]
    allow_net: bool
    labels: Mapping[str, str]
    cpus: float
    memory_mb: int
    image: str
    vm_mode: str
    tags: Sequence[str]
    encoding: str
    include: Sequence[str | os.PathLike[str]]
    priority: int
    max_output_bytes: int


class JobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``timeout`` in seconds for one attempt; ``retries`` is short for ``RetryPolicy(retries=n)``; ``isolation`` None: the server's default, ``standard``.

    ``allow_read``, ``allow_write``, ``allow_net``: what of the machine the sandbox may touch. ``include``: data files that
    travel with the code. ``encoding``: how arguments and result travel (``json``, ``msgpack``, or ``pickle``, which runs code
    of whoever wrote it). ``image``: what its virtual machine boots; ``vm_mode``: ``service`` for one that serves job after job.
    """

    name: str | None = None
    queue: str = DEFAULT_QUEUE
    isolation: Isolation = Isolation.STANDARD
    retry: RetryPolicy = RetryPolicy()
    timeout: float | None = None
    env: Mapping[str, str] = {}
    allow_read: tuple[str, ...] = ()
    allow_write: tuple[str, ...] = ()
    allow_net: bool = False
    labels: Mapping[str, str] = {}
    cpus: float | None = None
    memory_mb: int | None = None
    image: str | None = None
    vm_mode: VmMode | None = None
    tags: tuple[str, ...] = ()
    encoding: Encoding = Encoding.JSON
    include: tuple[str, ...] = ()
    priority: int = 0
    max_output_bytes: int = DEFAULT_OUTPUT_BYTES

    def changed(self, arguments: OptionArguments) -> JobOptions:
        """Return these options with some replaced. Raises ``InvalidRequest`` for an unknown name or a wrong value."""
        changes: dict[str, object] = dict(arguments)
        if "retries" in changes:
            if "retry" in changes:
                raise InvalidRequest("retries and retry say the same thing", field="retries", hint="give one of them")
            changes["retry"] = msgspec.structs.replace(self.retry, retries=_whole("retries", changes.pop("retries")))
        for field in ("allow_read", "allow_write"):
            if field in changes:
                changes[field] = _paths(field, changes[field])
        if "include" in changes:
            changes["include"] = _path_list("include", changes["include"])
        _check_priority(changes.get("priority"))
        merged = {**msgspec.structs.asdict(self), **changes}
        try:
            return msgspec.convert(merged, JobOptions, strict=True) if _known(changes) else self
        except msgspec.ValidationError as error:
            raise _wrong_option(error) from error

    def spec(self, name: str, payload: Payload) -> JobSpec:
        """Return the checked spec of a job with these options."""
        spec = JobSpec(
            name=name if self.name is None else self.name,
            payload=payload,
            queue=self.queue,
            requirements=JobRequirements(
                isolation=self.isolation,
                labels=dict(self.labels),
                cpus=self.cpus,
                memory_mb=self.memory_mb,
                image=self.image,
                vm_mode=self.vm_mode,
            ),
            retry=self.retry,
            timeout=self.timeout,
            environment=dict(self.env),
            grants=Grants(read=self.allow_read, write=self.allow_write, network=self.allow_net),
            tags=self.tags,
            max_output_bytes=self.max_output_bytes,
        )
        check_spec(spec)
        return spec


def _known(changes: Mapping[str, object]) -> bool:
    unknown = sorted(set(changes) - set(JobOptions.__struct_fields__))
    if unknown:
        allowed = ", ".join(sorted({*JobOptions.__struct_fields__, "retries"}))
        raise InvalidRequest(f"there is no option {unknown[0]!r}", field=unknown[0], hint=f"choose from {allowed}")
    return True


def _whole(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{field} is {value!r}, which is no whole number", field=field)
    return value


def _paths(field: str, value: object) -> tuple[str, ...]:
    """Return absolute paths, links in them kept as they are named."""
    found = _path_list(field, value)
    return tuple(os.path.abspath(os.path.expanduser(path)) for path in found)  # noqa: PTH100, PTH111 - resolve() follows links


def _path_list(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike) or not isinstance(value, Sequence):
        raise InvalidRequest(f"{field} takes a list of paths", field=field, hint=f"{field}=[{value!r}]")
    return tuple(_text_of_path(field, path) for path in value)


def _text_of_path(field: str, path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise InvalidRequest(f"{field}: {path!r} is no path", field=field)
    return os.fspath(path)


def _check_priority(value: object) -> None:
    if isinstance(value, int) and not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequest(f"priority is {value}; -{MAX_PRIORITY} to {MAX_PRIORITY} is allowed", field="priority")


def _wrong_option(error: msgspec.ValidationError) -> InvalidRequest:
    text, _, place = str(error).partition(" - at `$.")
    field = place.rstrip("`") or None
    choices: dict[str | None, type[enum.StrEnum]] = {"isolation": Isolation, "encoding": Encoding, "vm_mode": VmMode}
    hint = f"choose from {', '.join(choices[field])}" if field in choices else None
    return InvalidRequest(f"{field or 'an option'}: {text}", field=field, hint=hint)
