"""A handful of metrics that say what really happened, in a registry of the server's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from blixard.domain.state_machine import JobState
from blixard.protocol.jobs import StatsView

CONTENT_TYPE = CONTENT_TYPE_LATEST


class ApiMetrics:
    """Counters of this process since it started; jobs and workers as the store has them when asked."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "blixard_http_requests", "HTTP requests answered", ["route", "status"], registry=self._registry
        )
        self._children: dict[tuple[str, int], Counter] = {}
        self._claimed = Counter(
            "blixard_jobs_claimed", "Jobs handed to workers by this server", registry=self._registry
        )
        self._finished = Counter(
            "blixard_attempts_reported", "Ended attempts that workers reported", registry=self._registry
        )
        self._jobs = Gauge("blixard_jobs", "Jobs in the store by state", ["state"], registry=self._registry)
        self._workers = Gauge("blixard_workers", "Workers by state", ["state"], registry=self._registry)

    def count_request(self, route: str, status: int) -> None:
        # A look-up here is ten times cheaper than labels() on the hot path.
        child = self._children.get((route, status))
        if child is None:
            child = self._children[route, status] = self._requests.labels(route, str(status))
        child.inc()

    def count_sync(self, *, claimed: int, finished: int) -> None:
        if claimed:
            self._claimed.inc(claimed)
        if finished:
            self._finished.inc(finished)

    def render(self, stats: StatsView) -> bytes:
        """Return everything in the Prometheus text format."""
        for state in JobState:
            self._jobs.labels(str(state)).set(stats.jobs.get(state, 0))
        self._workers.clear()
        for name, count in stats.workers.items():
            self._workers.labels(name).set(count)
        return generate_latest(self._registry)
