"""What a job runs: one struct per form, told apart by ``kind``."""

from __future__ import annotations

import enum

import msgspec


class Runtime(enum.StrEnum):
    PYTHON = "python"
    COMMAND = "command"
    WASM = "wasm"


class Encoding(enum.StrEnum):
    """How arguments and result of a Python function are written. Pickle only when asked for by name: it runs code."""

    JSON = "json"
    MSGPACK = "msgpack"
    PICKLE = "pickle"


class FunctionPayload(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="function"
):
    """Call ``function`` (``module:qualname``) of the code bundle with the job's arguments; its return value is the result.

    The job's arguments are ``[args, kwargs]`` in ``encoding``: JSON as it stands, other encodings as base64 text.
    Without a bundle the function must be importable in the worker's interpreter.
    """

    function: str
    bundle: str | None = None
    encoding: Encoding = Encoding.JSON


class ScriptPayload(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="script"
):
    """Run ``path`` within the bundle as ``__main__``, its directory first on ``sys.path``.

    The job's arguments are the list of strings behind the script's name. The exit code decides.
    """

    path: str
    bundle: str


class CommandPayload(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="command"
):
    """Run ``argv``, no shell. The job's arguments are strings that are appended. The exit code decides."""

    argv: tuple[str, ...]


class WasmPayload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="wasm"):
    """Run a WebAssembly module (a blob).

    Without ``function`` it is a WASI preview 1 command (``_start``); the job's arguments are the list of strings behind the program's name.
    With ``function`` that export is called with the job's arguments, a list of numbers; its values are the result.
    """

    module: str
    name: str = "module.wasm"
    function: str | None = None


Payload = FunctionPayload | ScriptPayload | CommandPayload | WasmPayload


def runtime_of(payload: Payload) -> Runtime:
    match payload:
        case FunctionPayload() | ScriptPayload():
            return Runtime.PYTHON
        case CommandPayload():
            return Runtime.COMMAND
        case WasmPayload():
            return Runtime.WASM


def blobs_of(payload: Payload) -> list[str]:
    """Return the digests that the payload needs to run."""
    match payload:
        case FunctionPayload(bundle=bundle) if bundle:
            return [bundle]
        case ScriptPayload(bundle=bundle):
            return [bundle]
        case WasmPayload(module=module):
            return [module]
    return []
