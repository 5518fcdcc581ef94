"""Job ids: sortable by time of creation, unique without asking anybody."""

from __future__ import annotations

import os
import re
import secrets
import threading
import time

from blixard.domain.limits import MAX_ID_LENGTH
from blixard.errors import InvalidRequest

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_ID = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.:-]{{0,{MAX_ID_LENGTH - 1}}}")
DEFAULT_NAMESPACE = "default"


_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
"""Two digits at once: a batch of thousands waits for its ids."""


def _base32(value: int, length: int) -> str:
    """Return an even number of digits."""
    pairs = []
    for _ in range(length // 2):
        pairs.append(_PAIRS[value & 1023])
        value >>= 10
    return "".join(reversed(pairs))


class IdGenerator:
    """Makes ids that sort in the order they were made, also within one microsecond (as ULID, https://github.com/ulid/spec).

    26 characters: 10 of milliseconds, 16 of randomness that is counted up within the same millisecond.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._last = 0
        self._random = 0

    def next(self, prefix: str) -> str:
        """Return ``prefix`` + ``_`` + 26 characters. Safe from several threads and after a fork."""
        return self.next_many(prefix, 1)[0]

    def next_many(self, prefix: str, count: int) -> list[str]:
        """Return that many at once, rising by one each."""
        with self._lock:
            now = time.time_ns() // 1_000_000
            if now > self._last or self._pid != os.getpid():
                self._last = max(now, self._last)
                self._pid = os.getpid()
                self._random = secrets.randbits(79)
            else:
                self._random += 1
            moment, first = self._last, self._random
            self._random += count - 1
        return _format_ids(f"{prefix}_{_base32(moment, 10)}", first, count)


def _format_ids(start: str, first: int, count: int) -> list[str]:
    """Return ``start`` with 16 digits behind it for each number from ``first`` on. What changes rarely is written rarely."""
    ids: list[str] = []
    while len(ids) < count:
        head = start + _base32(first >> 20, 12)
        low = first & 0xFFFFF
        high = min(low + count - len(ids), 1 << 20)
        ids += [f"{head}{_PAIRS[number >> 10]}{_PAIRS[number & 1023]}" for number in range(low, high)]
        first += high - low
    return ids


_generator = IdGenerator()


def new_job_id() -> str:
    return _generator.next("job")


def new_job_ids(count: int) -> list[str]:
    return _generator.next_many("job", count)


def new_id(prefix: str) -> str:
    """Return a fresh id such as ``worker_01jd…``."""
    return _generator.next(prefix)


def check_id(value: str, *, field: str = "id") -> str:
    """Return ``value`` if it can be an id: 1 to 255 of letters, digits, ``_ . : -``, the first a letter, digit or ``_``.

    Raises ``InvalidRequest``.
    """
    if _ID.fullmatch(value):
        return value
    if not 1 <= len(value) <= MAX_ID_LENGTH:
        raise InvalidRequest(f"{field} has {len(value)} characters; 1 to {MAX_ID_LENGTH} are allowed", field=field)
    raise InvalidRequest(
        f"{field} {value!r} is not an id; letters, digits and _ . : - are allowed, starting with a letter, digit or _",
        field=field,
    )
