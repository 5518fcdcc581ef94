"""From a target and its options to a spec, a job and the blobs they need. Nothing is submitted here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blixard.bundling import Bundler
from blixard.cli.options import JobOptions
from blixard.cli.quantities import read_megabytes, read_pairs, read_seconds
from blixard.cli.target import Target, TargetKind
from blixard.client.contract import AsyncClient
from blixard.client.submission import make_job
from blixard.domain.grants import Grants, InputFile, check_input_path
from blixard.domain.ids import check_id
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_ARGUMENTS_BYTES, MAX_BLOB_BYTES, MAX_INPUTS, MIB
from blixard.domain.payload import CommandPayload, FunctionPayload, Payload, ScriptPayload, WasmPayload
from blixard.domain.requirements import JobRequirements
from blixard.domain.retry import RetryPolicy
from blixard.domain.spec import DEFAULT_QUEUE, JobSpec, check_spec
from blixard.errors import InvalidRequest, LimitExceeded

_WASM_MAGIC = b"\0asm"
_CORE_MODULE = b"\x01\0\0\0"


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """Checked and complete but for uploads: ``code`` is the blob of the payload, ``inputs`` maps places to local files."""

    spec: JobSpec
    code: bytes | Path | None
    arguments: bytes
    inputs: dict[str, Path]


def prepare(target: Target, options: JobOptions, *, is_remote: bool) -> Prepared:
    """Read the code, check everything that can be checked here. Raises ``InvalidRequest``, ``LimitExceeded``."""
    payload, code = make_payload(target, options)
    spec = make_spec(payload, options, options.name or target.title, is_remote=is_remote)
    arguments = encode_arguments(_arguments_of(target))
    return Prepared(spec=spec, code=code, arguments=arguments, inputs=place_inputs(options.input))


def make_payload(target: Target, options: JobOptions) -> tuple[Payload, bytes | Path | None]:
    """Return the payload and the blob it refers to."""
    if options.include and target.kind not in {TargetKind.SCRIPT, TargetKind.FUNCTION}:
        raise InvalidRequest("--include is for Python code; use --input FILE", field="include")
    match target.kind:
        case TargetKind.SCRIPT:
            script = Bundler().bundle_script(target.file, include=options.include)
            return ScriptPayload(path=script.path, bundle=script.bundle.digest), script.bundle.archive
        case TargetKind.FUNCTION:
            function = Bundler().bundle_reference(f"{target.file}:{target.member}", include=options.include)
            if function.bundle is None:
                return FunctionPayload(function=function.function), None
            return FunctionPayload(function=function.function, bundle=function.bundle.digest), function.bundle.archive
        case TargetKind.WASM:
            module = _read_module(Path(target.file))
            digest = _digest(module)
            return WasmPayload(module=digest, name=Path(target.file).name, function=target.member), module
        case TargetKind.COMMAND:
            return CommandPayload(argv=tuple(str(word) for word in target.arguments)), None


def _digest(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _read_module(path: Path) -> bytes:
    content = read_file(path)
    if not content.startswith(_WASM_MAGIC):
        raise InvalidRequest(
            f"{path} is not a WebAssembly module: it does not start with the bytes \\0asm",
            field="target",
            hint="compile it for wasm32-wasip1, for example `cargo build --target wasm32-wasip1`",
        )
    if content[4:8] != _CORE_MODULE:
        raise InvalidRequest(
            f"{path} is a WebAssembly component; only core modules can be run",
            field="target",
            hint="compile it for WASI preview 1 (wasm32-wasip1)",
        )
    return content


def read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BLOB_BYTES:
            raise LimitExceeded(
                f"{path} has {size} bytes; {MAX_BLOB_BYTES} are allowed (MAX_BLOB_BYTES)", field="input"
            )
        return path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: OSError) -> InvalidRequest:
    if isinstance(error, FileNotFoundError):
        return InvalidRequest(f"there is no file {path}", field="file", hint="check the name and the current directory")
    return InvalidRequest(f"cannot read {path}: {error.strerror}", field="file")


def make_spec(payload: Payload, options: JobOptions, name: str, *, is_remote: bool) -> JobSpec:
    """Return the checked spec that the options ask for."""
    spec = JobSpec(
        name=name,
        payload=payload,
        queue=options.queue if options.queue is not None else DEFAULT_QUEUE,
        requirements=JobRequirements(
            isolation=options.isolation,
            labels=read_pairs(options.label, "--label"),
            cpus=options.cpus,
            memory_mb=None if options.memory is None else read_megabytes(options.memory, "--memory"),
            image=options.image,
            vm_mode=options.vm_mode,
        ),
        retry=RetryPolicy(retries=options.retries),
        timeout=None if options.timeout is None else read_seconds(options.timeout, "--timeout"),
        environment=dict(_environment(options.env)),
        grants=Grants(
            read=_granted(options.allow_read, "--allow-read", is_remote=is_remote),
            write=_granted(options.allow_write, "--allow-write", is_remote=is_remote),
            network=options.allow_net,
        ),
        tags=tuple(dict.fromkeys(options.tag)),
    )
    check_spec(spec)
    return spec


def _environment(items: list[str]) -> Iterator[tuple[str, str]]:
    for item in items:
        name, equals, value = item.partition("=")
        if not equals and name not in os.environ:
            raise InvalidRequest(
                f"--env: {name} is not set in this shell", field="--env", hint=f"set it, or write --env {name}=VALUE"
            )
        yield name, value if equals else os.environ[name]


def _granted(paths: list[str], option: str, *, is_remote: bool) -> tuple[str, ...]:
    """Return absolute paths. Whether one exists can only be told where the job runs: here, unless there is a server."""
    absolute = tuple(dict.fromkeys(os.path.abspath(Path(path).expanduser()) for path in paths))  # noqa: PTH100  keeps links, drops '..'
    for path in absolute:
        if not is_remote and not Path(path).exists():
            raise InvalidRequest(f"{option}: there is no file or directory {path}", field=option)
    return absolute


def _arguments_of(target: Target) -> object:
    match target.kind:
        case TargetKind.FUNCTION:
            return [list(target.arguments), {}]
        case TargetKind.COMMAND:
            return []
        case _:
            return list(target.arguments)


def encode_arguments(arguments: object) -> bytes:
    """Return the JSON of a job's arguments. Raises ``LimitExceeded``, and ``InvalidRequest`` for what is no text."""
    try:
        encoded = msgspec.json.encode(arguments)
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the arguments are not text that JSON can hold: {error}", field="arguments") from error
    if len(encoded) > MAX_ARGUMENTS_BYTES:
        raise LimitExceeded(
            f"the arguments are {len(encoded)} bytes of JSON; {MAX_ARGUMENTS_BYTES // MIB} MiB are allowed (MAX_ARGUMENTS_BYTES)",
            field="arguments",
            hint="send large data as a file: --input FILE",
        )
    return encoded


