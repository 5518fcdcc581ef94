"""An image with a Debian package and packages from PyPI, built as its users build it, booted, and looked at from within."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from blixard.errors import InvalidRequest, Unavailable
from blixard.vm.agent_link import AgentLink, connect, fresh_identity, run_program
from blixard.vm.hypervisor.contract import MachineShape
from blixard.vm.image.builder import BuildStep, ImageBuilder
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.store import ImageStore
from tests.vm.leaser import BOOT_SECONDS, CACHE, kept

SPEC = ImageSpec(name="tests-extra", packages=("hello",), requirements="markdown-it-py==4.3.0  # and mdurl\n")
LOOK = """
import json, os, pathlib, pwd, stat, subprocess, sys
import markdown_it, mdurl
def told(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()
def lines(path):
    return pathlib.Path(path).read_text().splitlines()
mounts = {line.split()[1]: line.split() for line in lines("/proc/mounts")}
shadow = dict(line.split(":")[:2] for line in lines("/etc/shadow"))
pyc = pathlib.Path(json.__cached__).read_bytes()[4]
setuid = [path for path in told("find", "/usr", "-perm", "-4000").split()]
compiled = pathlib.Path(markdown_it.__cached__)
pathlib.Path("/usr/written").write_text("to memory")
print(json.dumps({
    "python": sys.version_info[:2], "markdown": markdown_it.__file__, "hello": told("hello"),
    "script": told("markdown-it", "--version"), "mounts": {path: mounts[path][2:4] for path in ("/", "/dev/shm", "/sys/fs/cgroup", "/tmp")},
    "passwords": {name: word for name, word in shadow.items() if not word.startswith(("*", "!"))},
    "job": pwd.getpwnam("job")[2:7], "home": stat.S_IMODE(os.stat("/home/job").st_mode), "compiled": compiled.exists() and compiled.read_bytes()[4],
    "pyc": pyc, "loopback": lines("/sys/class/net/lo/operstate"), "cards": os.listdir("/sys/class/net"),
    "controllers": lines("/sys/fs/cgroup/cgroup.controllers"), "listening": len(lines("/proc/net/tcp")), "sshd": os.path.exists("/usr/sbin/sshd"),
}))
"""


@pytest.fixture(scope="module")
def image() -> GuestImage:
    """Built once and kept with the others."""
    return ImageBuilder(ImageStore(CACHE / "images")).build(SPEC, lambda step: None)


@pytest.fixture
async def guest(image: GuestImage, tmp_path: Path) -> AsyncIterator[AgentLink]:
    hypervisor, _ = kept()
    directory = tmp_path / "machine"
    directory.mkdir(mode=0o700)
    machine = await hypervisor.boot("vm-image-test", MachineShape(image=image, memory_mb=256), directory)
    try:
        link = await connect(machine.open_agent, BOOT_SECONDS)
        await link.reseed(fresh_identity("vm-image-test"))
        yield link
        await link.close()
    finally:
        await machine.destroy()


@pytest.mark.timeout(300)
async def test_what_was_asked_for_is_in_the_guest_and_nothing_to_log_into(guest: AgentLink) -> None:
    ended, out, err = await run_program(guest, ("python3", "-c", LOOK))
    assert ended.code == 0, err
    seen = json.loads(out)
    assert seen["python"] == [3, 11]
    assert seen["hello"] == "Hello, world!"
    assert seen["markdown"].startswith("/usr/local/lib/python3.11/dist-packages/")
    assert "4.3.0" in seen["script"], "a package's program runs by the guest's Python"
    assert seen["mounts"]["/"][0] == "overlay"
    assert "nosuid" in seen["mounts"]["/"][1]
    assert seen["mounts"]["/sys/fs/cgroup"][0] == "cgroup2"
    assert {kind for kind, _ in (seen["mounts"]["/dev/shm"], seen["mounts"]["/tmp"])} == {"tmpfs"}
    assert {"memory", "pids", "cpu"} <= set(seen["controllers"][0].split())
    assert seen["passwords"] == {}
    assert (seen["listening"], seen["sshd"]) == (1, False), "the first line is the table's head"
    assert seen["job"] == [1000, 1000, "", "/home/job", "/bin/bash"]
    assert seen["home"] == 0o700
    assert (seen["compiled"], seen["pyc"]) == (1, 1), "compiled, and not compared with its source"
    assert seen["cards"] == ["lo"]


def test_an_equal_image_is_not_built_again(image: GuestImage) -> None:
    told: list[BuildStep] = []
    again = ImageBuilder(ImageStore(CACHE / "images")).build(SPEC, told.append)
    assert (again.digest, told) == (image.digest, [])


def test_its_contents_are_on_record(image: GuestImage) -> None:
    manifest = ImageStore(CACHE / "images").manifest(image.digest)
    assert manifest is not None
    assert manifest.contents["python"] == ("markdown-it-py 4.3.0", "mdurl 0.1.2")
    assert any(line.startswith("hello 2.") for line in manifest.contents["debian"])
    assert any(line.startswith("linux-image-") for line in manifest.contents["boot"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (ImageSpec(name="x", packages=("no-such-package-9",)), "packages", "no-such-package-9"),
        (ImageSpec(name="x", requirements="markdown-it-py==0.0.0.1"), "requirements", "markdown-it-py==0.0.0.1"),
        (ImageSpec(name="x", requirements="a b c"), "requirements", "a b c"),
    ],
)
async def test_what_does_not_exist_is_named(tmp_path: Path, spec: ImageSpec, field: str, words: str) -> None:
    store = ImageStore(tmp_path / "images")
    build: Callable[[], GuestImage] = lambda: ImageBuilder(store).build(spec, lambda step: None)  # noqa: E731  for a thread
    with pytest.raises(InvalidRequest) as caught:
        await asyncio.to_thread(build)
    assert caught.value.field == field
    assert words in caught.value.message
    assert store.records() == ()
    assert not list(store.directory.glob(".building-*"))


async def test_without_a_network_it_is_told_at_once(tmp_path: Path) -> None:
    """A mirror at which nobody listens is no network to apt."""
    spec = ImageSpec(name="x", mirror="http://127.0.0.1:9/debian")
    store = ImageStore(tmp_path / "images")
    with pytest.raises(Unavailable, match="no connection to where the packages are"):
        await asyncio.to_thread(ImageBuilder(store).build, spec, lambda step: None)
    assert store.records() == ()


FULL = """
import sys
from pathlib import Path
from blixard.errors import Unavailable
from blixard.vm.image.builder import ImageBuilder
from blixard.vm.image.spec import ImageSpec
from blixard.vm.image.store import ImageStore

store, scratch = ImageStore(Path(sys.argv[1]) / "images"), Path(sys.argv[2])
try:
    ImageBuilder(store, scratch=scratch).build(ImageSpec(), lambda step: None)
except Unavailable as error:
    print(error.message)
print(store.records(), list(scratch.iterdir()))
"""


def test_a_disk_that_fills_up_in_the_middle_is_told_and_nothing_stays(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script = 'mount -t tmpfs -o size=64m none "$4" && exec "$2" -c "$3" "$1" "$4"'
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    words = [*namespace, "sh", "-c", script, "sh", str(tmp_path), sys.executable, FULL, str(scratch)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "no space left on the disk" in done.stdout
    assert done.stdout.splitlines()[-1] == "() []"
