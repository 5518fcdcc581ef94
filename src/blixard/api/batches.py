"""/batches: the jobs of one map."""

from __future__ import annotations

from blixard.api.operation import Call, Operation
from blixard.protocol import routes
from blixard.protocol.jobs import BatchCancelReply, BatchResults, BatchView, OpenBatchRequest


async def open_batch(call: Call[OpenBatchRequest]) -> BatchView:
    return await call.plane.commands.open_batch(call.namespace, call.body)


async def show(call: Call[None]) -> BatchView:
    return await call.plane.queries.batch(call.namespace, call.parameters["batch_id"])


async def results(call: Call[None]) -> BatchResults:
    query = call.query_as(routes.ResultsQuery)
    batch_id = call.parameters["batch_id"]
    return await call.wait(
        lambda seconds: call.plane.queries.batch_results(
            call.namespace, batch_id, after=query.after, limit=query.limit, wait=seconds
        ),
        query.wait,
    )


async def cancel(call: Call[None]) -> BatchCancelReply:
    batch_id = call.parameters["batch_id"]
    cancelled = await call.plane.commands.cancel_batch(call.namespace, batch_id)
    return BatchCancelReply(id=batch_id, cancelled=cancelled)


OPERATIONS = (
    Operation(routes.OPEN_BATCH, open_batch),
    Operation(routes.BATCH, show),
    Operation(routes.BATCH_RESULTS, results),
    Operation(routes.CANCEL_BATCH, cancel),
)