def place_inputs(files: list[str]) -> dict[str, Path]:
    """Return where in the working directory each file will appear: at its relative path, or under its name if it lies elsewhere."""
    placed: dict[str, Path] = {}
    if len(files) > MAX_INPUTS:
        raise LimitExceeded(f"--input names {len(files)} files; {MAX_INPUTS} are allowed (MAX_INPUTS)", field="--input")
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise InvalidRequest(f"--input: there is no file {file}", field="--input")
        clean = os.path.normpath(file)
        place = path.name if os.path.isabs(clean) or clean.startswith("..") else clean  # noqa: PTH117  a text's question
        check_input_path(place)
        if place in placed:
            raise InvalidRequest(f"--input: {file} and {placed[place]} would both be {place}", field="--input")
        placed[place] = path
    return placed


async def upload(client: AsyncClient, prepared: Prepared, *, job_id: str | None, priority: int) -> NewJob:
    """Store every blob that the job needs and return the job, ready to be submitted. Repeating it sends nothing twice."""
    if job_id is not None:
        check_id(job_id)
    if prepared.code is not None:
        await client.put_blob(prepared.code)
    inputs = [
        InputFile(path=place, digest=await client.put_blob(path)) for place, path in sorted(prepared.inputs.items())
    ]
    return await make_job(client, prepared.arguments, job_id=job_id, inputs=inputs, priority=priority)
