"""What all jobs of one function and one set of options have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from blixard.client.contract import AsyncClient
from blixard.client.submission import REQUEST_BYTES, make_job
from blixard.domain.grants import InputFile
from blixard.domain.ids import new_job_id
from blixard.domain.job import NewJob
from blixard.domain.limits import MAX_BATCH_JOBS, MAX_BLOB_BYTES
from blixard.domain.payload import FunctionPayload
from blixard.domain.spec import JobSpec
from blixard.errors import BlobNotFound, InvalidRequest, LimitExceeded
from blixard.protocol.jobs import SubmitRequest
from blixard.sdk.options import JobOptions
from blixard.sdk.values import decode_result, encode_arguments

if TYPE_CHECKING:
    from blixard.sdk.app import App

CHUNK_CALLER = "blixard.sdk.chunk:call_chunk"


class Prepared(msgspec.Struct, frozen=True):
    """A spec whose code, and the input files of whose jobs, the store has."""

    spec: JobSpec
    inputs: tuple[InputFile, ...]
    priority: int

    async def job(self, client: AsyncClient, arguments: bytes, job_id: str | None = None) -> NewJob:
        return await make_job(client, arguments, job_id=job_id, inputs=self.inputs, priority=self.priority)


class JobTemplate:
    """Makes jobs of a function. ``in_chunks``: each job gets a list of calls and returns a list of results."""

    def __init__(
        self, app: App, function: Callable[..., object], options: JobOptions, *, in_chunks: bool = False
    ) -> None:
        self.app = app
        self.function = function
        self.options = options
        self._in_chunks = in_chunks

    def encode(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bytes:
        """Return the arguments of one call as they travel. Raises ``InvalidRequest``."""
        return encode_arguments(self.options.encoding, args, kwargs)

    def encode_chunk(self, calls: Sequence[Sequence[object]], kwargs: Mapping[str, object]) -> bytes:
        """Return the arguments of one job that makes these calls."""
        name = self.app.bundler.bundle_function(self.function, include=self.options.include).function
        return self.encode([name, [list(call) for call in calls], dict(kwargs)], {})

    def decode(self, data: bytes | None) -> object:
        return decode_result(self.options.encoding, data)

    async def prepare(self, client: AsyncClient) -> Prepared:
        """Upload what is not there yet: code and input files."""
        spec = await self._spec(client)
        return Prepared(spec, await self._inputs(client), self.options.priority)

    async def submit(self, client: AsyncClient, arguments: Sequence[bytes]) -> list[str]:
        """Store one job per item and return their ids; durable when it returns.

        The ids are made before the first try, so a request whose answer was lost is repeated and nothing stored twice.
        """
        ids = [new_job_id() for _ in arguments]
        try:
            await self._store(client, arguments, ids)
        except BlobNotFound:
            # What was uploaded before has been removed meanwhile, or this is another store behind the same address.
            self.app.forget_uploads()
            await self._store(client, arguments, ids)
        return ids

    async def _store(self, client: AsyncClient, arguments: Sequence[bytes], ids: Sequence[str]) -> None:
        insist = self.app.patience.insist
        prepared = await insist(partial(self.prepare, client), proves_contact=False)
        for numbers in requests(arguments):
            making = [partial(prepared.job, client, arguments[n], ids[n]) for n in numbers]
            jobs = [await insist(make, proves_contact=False) for make in making]
            request = SubmitRequest(spec=prepared.spec, jobs=jobs)
            await insist(partial(client.submit_many, request))

    async def _spec(self, client: AsyncClient) -> JobSpec:
        code = self.app.bundler.bundle_function(self.function, include=self.options.include)
        digest = None
        if code.bundle is not None:
            digest = code.bundle.digest
            await self.app.upload(client, digest, code.bundle.archive)
        called = CHUNK_CALLER if self._in_chunks else code.function
        payload = FunctionPayload(function=called, bundle=digest, encoding=self.options.encoding)
        return self.options.spec(f"{self.app.name}.{self.function.__qualname__}", payload)

    async def _inputs(self, client: AsyncClient) -> tuple[InputFile, ...]:
        files = sorted(self.options.input.items())
        for _, path in files:
            _check_file(Path(path))
        return tuple([InputFile(path=place, digest=await self.app.upload_file(client, path)) for place, path in files])


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "a directory, not a file" if path.is_dir() else "not there"
        raise InvalidRequest(
            f"input: {path} is {what}", field="input", hint="name files; relative ones count from the current directory"
        )
    if (size := path.stat().st_size) > MAX_BLOB_BYTES:
        raise LimitExceeded(
            f"input: {path} has {size} bytes; {MAX_BLOB_BYTES} are allowed (MAX_BLOB_BYTES)",
            field="input",
            hint="grant it instead: allow_read=[path]",
        )


def requests(arguments: Sequence[bytes]) -> Iterator[range]:
    """Yield what goes together in one request: at most ``MAX_BATCH_JOBS`` jobs and, but for a single one, ``REQUEST_BYTES``."""
    first, size = 0, 0
    for number, data in enumerate(arguments):
        size += len(data)
        if number > first and (size > REQUEST_BYTES or number - first == MAX_BATCH_JOBS):
            yield range(first, number)
            first, size = number, len(data)
    if arguments:
        yield range(first, len(arguments))
