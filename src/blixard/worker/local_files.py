"""Blobs that jobs of this worker need, as files on this machine."""

from __future__ import annotations

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from blixard.bundling.archive import unpack
from blixard.domain.limits import MIB
from blixard.worker.gateway import WorkerGateway

DEFAULT_CACHE_BYTES = 2048 * MIB
"""Of files that no running job uses."""


class _LocalFile:
    __slots__ = ("making", "path", "pins", "size")

    def __init__(self) -> None:
        self.making: asyncio.Task[None] | None = None
        self.path: Path | None = None
        self.size = 0
        self.pins = 0


class LocalFiles:
    """Fetches each blob once, unpacks each bundle once, and keeps both until newer ones need the room. What a job uses stays.

    Files of the store itself are used where they are.
    """

    def __init__(self, gateway: WorkerGateway, directory: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self._gateway = gateway
        self._directory = directory
        self._limit = limit
        self._files: OrderedDict[str, _LocalFile] = OrderedDict()
        self._size = 0

    def pin_ready(self, digests: Iterable[str]) -> dict[str, Path] | None:
        """Return the local paths if all are here, and keep them until ``unpin``; else None."""
        found = {}
        for digest in digests:
            file = self._files.get(digest)
            if file is None or file.path is None:
                return None
            found[digest] = file.path
        for digest in found:
            self._files[digest].pins += 1
            self._files.move_to_end(digest)
        return found

    async def pin(self, digests: Iterable[str], bundle: str | None) -> dict[str, Path]:
        """Fetch what is missing (``bundle`` is unpacked), return the paths and keep them until ``unpin``.

        Raises what the gateway raises, ``InvalidRequest`` for a broken bundle, ``OSError``; then nothing is kept.
        """
        wanted = {digest: self._pin_one(digest, unpacked=digest == bundle) for digest in digests}
        try:
            return {digest: await self._path(file) for digest, file in wanted.items()}
        except BaseException:
            # By object and not by digest: a failed fetch has left the table, and another may stand there by now.
            for file in wanted.values():
                file.pins -= 1
            raise

    def unpin(self, digests: Iterable[str]) -> None:
        for digest in digests:
            file = self._files.get(digest)
            if file is not None:
                file.pins -= 1
        self._shrink()

    async def close(self) -> None:
        """Stop fetching. The directory is its owner's to remove."""
        making = [file.making for file in self._files.values() if file.making is not None]
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)

    def _pin_one(self, digest: str, *, unpacked: bool) -> _LocalFile:
        file = self._files.get(digest)
        if file is None:
            file = self._files[digest] = _LocalFile()
            file.making = asyncio.create_task(self._make(file, digest, unpacked=unpacked), name=f"fetch {digest}")
            file.making.add_done_callback(lambda task: self._made(digest, file, task))
        file.pins += 1
        return file

    def _made(self, digest: str, file: _LocalFile, task: asyncio.Task[None]) -> None:
        file.making = None
        if task.cancelled() or task.exception() is not None:
            self._files.pop(digest, None)

    async def _path(self, file: _LocalFile) -> Path:
        if file.path is None and file.making is not None:
            # Shielded: another job may wait for the same file when this one is cancelled.
            await asyncio.shield(file.making)
        assert file.path is not None
        return file.path

    async def _make(self, file: _LocalFile, digest: str, *, unpacked: bool) -> None:
        path = await self._gateway.fetch_blob(digest, self._directory / "blobs")
        if unpacked:
            target = self._directory / "bundles" / digest
            await asyncio.to_thread(unpack, path, target)
            if path.is_relative_to(self._directory):
                path.unlink()
            path = target
        file.size = await asyncio.to_thread(_size, path) if path.is_relative_to(self._directory) else 0
        self._size += file.size
        file.path = path

    def _shrink(self) -> None:
        if self._size <= self._limit:
            return
        for digest, file in list(self._files.items()):
            if file.pins <= 0 and file.path is not None:
                self._remove(digest, file)
            if self._size <= self._limit:
                return

    def _remove(self, digest: str, file: _LocalFile) -> None:
        assert file.path is not None
        del self._files[digest]
        self._size -= file.size
        if not file.path.is_relative_to(self._directory):
            return
        if file.path.is_dir():
            shutil.rmtree(file.path)
        else:
            file.path.unlink()


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size
