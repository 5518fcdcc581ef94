"""Time and memory of fresh virtual machines: ``python benches/vm_clone.py [CLONES] [SPIKE]``.

Prints p50 and p99 in ms of one clone after the other, from its start to: running, the agent's first answer, given an identity of its own, a
Python script finished on it (through the backend), and of its end. Then the private memory of 20 idle clones of a 256 MB guest.

SPIKE is the program that first measured this (``vm_snapshot_restore.py``): it runs before and after with the same kernel and root file
system, for comparison on this very machine under this very load.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.microvm import MicroVmBackend
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import ScriptPayload
from blixard.domain.requirements import Isolation, JobRequirements
from blixard.domain.spec import JobSpec
from blixard.vm.agent_link import AgentLink, connect, fresh_identity
from blixard.vm.hypervisor.contract import Machine, MachineShape, Template
from blixard.vm.hypervisor.qemu import QemuHypervisor
from blixard.vm.image.builder import ensure_default_image
from blixard.vm.image.cpio import Entry, write_archive
from blixard.vm.image.guest_image import GuestImage
from blixard.vm.image.store import ImageStore
from blixard.vm.lease import VmLease, VmNeed

CACHE = Path(os.environ.get("BLIXARD_CACHE", Path.home() / ".cache" / "blixard")) / "vm"
MEMORY_MB = 256
IDLE = 20
IDLE_SECONDS = 6.0
SCRIPT = "import math; print(math.factorial(20), open('/proc/uptime').read())\n"
SPIKE_KERNEL = "x/boot/vmlinuz-6.1.0-56-cloud-amd64"
SPIKE_MEMORY = Path("/dev/shm/t.ram")
"""Names that the spike has in itself; it leaves this file behind."""


class Deaf:
    def started(self, at: int) -> None:
        """Nobody listens."""

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        """Nobody listens."""


class Lease:
    def __init__(self, machine: Machine, link: AgentLink) -> None:
        self.id = machine.id
        self.machine = machine
        self.link = link
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class Cloner:
    """Implements ``VmLeaser``: a fresh clone for every lease. ``times`` holds what each step took since the clone was begun, in ms."""

    def __init__(self, hypervisor: QemuHypervisor, template: Template, directory: Path) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self._hypervisor = hypervisor
        self._template = template
        self._directory = directory
        self._numbers = itertools.count()

    async def acquire(self, need: VmNeed) -> VmLease:
        del need
        begun = time.perf_counter()
        name = f"vm-{next(self._numbers)}"
        (self._directory / name).mkdir()
        machine = await self._hypervisor.clone(name, self._template, self._directory / name)
        self._note("running", begun)
        link = await connect(machine.open_agent)
        self._note("first answer", begun)
        await link.reseed(fresh_identity(name))
        self._note("own identity", begun)
        return Lease(machine, link)

    async def release(self, lease: VmLease, *, broken: bool) -> None:
        del broken
        assert isinstance(lease, Lease)
        begun = time.perf_counter()
        await lease.link.close()
        await lease.machine.destroy()
        self._note("its end", begun)

    def _note(self, name: str, begun: float) -> None:
        self.times[name].append((time.perf_counter() - begun) * 1e3)


async def make_template(hypervisor: QemuHypervisor, image: GuestImage, directory: Path) -> Template:
    shape = MachineShape(image=image, memory_mb=MEMORY_MB)
    found = await asyncio.to_thread(hypervisor.find_template, shape, directory / "templates")
    if found is not None:
        return found
    (directory / "boot").mkdir()
    begun = time.perf_counter()
    machine = await hypervisor.boot("boot", shape, directory / "boot")
    await (await connect(machine.open_agent)).close()
    booted = time.perf_counter()
    template = await hypervisor.save(machine, hypervisor.template_path(shape, directory / "templates"))
    print(f"cold boot {booted - begun:.1f} s, saving {time.perf_counter() - booted:.2f} s")
    return template


def execution_of(bundle: Path, number: int) -> Execution:
    spec = JobSpec(
        name="bench",
        payload=ScriptPayload(path="main.py", bundle="code"),
        requirements=JobRequirements(isolation=Isolation.MAXIMUM),
    )
    return Execution(ref=AttemptRef("default", f"job-{number}", 1), spec=spec, blobs={"code": bundle})


async def measure_jobs(cloner: Cloner, directory: Path, clones: int) -> None:
    backend = MicroVmBackend(BackendSettings(scratch=directory, slots=1), cloner)
    bundle = directory / "bundle"
    bundle.mkdir()
    (bundle / "main.py").write_text(SCRIPT)
    await backend.start()
    try:
        for number in range(clones):
            begun = time.perf_counter()
            outcome = await backend.execute(execution_of(bundle, number), Deaf())
            assert outcome.kind is OutcomeKind.COMPLETED, outcome
            # What the end of the machine took is not the job's affair: the backend waits for it, its caller hears of the job before.
            cloner.times["script finished"].append((time.perf_counter() - begun) * 1e3 - cloner.times["its end"][-1])
    finally:
        await backend.stop()


async def measure_memory(cloner: Cloner) -> None:
    need = VmNeed(namespace="default", memory_mb=MEMORY_MB)
    begun = time.perf_counter()
    leases = await asyncio.gather(*(cloner.acquire(need) for _ in range(IDLE)))
    print(f"{IDLE} clones at once: {time.perf_counter() - begun:.2f} s")
    await asyncio.sleep(IDLE_SECONDS)
    print(f"private memory of an idle clone, mean of {IDLE}: {mean_memory(leases):.1f} MB")
    for lease in leases:
        await cloner.release(lease, broken=False)


def mean_memory(leases: list[VmLease]) -> float:
    return statistics.mean(lease.machine.private_memory() for lease in leases if isinstance(lease, Lease)) / (1 << 20)


def summarise(name: str, times: list[float]) -> None:
    times = sorted(times)
    last = times[min(len(times) - 1, int(len(times) * 0.99))]
    print(f"{name}: p50 {statistics.median(times):.0f} ms, p99 {last:.0f} ms of {len(times)}")


# The spike


@contextlib.contextmanager
def spike_place(image: GuestImage, spike: Path) -> Iterator[Path]:
    """Lay out what the spike looks for: this image's kernel and root, its own first process and agent."""
    with tempfile.TemporaryDirectory() as made:
        work = Path(made) / "work"
        (work / SPIKE_KERNEL).parent.mkdir(parents=True)
        (work / SPIKE_KERNEL).symlink_to(image.kernel)
        (work / "root.ext4").symlink_to(image.root)
        agent = (spike.parent / "guest_agent_zygote.py").read_text().replace("/dev/vport0p1", "/dev/vport1p1")
        entries = [Entry("init", SPIKE_INIT.encode(), 0o755), Entry("agent.py", agent.encode())]
        (work / "initrd.gz").write_bytes(gzip.compress(image.initrd.read_bytes() + write_archive(entries), 1))
        yield Path(made)


