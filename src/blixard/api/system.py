"""/stats, /health, /metrics, /prune: the server itself."""

from __future__ import annotations

from blixard.api.answer import Answer
from blixard.api.metrics import CONTENT_TYPE
from blixard.api.operation import Call, Operation
from blixard.api.version import server_version
from blixard.protocol import routes
from blixard.protocol.jobs import StatsView
from blixard.protocol.workers import Health
from blixard.services.health import check_store


async def stats(call: Call[None]) -> StatsView:
    return await call.plane.queries.stats(call.namespace)


async def live(call: Call[None]) -> Health:
    del call
    return Health(status="ok", version=server_version())


async def ready(call: Call[None]) -> Health:
    """Raises ``StoreUnavailable``, answered as 503."""
    await check_store(call.plane.database)
    return Health(status="ok", version=server_version(), checks={"store": "ok"})


async def metrics(call: Call[None]) -> Answer:
    numbers = await call.plane.queries.stats(call.namespace)
    return Answer(200, call.context.metrics.render(numbers), content_type=CONTENT_TYPE)


async def prune(call: Call[None]) -> dict[str, int]:
    return await call.plane.maintenance.prune_now()


OPERATIONS = (
    Operation(routes.STATS, stats),
    Operation(routes.LIVE, live),
    Operation(routes.READY, ready),
    Operation(routes.METRICS, metrics),
    Operation(routes.PRUNE, prune),
)
