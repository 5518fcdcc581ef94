"""What was submitted during a test, and asserting it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import msgspec

from blixard.domain.job import NewJob
from blixard.domain.payload import FunctionPayload
from blixard.domain.spec import JobSpec
from blixard.sdk.function import JobFunction
from blixard.sdk.options import JobOptions
from blixard.sdk.values import decode_arguments
from blixard.testing.clock import FakeClock

P = ParamSpec("P")
MOST_SHOWN = 10


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """One submitted job. ``args`` and ``kwargs`` are what the function receives: they have travelled through the encoding.

    ``options`` are those that took effect; its ``input`` maps places to digests, and ``include`` is not told.
    """

    id: str
    function: str
    """``module:qualname``, as a worker finds it."""
    args: tuple[object, ...]
    kwargs: dict[str, object]
    options: JobOptions

    def __str__(self) -> str:
        words = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{self.function.rpartition(':')[2]}({', '.join(words)})"


class Submissions:
    """The jobs of one app that were submitted since the test began, in order. ``clock`` is the time that the jobs live in."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self._all: list[Submission] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Submission]:
        return iter(self._all)

    def __getitem__(self, place: int) -> Submission:
        return self._all[place]

    def __repr__(self) -> str:
        return f"<submissions: {', '.join(map(str, self._all)) or 'none'}>"

    def of(self, function: JobFunction[..., Any]) -> list[Submission]:  # Any: whatever it returns
        """Return the jobs of this function."""
        name = _name_of(function)
        return [found for found in self._all if found.function == name]

    def assert_submitted(self, function: JobFunction[P, Any], *args: P.args, **kwargs: P.kwargs) -> Submission:
        """Return the first job of this function with these arguments; ``AssertionError`` if there is none.

        Arguments are compared as the function would receive them, with its defaults filled in.
        """
        template = function.template
        wanted = decode_arguments(template.options.encoding, template.encode(args, kwargs))
        bound = _bind(function, *wanted)
        for found in self.of(function):
            if _bind(function, found.args, found.kwargs) == bound:
                return found
        expected = Submission(
            id="", function=_name_of(function), args=wanted[0], kwargs=wanted[1], options=JobOptions()
        )
        raise AssertionError(f"{expected} was not submitted; {self._tell()}")

    def assert_not_submitted(self, function: JobFunction[..., Any]) -> None:
        """Raise ``AssertionError`` if there is any job of this function."""
        if found := self.of(function):
            raise AssertionError(f"{found[0]} was submitted; {self._tell()}")

    def note(self, spec: JobSpec, payload: FunctionPayload, job: NewJob, job_id: str, arguments: bytes) -> None:
        """Learn of one submitted job."""
        args, kwargs = decode_arguments(payload.encoding, arguments)
        options = _options_of(spec, payload, job)
        self._all.append(Submission(id=job_id, function=payload.function, args=args, kwargs=kwargs, options=options))

    def _tell(self) -> str:
        if not self._all:
            return "nothing was"
        shown = "\n".join(f"  {found}" for found in self._all[:MOST_SHOWN])
        more = f"\n  and {len(self) - MOST_SHOWN} more" if len(self) > MOST_SHOWN else ""
        return f"submitted were\n{shown}{more}"


def _name_of(function: JobFunction[..., Any]) -> str:
    template = function.template
    return template.app.bundler.bundle_function(template.function, include=template.options.include).function


def _bind(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {"args": args, "kwargs": kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


def _options_of(spec: JobSpec, payload: FunctionPayload, job: NewJob) -> JobOptions:
    needs = spec.requirements
    return JobOptions(
        name=spec.name,
        queue=spec.queue,
        isolation=needs.isolation,
        retry=spec.retry,
        timeout=spec.timeout,
        env=spec.environment,
        allow_read=spec.grants.read,
        allow_write=spec.grants.write,
        allow_net=spec.grants.network,
        input={item.path: item.digest for item in job.inputs},
        labels=needs.labels,
        cpus=needs.cpus,
        memory_mb=needs.memory_mb,
        image=needs.image,
        vm_mode=needs.vm_mode,
        tags=spec.tags,
        encoding=payload.encoding,
        priority=job.priority,
        max_output_bytes=spec.max_output_bytes,
    )
