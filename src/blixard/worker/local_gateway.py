"""The gateway of a worker that has the control plane in its own process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from blixard.domain.lease import SyncReply, SyncRequest
from blixard.domain.worker import Registration
from blixard.protocol.workers import LogBatch, RegisterReply
from blixard.services.control_plane import ControlPlane


class LocalGateway:
    """Calls the services directly. The control plane stays its owner's: ``aclose`` does not close it."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._plane = plane
        self._namespace = namespace

    async def register(self, registration: Registration) -> RegisterReply:
        return await self._plane.workers.register(self._namespace, registration)

    async def sync(self, request: SyncRequest) -> SyncReply:
        return await self._plane.workers.sync(self._namespace, request)

    async def append_logs(self, session: str, batches: Sequence[LogBatch]) -> None:
        await self._plane.workers.append_logs(self._namespace, session, list(batches))

    async def close_session(self, session: str) -> None:
        await self._plane.workers.close(self._namespace, session)

    async def put_blob(self, content: bytes) -> str:
        return await self._plane.blobs.put(content)

    async def fetch_blob(self, digest: str, directory: Path) -> Path:
        """Return the store's own file if it has files; an object store's blob is copied to ``directory``."""
        path = await self._plane.blobs.open_path(digest)
        if path is not None:
            return path
        return await asyncio.to_thread(write_file, directory / digest, await self._plane.blobs.get(digest))

    async def aclose(self) -> None:
        return


def write_file(path: Path, content: bytes) -> Path:
    """Make ``path`` a read-only file with this content, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(content)
    partial.chmod(0o444)
    return partial.replace(path)
