"""/jobs: submit, find, wait, cancel, retry, and everything about one."""

from __future__ import annotations

from blixard.api.operation import Call, Operation
from blixard.protocol import routes
from blixard.protocol.jobs import (
    CancelReply,
    EventView,
    JobDetail,
    JobFilter,
    JobPage,
    JobView,
    LogPageView,
    SubmitReply,
    SubmitRequest,
    WaitReply,
    WaitRequest,
    WhyView,
)


async def submit(call: Call[SubmitRequest]) -> SubmitReply:
    return await call.plane.commands.submit(call.namespace, call.body)


async def list_jobs(call: Call[None]) -> JobPage:
    query = call.query_as(routes.JobsQuery)
    where = JobFilter(
        states=query.state,
        name=query.name,
        tag=query.tag,
        queue=query.queue,
        batch=query.batch,
        since=query.since,
        until=query.until,
    )
    return await call.plane.queries.jobs(call.namespace, where, limit=query.limit, cursor=query.cursor)


async def wait(call: Call[WaitRequest]) -> WaitReply:
    ids = call.body.ids
    return await call.wait(lambda seconds: call.plane.queries.wait(call.namespace, ids, wait=seconds), call.body.wait)


async def show(call: Call[None]) -> JobDetail:
    return await call.plane.queries.job(call.namespace, call.parameters["job_id"])


async def cancel(call: Call[None]) -> CancelReply:
    return await call.plane.commands.cancel_job(call.namespace, call.parameters["job_id"])


async def retry(call: Call[None]) -> JobView:
    return await call.plane.commands.retry_job(call.namespace, call.parameters["job_id"])


async def why(call: Call[None]) -> WhyView:
    return await call.plane.queries.why(call.namespace, call.parameters["job_id"])


async def events(call: Call[None]) -> list[EventView]:
    return await call.plane.queries.events(call.namespace, call.parameters["job_id"])


async def logs(call: Call[None]) -> LogPageView:
    query = call.query_as(routes.LogsQuery)
    job_id = call.parameters["job_id"]
    return await call.wait(
        lambda seconds: call.plane.logs.read(
            call.namespace, job_id, attempt=query.attempt, offset=query.offset, wait=seconds
        ),
        query.wait,
    )


SUBMIT = Operation(routes.SUBMIT, submit)
WAIT = Operation(routes.WAIT, wait)
OPERATIONS = (
    SUBMIT,
    Operation(routes.JOBS, list_jobs),
    WAIT,
    Operation(routes.JOB, show),
    Operation(routes.CANCEL, cancel),
    Operation(routes.RETRY, retry),
    Operation(routes.WHY, why),
    Operation(routes.EVENTS, events),
    Operation(routes.LOGS, logs),
)
