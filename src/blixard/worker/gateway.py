"""What a worker asks of the control plane. In the same process or over HTTP: same calls, same errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from blixard.domain.lease import SyncReply, SyncRequest
from blixard.domain.worker import Registration
from blixard.protocol.workers import LogBatch, RegisterReply


class WorkerGateway(Protocol):
    """Raises ``Unavailable`` when it cannot be known whether the call arrived; every call may be repeated as it was.

    Other errors are answers: ``SessionExpired``, ``LeaseLost``, ``Unauthenticated``, ``Forbidden``, ``BlobNotFound``, …
    All methods may be called many at once on one event loop.
    """

    async def register(self, registration: Registration) -> RegisterReply:
        """Open the session that the registration names; the same one again when repeated."""

    async def sync(self, request: SyncRequest) -> SyncReply:
        """Report, renew and claim. Takes up to ``request.wait`` seconds longer than the journey. Raises ``SessionExpired``."""

    async def append_logs(self, session: str, batches: Sequence[LogBatch]) -> None:
        """Store output durably behind what is there; what was stored before is recognised by its offset. Raises ``LeaseLost``."""

    async def close_session(self, session: str) -> None:
        """Say good-bye: whatever the session still holds is given back."""

    async def put_blob(self, content: bytes) -> str:
        """Store a blob durably and return its digest."""

    async def fetch_blob(self, digest: str, directory: Path) -> Path:
        """Return a local file with the blob's content: the store's own, or a checked copy ``directory/digest``. Raises ``BlobNotFound``."""

    async def aclose(self) -> None:
        """Give back connections. Calls under way fail with ``Unavailable``."""
