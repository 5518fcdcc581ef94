"""/workers: sessions, sync, output."""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec

from blixard.api.operation import Call, Operation
from blixard.domain.lease import SyncReply, SyncRequest
from blixard.domain.worker import Registration
from blixard.errors import InvalidRequest
from blixard.protocol import routes
from blixard.protocol.workers import LogBatch, RegisterReply, WorkerView


async def register(call: Call[Registration]) -> RegisterReply:
    return await call.plane.workers.register(call.namespace, call.body, token=call.token)


async def sync(call: Call[SyncRequest]) -> SyncReply:
    request = call.body
    if request.session != call.parameters["session"]:
        raise InvalidRequest("the body names another session than the path", field="session")

    def run(seconds: float) -> Awaitable[SyncReply]:
        again = request if seconds == request.wait else msgspec.structs.replace(request, wait=seconds)
        return call.plane.workers.sync(call.namespace, again, token=call.token)

    reply = await call.wait(run, request.wait)
    call.context.metrics.count_sync(claimed=len(reply.claimed), finished=len(request.finished))
    return reply


async def append_logs(call: Call[list[LogBatch]]) -> None:
    await call.plane.workers.append_logs(call.namespace, call.parameters["session"], call.body, token=call.token)


async def goodbye(call: Call[None]) -> None:
    await call.plane.workers.close(call.namespace, call.parameters["session"], token=call.token)


async def list_workers(call: Call[None]) -> list[WorkerView]:
    return await call.plane.workers.workers(call.namespace)


async def drain(call: Call[None]) -> WorkerView:
    return await call.plane.workers.drain(call.namespace, call.parameters["session"])


SYNC = Operation(routes.SYNC, sync)
OPERATIONS = (
    Operation(routes.REGISTER, register),
    SYNC,
    Operation(routes.WORKER_LOGS, append_logs),
    Operation(routes.GOODBYE, goodbye),
    Operation(routes.WORKERS, list_workers),
    Operation(routes.DRAIN_WORKER, drain),
)
