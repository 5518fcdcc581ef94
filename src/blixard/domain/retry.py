"""When a failed attempt is tried again."""

from __future__ import annotations

import msgspec

from blixard.domain.limits import DEFAULT_MAX_LOST, MAX_RETRIES
from blixard.errors import InvalidRequest

MAX_DELAY_SECONDS = 7 * 24 * 3600.0


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``retries`` failures of the job itself are tried again after ``delay * factor**n`` seconds, at most ``max_delay``.

    ``jitter`` spreads a delay by up to that share of it, both ways. Lost workers are counted apart, by ``max_lost``.
    """

    retries: int = 0
    delay: float = 1.0
    factor: float = 2.0
    max_delay: float = 300.0
    jitter: float = 0.1
    max_lost: int = DEFAULT_MAX_LOST

    def delay_after(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after the ``failures``-th failure (1 is the first); ``chance`` is a random number in [0, 1)."""
        exponent = min(failures - 1, 64)
        base = min(self.delay * self.factor**exponent, self.max_delay)
        return max(0.0, base * (1 + self.jitter * (2 * chance - 1)))


def check_retry_policy(policy: RetryPolicy) -> None:
    """Raise ``InvalidRequest`` naming the field that is out of range."""
    for field, value, low, high in (
        ("retries", policy.retries, 0, MAX_RETRIES),
        ("delay", policy.delay, 0, MAX_DELAY_SECONDS),
        ("factor", policy.factor, 1, 100),
        ("max_delay", policy.max_delay, 0, MAX_DELAY_SECONDS),
        ("jitter", policy.jitter, 0, 1),
        ("max_lost", policy.max_lost, 0, MAX_RETRIES),
    ):
        if not low <= value <= high:
            raise InvalidRequest(f"{field} is {value:g}; {low:g} to {high:g} is allowed", field=f"retry.{field}")
    if policy.delay > policy.max_delay:
        raise InvalidRequest(
            f"delay is {policy.delay:g} s, more than max_delay, {policy.max_delay:g} s",
            field="retry.delay",
            hint="raise max_delay as well",
        )
