"""What a job is declared with."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import msgspec

from blixard.domain.grants import Grants, check_input_path
from blixard.domain.limits import DEFAULT_OUTPUT_BYTES, MAX_INPUTS, MAX_PRIORITY
from blixard.domain.payload import Encoding, FunctionPayload, Payload
from blixard.domain.requirements import Isolation, JobRequirements, VmMode
from blixard.domain.retry import RetryPolicy
from blixard.domain.spec import DEFAULT_QUEUE, JobSpec, check_spec
from blixard.errors import InvalidRequest, LimitExceeded


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
    input: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]
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
    """``timeout`` in seconds for one attempt; ``retries`` is short for ``RetryPolicy(retries=n)``.

    ``isolation`` None: the server's default, ``standard``. ``allow_read``, ``allow_write``, ``allow_net``: what of the machine
    the sandbox may touch. ``input``: local files by their place in the job's working directory, copied at each submission.
    ``include``: data files that travel with the code. ``encoding``: how arguments and result travel (``json``, ``msgpack``, or
    ``pickle``, which runs code of whoever wrote it). ``image``: what its virtual machine boots; ``vm_mode``: ``service`` for
    one that serves job after job.
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
    input: Mapping[str, str] = {}
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
        """Return these options with some replaced. Raises ``InvalidRequest`` naming an option that is unknown, wrong or in conflict."""
        changes: dict[str, object] = dict(arguments)
        _check_known(changes)
        if "retries" in changes:
            if "retry" in changes:
                raise InvalidRequest("retries and retry say the same thing", field="retries", hint="give one of them")
            changes["retry"] = msgspec.structs.replace(self.retry, retries=_whole("retries", changes.pop("retries")))
        for field, read in _READERS.items():
            if field in changes:
                changes[field] = read(field, changes[field])
        _check_priority(changes.get("priority"))
        try:
            merged = msgspec.convert({**msgspec.structs.asdict(self), **changes}, JobOptions, strict=True)
        except msgspec.ValidationError as error:
            raise _wrong_option(error) from error
        merged.check(arguments)
        return merged

    def check(self, given: OptionArguments) -> None:
        """Raise ``InvalidRequest`` if no job could have these options; the error names one of ``given`` if it can."""
        try:
            self.spec("any", FunctionPayload(function="any:any"))
        except InvalidRequest as error:
            field = _option_of(error.field or "", given)
            hint = error.hint or (f"{field} takes {TAKES[field]}" if field in TAKES else None)
            raise type(error)(error.message, field=field, hint=hint) from None

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


TAKES = {
    "name": "the name to list the job by",
    "queue": "the name of a queue",
    "isolation": f"one of {', '.join(Isolation)}",
    "retries": "a whole number, 0 or more",
    "retry": "a blixard.RetryPolicy",
    "timeout": "seconds as a number, such as 30 or 0.5, or None for no limit",
    "env": 'text by name, such as {"MODE": "fast"}',
    "allow_read": "a list of paths",
    "allow_write": "a list of paths",
    "allow_net": "True or False",
    "input": 'a list of files, or files by their place, such as {"data/notes.txt": path}',
    "labels": 'text by name, such as {"zone": "a"}',
    "cpus": "a number above 0, such as 2 or 0.5",
    "memory_mb": "a whole number of MiB",
    "image": "the name of a guest image",
    "vm_mode": f"one of {', '.join(VmMode)}",
    "tags": 'a list of words, such as ["nightly"]',
    "encoding": f"one of {', '.join(Encoding)}",
    "include": "a list of paths",
    "priority": f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}",
    "max_output_bytes": "a whole number of bytes",
}
"""The fix for a wrong value, by option."""
_OPTIONS_OF = {
    "environment": "env",
    "grants.read": "allow_read",
    "grants.write": "allow_write",
    "requirements.worker_types": "isolation",
}
"""Options whose field in the spec has another name."""


