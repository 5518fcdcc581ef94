"""What images have in common, built once and kept by its inputs: the files to boot with, and the root file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from blixard.vm.image.cpio import write_archive
from blixard.vm.image.debian import fetch_boot_files
from blixard.vm.image.guest_image import KERNEL, ROOT
from blixard.vm.image.manifest import Manifest, hash_file
from blixard.vm.image.recipe import Recipe
from blixard.vm.image.root import build_root
from blixard.vm.image.spec import digest_of
from blixard.vm.image.store import ImageStore, now
from blixard.vm.image.tools import BuildStopped, Tools

MODULES, BUSYBOX = "modules.cpio", "busybox"
SCRATCH_PREFIX = "blixard-image-"
QUICK_SCRATCH = Path("/dev/shm")  # noqa: S108  a directory of our own in it, with a name that nobody can guess
QUICK_SCRATCH_BYTES = 3 * 1024**3
SPARE_MEMORY_KIB = 6 * 1024**2


class PartBuilder:
    """Builds the missing parts of one image into ``store``. The caller holds the store's lock."""

    def __init__(
        self,
        store: ImageStore,
        recipe: Recipe,
        *,
        stop: threading.Event,
        scratch: Path | None,
        step: Callable[[str], None],
    ) -> None:
        self._store = store
        self._recipe = recipe
        self._failed = threading.Event()
        self._tools = Tools(stop, self._failed)
        self._scratch = scratch
        self._step = step

    def build(self) -> None:
        """Build both at once; when one fails, the other is ended, and what was built whole stays for the next time."""
        recipe = self._recipe
        with make_scratch(self._scratch) as scratch, ThreadPoolExecutor(2) as threads:
            jobs: list[Future[None]] = []
            if not self._store.find_part(recipe.boot_key):
                jobs.append(threads.submit(self._build_boot, scratch / "boot"))
            if not self._store.find_part(recipe.root_key):
                jobs.append(threads.submit(self._build_root, scratch / "root"))
            try:
                done = wait(jobs, return_when=FIRST_EXCEPTION).done
                _raise_first(done)
            finally:
                self._failed.set()

    def _build_boot(self, work: Path) -> None:
        work.mkdir()
        self._step("fetching the kernel")
        files = fetch_boot_files(self._recipe.spec, work, self._tools)
        with self._store.building() as made:
            (made / KERNEL).write_bytes(files.kernel)
            (made / MODULES).write_bytes(write_archive(files.modules))
            (made / BUSYBOX).write_bytes(files.busybox)
            self._publish(made, self._recipe.boot_inputs, {"boot": files.packages})

    def _build_root(self, work: Path) -> None:
        work.mkdir()
        with self._store.building() as made:
            contents = build_root(self._recipe.spec, work, made / ROOT, self._tools, self._step)
            self._publish(made, self._recipe.root_inputs, contents)

    def _publish(self, made: Path, inputs: dict[str, str], contents: dict[str, tuple[str, ...]]) -> None:
        key = digest_of(inputs)
        publish(self._store, made, self._store.part_directory(key), self._recipe, inputs, contents)


def publish(
    store: ImageStore,
    made: Path,
    target: Path,
    recipe: Recipe,
    inputs: dict[str, str],
    contents: dict[str, tuple[str, ...]],
) -> None:
    """Let ``made`` with all its files become ``target``."""
    manifest = Manifest(
        digest=target.name,
        spec=recipe.spec,
        inputs=inputs,
        contents=contents,
        created=now(),
        files={path.name: hash_file(path) for path in sorted(made.iterdir())},
    )
    store.publish(made, manifest, target)


@contextlib.contextmanager
def make_scratch(base: Path | None) -> Iterator[Path]:
    """Give an empty directory for intermediate files and remove it at the end; what killed builds of this user left goes first."""
    base = base or _choose_scratch()
    _remove_left(base)
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-", dir=base))
    scratch.chmod(0o711)  # the root user of a user namespace is somebody else, who has to get to the files in it
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _choose_scratch() -> Path:
    """Return memory if there is much more than needed: a build writes thousands of files that nobody keeps."""
    ordinary = Path(tempfile.gettempdir())
    try:
        state = os.statvfs(QUICK_SCRATCH)
        memory = {line.split()[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    except OSError:
        return ordinary
    usable = not state.f_flag & (os.ST_NOEXEC | os.ST_RDONLY) and os.access(QUICK_SCRATCH, os.W_OK)
    spare = state.f_bavail * state.f_frsize >= QUICK_SCRATCH_BYTES
    return QUICK_SCRATCH if usable and spare and int(memory["MemAvailable:"]) >= SPARE_MEMORY_KIB else ordinary


def _remove_left(base: Path) -> None:
    for path in base.glob(f"{SCRATCH_PREFIX}*"):
        owner = path.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and path.stat().st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)


def _raise_first(jobs: set[Future[None]]) -> None:
    """Raise what went wrong; that one part was stopped because of the other tells nothing."""
    errors = [error for job in jobs if (error := job.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, BuildStopped)):
        raise error
