"""The grammar of `run` and `submit`: which words name what is run, and which are its arguments."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import msgspec

from blixard.errors import InvalidRequest

_MEMBER = re.compile(r"(?P<file>.+\.(?:py|wasm)):(?P<name>[^:/]*)")


class TargetKind(enum.StrEnum):
    SCRIPT = "script"
    FUNCTION = "function"
    COMMAND = "command"
    WASM = "wasm"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """``file`` of a script, function or module; ``member`` is the function of it; a command stands in ``arguments`` alone."""

    kind: TargetKind
    file: str = ""
    member: str | None = None
    arguments: tuple[object, ...] = ()

    @property
    def title(self) -> str:
        """Return what a listing calls it."""
        if self.kind is TargetKind.COMMAND:
            return str(self.arguments[0]).rpartition("/")[2] or "command"
        name = self.file.rpartition("/")[2]
        return f"{name}:{self.member}" if self.member else name


def read_target(words: Sequence[str], tail: Sequence[str] | None) -> Target:
    """Tell what ``words`` (before ``--``) and ``tail`` (behind it; None: there was none) ask for. Raises ``InvalidRequest``."""
    if not words:
        return _read_command(tail)
    first, rest = words[0], [*words[1:], *(tail or ())]
    if member := _MEMBER.fullmatch(first):
        return _read_member(member["file"], member["name"], rest)
    if not first.endswith((".py", ".wasm")):
        raise InvalidRequest(
            f"{first!r} is neither a .py nor a .wasm file",
            field="target",
            hint=f"to run a command, put `--` before it: blixard run -- {' '.join(words)}",
        )
    if len(words) > 1:
        raise InvalidRequest(
            f"{words[1]!r} stands between the file and `--`",
            field="target",
            hint=f"arguments for the program go behind `--`: blixard run {first} -- {' '.join(words[1:])}",
        )
    kind = TargetKind.SCRIPT if first.endswith(".py") else TargetKind.WASM
    return Target(kind=kind, file=first, arguments=tuple(tail or ()))


def _read_command(tail: Sequence[str] | None) -> Target:
    if not tail or not tail[0]:
        raise InvalidRequest(
            "there is nothing to run",
            field="target",
            hint="name a script (hello.py), a function (facts.py:measure 1 2), a module (tool.wasm) or a command (-- ls -l)",
        )
    return Target(kind=TargetKind.COMMAND, arguments=tuple(tail))


def _read_member(file: str, name: str, rest: Sequence[str]) -> Target:
    if not name:
        raise InvalidRequest(f"no function is named behind {file}:", field="target", hint=f"for example {file}:main")
    if file.endswith(".py"):
        return Target(kind=TargetKind.FUNCTION, file=file, member=name, arguments=tuple(read_json(a) for a in rest))
    return Target(kind=TargetKind.WASM, file=file, member=name, arguments=tuple(_read_number(a) for a in rest))


def read_json(text: str) -> object:
    """Return the JSON value of an argument; what is plainly not meant as JSON is text, so that names need no quotes."""
    try:
        # Any: a JSON value of any form is passed on as it is.
        value: object = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        if text[:1] in {"[", "{", '"'}:
            raise InvalidRequest(
                f"the argument {text!r} is not valid JSON: {error}",
                field="arguments",
                hint="quote it for the shell: '[1, 2]', '{\"size\": 128}'",
            ) from error
        return text
    return value


def _read_number(text: str) -> int | float:
    value = read_json(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(
            f"{text!r} is not a number; functions of Wasm modules take numbers only", field="arguments"
        )
    return value
