"""A program that uses the embedded client, run by the tests as a process of its own.

``embedded_program.py DATA_DIR batch TOTAL SECONDS``: submit or find one batch of jobs that each sleep SECONDS, and print
each result's index as it comes. ``embedded_program.py DATA_DIR worker``: start the child worker and print its pid.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from blixard.client.embedded import EmbeddedClient
from blixard.config.settings import Settings, StorageSettings, WorkerSettings
from blixard.domain.batch import batch_identity
from blixard.domain.job import NewJob
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec, encode_spec
from blixard.protocol.jobs import OpenBatchRequest, SubmitRequest

BATCH_STEP = 100


def settings_for(data_dir: Path) -> Settings:
    return Settings(storage=StorageSettings(data_dir=data_dir), worker=WorkerSettings(slots=2, types=("process",)))


def sleeping_spec(seconds: str, marks: Path) -> JobSpec:
    """Return a job that leaves a line in a file of its index each time it runs."""
    script = f"echo run >> {marks}/$1; exec sleep {seconds}"
    return JobSpec(
        name="sleep",
        payload=CommandPayload(argv=("sh", "-c", script, "job")),
        requirements=JobRequirements(isolation=Isolation.MINIMAL),
    )


async def run_batch(client: EmbeddedClient, spec: JobSpec, total: int) -> None:
    inputs = [f'["{index}"]'.encode() for index in range(total)]
    identity = batch_identity("default", encode_spec(spec), inputs)
    batch = await client.open_batch(OpenBatchRequest(name="sleep", identity=identity, total=total))
    print("created" if batch.created else "found", batch.id, flush=True)
    for first in range(batch.submitted, total, BATCH_STEP):
        jobs = [NewJob(arguments=msgspec.Raw(item)) for item in inputs[first : first + BATCH_STEP]]
        await client.submit_many(SubmitRequest(spec=spec, jobs=jobs, batch=batch.id, first_index=first))
    position = 0
    while True:
        found = await client.batch_results(batch.id, after=position, wait=30.0)
        for result in found.results:
            print(result.index, result.state, result.attempt, flush=True)
        position = found.position
        if found.done:
            return


async def main() -> None:
    data_dir, what, *rest = sys.argv[1:]
    async with EmbeddedClient(settings_for(Path(data_dir))) as client:
        if what == "batch":
            await run_batch(client, sleeping_spec(rest[1], Path(rest[2])), int(rest[0]))


if __name__ == "__main__":
    asyncio.run(main())
