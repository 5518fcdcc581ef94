"""The options that `run`, `submit` and `map` share, declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer

from blixard.domain.requirements import Isolation, VmMode


class JobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """As they were written; ``submission`` turns them into a spec."""

    isolation: Isolation = Isolation.STANDARD
    timeout: str | None = None
    retries: int = 0
    name: str | None = None
    tag: list[str] = []
    queue: str | None = None
    priority: int = 0
    cpus: float | None = None
    memory: str | None = None
    image: str | None = None
    vm_mode: VmMode | None = None
    label: list[str] = []
    allow_read: list[str] = []
    allow_write: list[str] = []
    allow_net: bool = False
    env: list[str] = []
    input: list[str] = []
    include: list[str] = []


def _declare(
    isolation: Annotated[
        Isolation,
        typer.Option(metavar="LEVEL", help="minimal, standard or maximum: how strongly the job is kept apart."),
    ] = Isolation.STANDARD,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="End it after this time: 30s, 5m.")] = None,
    retries: Annotated[int, typer.Option(metavar="N", help="Run it again up to N times when it fails.")] = 0,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name in listings; default: what is run.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="TAG", help="Word to find it by. Repeatable.")] = None,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Queue it waits in.")] = None,
    priority: Annotated[int, typer.Option(metavar="N", help="Higher runs earlier.")] = 0,
    cpus: Annotated[float | None, typer.Option(metavar="N", help="CPUs it needs.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory it needs and may use: 512MiB, 2GB.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="NAME", help="Guest image that its virtual machine boots.")
    ] = None,
    vm_mode: Annotated[
        VmMode | None,
        typer.Option(
            "--vm",
            metavar="MODE",
            help="service: run it in a virtual machine that serves this namespace's jobs in turn.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Label that the worker must have. Repeatable.")
    ] = None,
    allow_read: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Let it read this file or directory. Repeatable.")
    ] = None,
    allow_write: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Let it read and write this one. Repeatable.")
    ] = None,
    allow_net: Annotated[bool, typer.Option("--allow-net", help="Let it use the network.")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Set a variable; without a value, pass on this shell's. Repeatable."),
    ] = None,
    input: Annotated[  # noqa: A002  the option's name
        list[str] | None,
        typer.Option(metavar="FILE", help="Send this file along; it appears in the working directory. Repeatable."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Data file beside the code that travels with it. Repeatable."),
    ] = None,
) -> None:
    """Carry the declarations; never called."""


# Any: Typer calls commands with whatever their signature declares.
def with_job_options(*without: str) -> Callable[[Callable[..., int]], Callable[..., Any]]:
    """Replace the parameter ``options`` of a command by one option for each field of ``JobOptions`` but ``without``."""

    def decorate(command: Callable[..., int]) -> Callable[..., Any]:
        declared = inspect.signature(_declare, eval_str=True).parameters
        shared = {name: parameter for name, parameter in declared.items() if name not in without}
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own["options"]

        @functools.wraps(command)
        def take_all(**given: Any) -> int:
            values = {name: given.pop(name) for name in shared}
            return command(**given, options=JobOptions(**{k: v for k, v in values.items() if v is not None}))

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own.values(), *shared.values())]
        take_all.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect looks for
        take_all.__annotations__ = {p.name: p.annotation for p in parameters}
        return take_all

    return decorate
