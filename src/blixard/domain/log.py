"""What a job wrote: one piece of its output, as it is kept and as it travels."""

from __future__ import annotations

import msgspec

from blixard.domain.limits import WireInt


class LogRecord(msgspec.Struct, frozen=True, array_like=True):
    """``at`` in microseconds since 1970, ``stream`` ``stdout`` or ``stderr``; ``data`` travels as bytes (MessagePack) or base64 (JSON)."""

    at: WireInt
    stream: str
    data: bytes