def _option_of(field: str, given: OptionArguments) -> str:
    """Return the option behind a field of the spec."""
    if field.startswith("retry"):
        return "retries" if "retries" in given else "retry"
    return _OPTIONS_OF.get(field, field.removeprefix("requirements."))


def _check_known(changes: Mapping[str, object]) -> None:
    known = {*JobOptions.__struct_fields__, "retries"}
    for name in sorted(set(changes) - known):
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise InvalidRequest(
            f"there is no option {name!r}", field=name, hint=f"{meant}choose from {', '.join(sorted(known))}"
        )


def _whole(field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{field} is {value!r}, which is no whole number", field=field, hint=_takes(field))
    return value


def _paths(field: str, value: object) -> tuple[str, ...]:
    """Return absolute paths, links in them kept as they are named."""
    found = _path_list(field, value)
    return tuple(os.path.abspath(os.path.expanduser(path)) for path in found)  # noqa: PTH100, PTH111 - resolve() follows links


def _inputs(field: str, value: object) -> dict[str, str]:
    """Return absolute paths by place: given, or the relative path, or the name of a file that lies elsewhere."""
    placed: dict[str, str] = {}
    pairs = _named_inputs(field, value) if isinstance(value, Mapping) else _unnamed_inputs(field, value)
    for place, path in pairs:
        _check_place(field, place)
        local = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - resolve() follows links
        if place in placed:
            raise InvalidRequest(
                f"{field}: {local} and {placed[place]} would both be {place}",
                field=field,
                hint=f'name their places: {field}={{"one/{place}": …, "other/{place}": …}}',
            )
        placed[place] = local
    if len(placed) > MAX_INPUTS:
        raise LimitExceeded(
            f"{field} names {len(placed)} files; {MAX_INPUTS} are allowed (MAX_INPUTS)",
            field=field,
            hint="pack them into one file",
        )
    return placed


def _check_place(field: str, place: str) -> None:
    try:
        check_input_path(place)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field=field, hint=error.hint) from None


def _named_inputs(field: str, value: Mapping[object, object]) -> list[tuple[str, str]]:
    for place in value:
        if not isinstance(place, str):
            raise InvalidRequest(f"{field}: {place!r} is no place for a file", field=field, hint=_takes(field))
    return [(str(place), _text_of_path(field, path)) for place, path in value.items()]


def _unnamed_inputs(field: str, value: object) -> list[tuple[str, str]]:
    return [(_place_of(path), path) for path in _path_list(field, value)]


def _place_of(path: str) -> str:
    clean = os.path.normpath(path)
    is_elsewhere = os.path.isabs(clean) or clean.startswith(("..", "~"))  # noqa: PTH117 - a text's question
    return Path(clean).name if is_elsewhere else clean


def _path_list(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike) or not isinstance(value, Sequence):
        hint = f"{field}=[{str(value)!r}]" if isinstance(value, str | os.PathLike) else _takes(field)
        raise InvalidRequest(f"{field} takes a list of paths", field=field, hint=hint)
    return tuple(_text_of_path(field, path) for path in value)


def _text_of_path(field: str, path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise InvalidRequest(f"{field}: {path!r} is no path", field=field, hint=_takes(field))
    return os.fspath(path)


def _check_priority(value: object) -> None:
    if isinstance(value, int) and not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority is {value}; -{MAX_PRIORITY} to {MAX_PRIORITY} is allowed",
            field="priority",
            hint=_takes("priority"),
        )


def _takes(field: str) -> str:
    return f"{field} takes {TAKES[field]}"


def _wrong_option(error: msgspec.ValidationError) -> InvalidRequest:
    text, _, place = str(error).partition(" - at `$.")
    field = place.rstrip("`").partition("[")[0].partition(".")[0] or None
    return InvalidRequest(
        f"{field or 'an option'}: {text}", field=field, hint=_takes(field) if field in TAKES else None
    )


_READERS: Mapping[str, Callable[[str, object], object]] = {
    "allow_read": _paths,
    "allow_write": _paths,
    "include": _path_list,
    "input": _inputs,
}
"""What turns a path's option from what users write into what is kept."""
