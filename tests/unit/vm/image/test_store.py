"""Images at rest: damage of any kind is found and never used, names survive, prune removes what nobody needs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blixard.errors import ImageNotFound, Unavailable
from blixard.vm.image import manifest as manifests
from blixard.vm.image import recipe
from blixard.vm.image.builder import ImageBuilder, ensure_default_image
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.image.manifest import FileRecord
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.store import NAMES, ImageStore
from tests.unit.vm.image.builds import Builds

FILES = ["vmlinuz", "initrd", "root.ext4"]


@pytest.fixture
def image(store: ImageStore, builds: Builds) -> GuestImage:
    return ensure_default_image(store, builds.progress)


def rewrite(path: Path, content: bytes) -> None:
    """Change a file as a broken disk would, though it may not be written."""
    path.chmod(0o600)
    path.write_bytes(content)


def test_an_image_is_found_by_name_and_by_digest(store: ImageStore, image: GuestImage) -> None:
    assert store.find("default") == image
    assert store.find(image.digest).directory == image.directory
    assert store.names() == {"default": image.digest}


@pytest.mark.parametrize("wanted", ["other", "0" * 64, "", "..", "../images", "parts", "names.json"])
def test_anything_else_is_not_found(store: ImageStore, image: GuestImage, wanted: str) -> None:
    with pytest.raises(ImageNotFound) as caught:
        store.find(wanted)
    assert caught.value.image == wanted


def test_nothing_is_found_where_there_is_no_store(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "nowhere")
    with pytest.raises(ImageNotFound):
        store.find("default")
    assert (store.records(), store.names(), store.prune().images) == ((), {}, ())
    with pytest.raises(ImageNotFound):
        store.prune(["mine"])
    assert not store.directory.exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_wrong_bit_anywhere_is_found(store: ImageStore, builds: Builds, data: st.DataObject) -> None:
    image = ensure_default_image(store, builds.progress)
    path = image.directory / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    rewrite(path, bytes(content))
    assert store.records()[0].damage
    with pytest.raises(ImageNotFound, match="damaged"):
        ImageStore(store.directory).find("default")
    assert not image.directory.exists()
    assert store.find(ensure_default_image(store, builds.progress).digest)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(junk=st.binary(max_size=200))
def test_a_manifest_of_junk_is_found(store: ImageStore, builds: Builds, junk: bytes) -> None:
    image = ensure_default_image(store, builds.progress)
    rewrite(image.directory / "manifest.json", junk)
    with pytest.raises(ImageNotFound, match="damaged"):
        store.find("default")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_found(store: ImageStore, image: GuestImage, name: str) -> None:
    (image.directory / name).unlink()
    with pytest.raises(ImageNotFound, match="damaged"):
        store.find("default")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_is_found(store: ImageStore, image: GuestImage, name: str) -> None:
    path = image.directory / name
    rewrite(path, path.read_bytes()[:-1])
    with pytest.raises(ImageNotFound, match="checksum"):
        store.find("default")


def test_an_image_under_another_ones_digest_is_found(store: ImageStore, image: GuestImage) -> None:
    image.directory.rename(image.directory.with_name("1" * 64))
    with pytest.raises(ImageNotFound, match="damaged"):
        store.find("1" * 64)


def test_a_damaged_part_is_built_again(store: ImageStore, image: GuestImage, builds: Builds) -> None:
    """The image and its part are one file on the disk, so damage hits both."""
    rewrite(image.root, b"nothing")
    assert ensure_default_image(store, builds.progress).digest == image.digest
    assert (builds.boots, builds.roots) == (1, 2)
    assert image.root.stat().st_size > builds.bytes


def test_files_are_read_once_and_again_when_they_change(
    store: ImageStore, image: GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def count(path: Path) -> FileRecord:
        read.append(path.name)
        return original(path)

    original = manifests.hash_file
    monkeypatch.setattr(manifests, "hash_file", count)
    fresh = ImageStore(store.directory)
    fresh.find("default")
    assert sorted(read) == sorted(FILES)
    fresh.find("default")
    assert len(read) == len(FILES)
    os.utime(image.root, (1, 1))
    fresh.find("default")
    assert read[len(FILES) :] == ["root.ext4"]


def test_a_disk_that_cannot_be_read_does_not_cost_the_image(
    store: ImageStore, image: GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> FileRecord:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifests, "hash_file", fail)
    with pytest.raises(Unavailable, match="Input/output"):
        ImageStore(store.directory).find("default")
    monkeypatch.undo()
    assert store.find("default") == image


@pytest.mark.parametrize("junk", [b"", b"{", b"\xff", b"[1]"])
def test_lost_names_are_found_in_the_images(store: ImageStore, builds: Builds, image: GuestImage, junk: bytes) -> None:
    mine = ImageBuilder(store).build(ImageSpec(name="mine", packages=("git",)), builds.progress)
    (store.directory / NAMES).write_bytes(junk)
    assert store.names() == {"default": image.digest, "mine": mine.digest}


def test_prune_removes_what_has_no_name_and_what_only_that_needed(
    store: ImageStore, builds: Builds, image: GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ImageBuilder(store).build(ImageSpec(name="mine", packages=("git",)), builds.progress)
    monkeypatch.setattr(recipe, "init_script", lambda: b"newer")
    newer = ensure_default_image(store, builds.progress)
    (store.directory / ".building-x").mkdir()
    (store.directory / ".building-x" / "rest").write_bytes(b"1")
    with pytest.raises(ImageNotFound):
        store.prune(["mine", "other"])
    assert store.find("mine") == mine
    pruned = store.prune(["mine"])
    assert sorted(pruned.images) == sorted([image.digest, mine.digest])
    assert pruned.names == ("mine",)
    assert pruned.freed_bytes >= builds.bytes
    assert store.names() == {"default": newer.digest}
    assert store.find("default") == newer
    assert len(list((store.directory / "parts").iterdir())) == 2
    assert sorted(path.name for path in store.directory.iterdir()) == sorted([".lock", NAMES, "parts", newer.digest])


def test_prune_keeps_what_it_is_told_to(store: ImageStore, builds: Builds, image: GuestImage) -> None:
    assert store.prune(["default"], keep=[image.digest]).images == ()
    assert store.find(image.digest)


def test_records_tell_of_every_image(store: ImageStore, builds: Builds, image: GuestImage) -> None:
    ImageBuilder(store).build(ImageSpec(name="mine", packages=("git",)), builds.progress)
    newest, oldest = store.records()
    assert (newest.names, oldest.names) == (("mine",), ("default",))
    assert newest.spec is not None
    assert newest.spec.packages == ("git",)
    assert newest.size_bytes > builds.bytes
    rewrite(image.kernel, b"nothing")  # one file for both of them
    assert all("checksum" in record.damage for record in ImageStore(store.directory).records())
    assert image.directory.exists()


def test_the_lock_holds_between_processes(store: ImageStore) -> None:
    with store.lock(threading.Event()):
        pid = os.fork()
        if pid == 0:
            stopped = threading.Event()
            stopped.set()
            try:
                with ImageStore(store.directory).lock(stopped):
                    os._exit(1)
            except Exception:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with store.lock(threading.Event()):
        pass
