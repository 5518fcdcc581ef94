"""Builds that succeed, fail, are killed, and race each other: an image is whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from blixard.errors import ImageNotFound, InvalidRequest, Unavailable
from blixard.vm.image import recipe
from blixard.vm.image.builder import ImageBuilder, ensure_default_image, ensure_image
from blixard.vm.image.manifest import read_manifest
from blixard.vm.image.spec import ImageSpec, digest_of
from blixard.vm.image.store import ImageStore
from blixard.vm.image.tools import BuildStopped, Tools
from tests.unit.vm.image.builds import Builds, everything_below

DEADLINE = 60.0


def test_a_built_image_has_all_files_and_says_what_it_is_made_of(store: ImageStore, builds: Builds) -> None:
    image = ImageBuilder(store).build(ImageSpec(packages=("curl",)), builds.progress)
    assert image.kernel.read_bytes() == b"kernel" * 100
    assert image.root.stat().st_size > builds.bytes
    assert b"overlay.ko" in image.initrd.read_bytes()
    assert b"start_agent.py" in image.initrd.read_bytes()
    manifest = read_manifest(image.directory)
    assert manifest.digest == image.digest == digest_of(manifest.inputs)
    assert manifest.contents == {"boot": ("linux 6.1",), "debian": ("python3 3.11",), "python": ()}
    assert sorted(manifest.files) == ["initrd", "root.ext4", "vmlinuz"]
    assert {path.stat().st_mode & 0o777 for path in image.directory.iterdir()} == {0o444}


def test_steps_go_forward_and_end_at_the_end(store: ImageStore, builds: Builds) -> None:
    ensure_default_image(store, builds.progress)
    done = [step.done for step in builds.steps]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert "half" in [step.text for step in builds.steps]


def test_what_is_built_is_not_built_again_and_says_nothing(store: ImageStore, builds: Builds) -> None:
    first = ensure_default_image(store, builds.progress)
    builds.steps.clear()
    assert ensure_default_image(store, builds.progress) == first
    assert ensure_default_image(ImageStore(store.directory), builds.progress) == first
    assert (builds.boots, builds.roots, builds.steps) == (1, 1, [])


def test_equal_inputs_under_two_names_are_one_image(store: ImageStore, builds: Builds) -> None:
    one = ImageBuilder(store).build(ImageSpec(name="one", packages=("git", "curl")), builds.progress)
    two = ImageBuilder(store).build(ImageSpec(name="two", packages=("curl", "git", "curl")), builds.progress)
    assert one.digest == two.digest
    assert builds.roots == 1
    assert store.names() == {"one": one.digest, "two": one.digest}


def test_another_image_shares_the_kernel(store: ImageStore, builds: Builds) -> None:
    first = ensure_default_image(store, builds.progress)
    second = ImageBuilder(store).build(ImageSpec(name="more", packages=("git",)), builds.progress)
    assert first.digest != second.digest
    assert (builds.boots, builds.roots) == (1, 2)
    assert first.kernel.stat().st_ino == second.kernel.stat().st_ino


def test_changed_guest_code_makes_a_new_image_from_the_same_parts(
    store: ImageStore, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    ImageBuilder(store).build(ImageSpec(name="mine", packages=("git",)), builds.progress)
    before = ensure_image(store, "mine", builds.progress)
    monkeypatch.setattr(recipe, "init_script", lambda: b"#!/bin/sh\n# a later version\n")
    after = ensure_image(store, "mine", builds.progress)
    assert after.digest != before.digest
    assert (builds.boots, builds.roots) == (1, 1)
    assert b"a later version" in after.initrd.read_bytes()
    assert store.find("mine") == after
    assert ensure_image(store, before.digest, builds.progress).digest == before.digest


def test_a_name_that_was_never_built_is_not_found(store: ImageStore, builds: Builds) -> None:
    with pytest.raises(ImageNotFound):
        ensure_image(store, "data-science", builds.progress)
    assert builds.roots == 0


def test_the_default_image_can_be_given_other_contents(store: ImageStore, builds: Builds) -> None:
    mine = ImageBuilder(store).build(ImageSpec(packages=("git",)), builds.progress)
    assert ensure_default_image(store, builds.progress).digest == mine.digest


@pytest.mark.parametrize(
    "error", [Unavailable("no network"), InvalidRequest("no package"), OSError(28, "No space left")]
)
def test_a_failed_build_leaves_nothing_and_the_next_one_works(
    store: ImageStore, builds: Builds, error: Exception, tmp_path: Path
) -> None:
    def fail(tools: Tools) -> None:
        raise error

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    builds.during = fail
    kind = Unavailable if isinstance(error, OSError) else type(error)
    with pytest.raises(kind):
        ImageBuilder(store, scratch=scratch).build(ImageSpec(), builds.progress)
    assert store.records() == ()
    assert store.names() == {}
    assert everything_below(scratch) == []
    assert not [path for path in everything_below(store.directory) if path.startswith(".building")]
    builds.during = lambda tools: None
    assert ImageBuilder(store, scratch=scratch).build(ImageSpec(), builds.progress).root.exists()
    assert everything_below(scratch) == []


def test_a_name_keeps_its_meaning_when_a_build_fails(store: ImageStore, builds: Builds) -> None:
    before = ensure_default_image(store, builds.progress)

    def fail(tools: Tools) -> None:
        raise Unavailable("no network")

    builds.during = fail
    with pytest.raises(Unavailable):
        ImageBuilder(store).build(ImageSpec(packages=("git",)), builds.progress)
    assert store.find("default") == before


def test_a_part_that_fails_ends_the_other_and_is_the_one_told(store: ImageStore, builds: Builds) -> None:
    def fail(tools: Tools) -> None:
        raise Unavailable("no kernel to be had")

    def wait(tools: Tools) -> None:
        tools.run(["sleep", "1000"])

    builds.during_boot, builds.during = fail, wait
    with pytest.raises(Unavailable, match="no kernel"):
        ImageBuilder(store).build(ImageSpec(), builds.progress)


def test_a_build_can_be_stopped(store: ImageStore, builds: Builds) -> None:
    stop, begun = threading.Event(), threading.Event()

    def wait(tools: Tools) -> None:
        begun.set()
        tools.run(["sleep", "1000"])

    builds.during = wait
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(ImageBuilder(store, stop=stop).build, ImageSpec(), builds.progress)
        assert begun.wait(DEADLINE)
        stop.set()
        with pytest.raises(BuildStopped):
            job.result(DEADLINE)
    assert store.records() == ()


def test_many_builders_at_once_build_once(store: ImageStore, builds: Builds) -> None:
    def build(_: int) -> str:
        return ensure_default_image(ImageStore(store.directory), builds.progress).digest

    with ThreadPoolExecutor(8) as threads:
        digests = set(threads.map(build, range(8)))
    assert len(digests) == 1
    assert (builds.boots, builds.roots) == (1, 1)


def test_a_waiting_build_can_be_stopped(store: ImageStore, builds: Builds) -> None:
    stop = threading.Event()
    stop.set()
    with store.lock(threading.Event()), pytest.raises(BuildStopped):
        ImageBuilder(ImageStore(store.directory), stop=stop).build(ImageSpec(), builds.progress)


def _build_for_ever(directory: Path, scratch: Path, begun: Event) -> None:
    builds = Builds()

    def wait(tools: Tools) -> None:
        begun.set()
        threading.Event().wait()

    builds.during = wait
    with pytest.MonkeyPatch.context() as patched:
        builds.put_in_place(patched)
        ImageBuilder(ImageStore(directory), scratch=scratch).build(ImageSpec(), builds.progress)


def test_a_killed_build_is_never_seen_and_its_rest_goes_with_the_next_one(
    store: ImageStore, builds: Builds, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    process = spawn.Process(target=_build_for_ever, args=(store.directory, scratch, begun))
    process.start()
    assert begun.wait(DEADLINE)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert any("half a root" in path.read_text() for path in store.directory.glob(".building-*/root.ext4"))
    assert everything_below(scratch) != []
    assert store.records() == ()
    with pytest.raises(ImageNotFound):
        store.find("default")
    ImageBuilder(store, scratch=scratch).build(ImageSpec(), builds.progress)
    assert not list(store.directory.glob(".building-*"))
    assert everything_below(scratch) == []


FULL = """
import sys
from pathlib import Path
import pytest
from blixard.errors import Unavailable
from blixard.vm.image.builder import ImageBuilder
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.store import ImageStore
from tests.unit.vm.image.builds import Builds

store, builds = ImageStore(Path(sys.argv[1])), Builds()
with pytest.MonkeyPatch.context() as patched:
    builds.put_in_place(patched)
    builds.bytes = 2_000_000
    try:
        ImageBuilder(store, scratch=Path(sys.argv[2])).build(ImageSpec(), builds.progress)
    except Unavailable as error:
        print(error.message)
    print(store.records(), store.names(), sorted(path.name for path in store.directory.glob(".b*")))
    builds.bytes = 1000
    print(len(ImageBuilder(store, scratch=Path(sys.argv[2])).build(ImageSpec(), builds.progress).digest))
"""


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1" "$4"'
    words = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        script,
        "sh",
        str(place),
        sys.executable,
        FULL,
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "building the image: no space left on the disk; nothing was kept",
        "() {} []",
        "64",
    ]