SPIKE_INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /proc /sys /dev /ro /rw /new
$B mount -t proc proc /proc; $B mount -t sysfs s /sys; $B mount -t devtmpfs d /dev
while read -r m; do $B insmod /modules/$m; done </modules/order
until [ -e /dev/vda ] && port=$($B ls /dev/vport* 2>/dev/null); do $B usleep 10000; done
[ "$port" = /dev/vport1p1 ] || $B ln -s "$port" /dev/vport1p1
$B mount -t ext4 -o ro /dev/vda /ro; $B mount -t tmpfs t /rw; $B mkdir /rw/u /rw/w
$B mount -t overlay -o lowerdir=/ro,upperdir=/rw/u,workdir=/rw/w o /new
$B cp /agent.py /new/agent.py
$B mount --move /proc /new/proc; $B mount --move /sys /new/sys; $B mount --move /dev /new/dev
exec $B switch_root /new /usr/bin/python3 -S -E /agent.py
"""


def measure_spike(place: Path, spike: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(spike), "q35"], cwd=place, capture_output=True, text=True, timeout=120, check=False
    )
    SPIKE_MEMORY.unlink(missing_ok=True)
    found = [float(words) * 1e3 for words in re.findall(r"^restore: .* total ([0-9.]+)", done.stdout, re.MULTILINE)]
    if not found:
        raise SystemExit(f"the spike failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    summarise("the spike, fresh clone to finished script", found)
    for name in place.joinpath("work").glob("*.[cq]*"):
        name.unlink()


async def main(clones: int, spike: Path | None) -> None:
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    image = await asyncio.to_thread(ensure_default_image, ImageStore(CACHE / "images"), lambda _: None)
    directory = Path(tempfile.mkdtemp(prefix="bench-vm-"))
    hypervisor = QemuHypervisor(CACHE)
    print(msgspec.json.encode(hypervisor.info()).decode())
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        place = stack.enter_context(spike_place(image, spike)) if spike else None
        if place and spike:
            measure_spike(place, spike)
        cloner = Cloner(hypervisor, await make_template(hypervisor, image, directory), directory)
        await measure_jobs(cloner, directory, clones)
        for name in ("running", "first answer", "own identity", "script finished", "its end"):
            summarise(name, cloner.times[name])
        await measure_memory(cloner)
        if place and spike:
            measure_spike(place, spike)
    hypervisor.close()
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main_spike = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, main_spike))
