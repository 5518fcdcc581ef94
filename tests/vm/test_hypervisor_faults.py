"""What can go wrong with QEMU, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import uvloop

from blixard.errors import MachineLost, NotFound, NotSupportedHere, StoreFull
from blixard.storage.locks import is_free
from blixard.vm.hypervisor import accelerator as probing
from blixard.vm.hypervisor.confinement import NOBODY, Confinement
from blixard.vm.hypervisor.contract import Accelerator, Machine
from blixard.vm.hypervisor.guest_memory import CHUNK
from blixard.vm.hypervisor.machine import QemuMachine
from blixard.vm.hypervisor.orphans import LOCK
from blixard.vm.hypervisor.qemu import QemuHypervisor
from blixard.vm.hypervisor.saved import MEMORY, STATE, write_saved
from tests.conformance.hypervisor.rig import MEMORY_MB, Machines, QemuRig
from tests.conformance.hypervisor.shell_guest import SECONDS, Shell, ready, run

pytestmark = pytest.mark.timeout(300)
CYCLES = 60


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> QemuRig:
    return QemuRig(tmp_path_factory.mktemp("hypervisor"))


@pytest.fixture
async def machines(rig: QemuRig, tmp_path: Path) -> AsyncIterator[Machines]:
    made = Machines(rig.hypervisor(tmp_path), rig, tmp_path)
    yield made
    await made.end()


def pid_of(machine: Machine) -> int:
    assert isinstance(machine, QemuMachine)
    assert machine._qemu is not None
    return machine._qemu


def qemu_of(machines: Machines) -> QemuHypervisor:
    assert isinstance(machines.hypervisor, QemuHypervisor)
    return machines.hypervisor


async def ended(machine: Machine) -> str:
    async with asyncio.timeout(SECONDS):
        return await machine.wait()


# Ends that nobody asked for


async def test_a_killed_machine_is_lost_with_its_cause(machines: Machines) -> None:
    machine = await machines.clone()
    async with Shell(machine) as shell:
        await shell.send("sleep 1000")
        os.kill(pid_of(machine), signal.SIGKILL)
        with pytest.raises((EOFError, ConnectionError)):
            await shell.read_line()
    assert (await ended(machine)).startswith("killed by signal 9")
    with pytest.raises(MachineLost, match="killed by signal 9"):
        await machine.pause()


async def test_what_is_waited_for_when_the_machine_dies_is_lost_with_the_cause(machines: Machines) -> None:
    machine = await machines.clone()
    os.kill(pid_of(machine), signal.SIGSTOP)
    waiting = asyncio.ensure_future(machine.pause())
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    os.kill(pid_of(machine), signal.SIGKILL)
    with pytest.raises(MachineLost, match="killed by signal 9"):
        await waiting


async def test_a_panic_of_the_guests_kernel_is_the_cause(machines: Machines) -> None:
    machine = await machines.clone()
    async with Shell(machine) as shell:
        await shell.send("echo c >/proc/sysrq-trigger")
    assert await ended(machine) == "kernel panic: sysrq triggered crash"
    assert "Kernel panic" in machine.console


async def test_a_stopped_machine_can_be_destroyed(machines: Machines) -> None:
    machine = await machines.clone()
    os.kill(pid_of(machine), signal.SIGSTOP)
    async with asyncio.timeout(SECONDS):
        await machine.destroy()
    assert await machine.wait() == "destroyed"


async def test_a_guest_that_floods_its_console_is_heard_in_part(machines: Machines) -> None:
    machine = await machines.clone()
    await run(machine, "yes flood | head -c 200000 >/dev/ttyS0; echo the end >/dev/ttyS0")
    async with asyncio.timeout(SECONDS):
        while "the end" not in machine.console:  # noqa: ASYNC110  no event tells what a guest has printed
            await asyncio.sleep(0.05)
    assert len(machine.console) < 40_000


PROGRAM = """
import asyncio, sys
from pathlib import Path
import msgspec
from blixard.vm.hypervisor.contract import MachineShape, Template
from blixard.vm.hypervisor.qemu import QemuHypervisor
async def main():
    here, place = Path(sys.argv[1]), Path(sys.argv[2])
    shape = msgspec.json.decode(sys.argv[3], type=MachineShape, dec_hook=lambda kind, text: kind(text))
    hypervisor = QemuHypervisor(here)
    template = hypervisor.find_template(shape, here / "templates")
    machine = await hypervisor.clone("vm-1", template, place)
    print(machine._qemu, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_machines_end_with_their_manager(machines: Machines, rig: QemuRig, tmp_path: Path) -> None:
    await machines.template()
    (tmp_path / "vm-1").mkdir()
    shape = msgspec.json.encode(rig.shape, enc_hook=str)
    words = [sys.executable, "-c", PROGRAM, str(rig.templates.parent), str(tmp_path / "vm-1"), shape.decode()]
    await asyncio.to_thread(kill_manager, words, tmp_path / "vm-1" / LOCK)
    assert machines.hypervisor.end_orphans(tmp_path) == 0


def kill_manager(words: list[str], lock: Path) -> None:
    with subprocess.Popen(words, stdout=subprocess.PIPE) as manager:
        assert manager.stdout is not None
        handle = os.pidfd_open(int(manager.stdout.readline()))
        assert not is_free(lock)
        manager.kill()
        assert select.select([handle], [], [], SECONDS)[0], "QEMU lives on without its manager"
        os.close(handle)
    assert is_free(lock)


async def test_sixty_machines_cloned_and_killed_leave_nothing(machines: Machines) -> None:
    template = await machines.template()
    await (await machines.clone(template)).destroy()
    descriptors, processes = count_descriptors(), processes_below(os.getpid())
    killed = 0
    for number in range(CYCLES):
        machine = await machines.clone(template)
        if number % 3 == 0:
            assert await run(machine, "echo $origin") == "template"
        if number % 2:
            os.kill(pid_of(machine), signal.SIGKILL)
            assert (await ended(machine)).startswith("killed by signal 9")
            killed += 1
        await machine.destroy()
    assert killed == CYCLES // 2
    assert processes_below(os.getpid()) == processes
    assert count_descriptors() == descriptors
    assert list(machines.directory.iterdir()) == []


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def processes_below(pid: int) -> int:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return 0
    return len(children) + sum(processes_below(int(child)) for child in children)


async def test_a_start_that_is_given_up_leaves_nothing(machines: Machines) -> None:
    template = await machines.template()
    processes = processes_below(os.getpid())
    given_up = 0
    for share in range(1, 9):
        name, place = machines.place()
        start = asyncio.ensure_future(machines.hypervisor.clone(name, template, place))
        await asyncio.wait({start}, timeout=share * 0.02)
        start.cancel()
        try:
            await (await start).destroy()
        except asyncio.CancelledError:
            given_up += 1
        assert not place.exists()
    assert given_up, "none was still starting: the test must give up sooner"
    assert processes_below(os.getpid()) == processes


# Templates


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "memory": lambda path: flip(path / MEMORY, 20 * CHUNK),
    "state": lambda path: (path / STATE).write_bytes(b"short"),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_corrupt_template_is_refused_and_removed(
    damage: str, machines: Machines, rig: QemuRig, tmp_path: Path
) -> None:
    whole = await machines.template()
    shutil.copytree(rig.templates, tmp_path / "templates")
    template = msgspec.structs.replace(whole, directory=tmp_path / "templates" / whole.key)
    other = rig.hypervisor(tmp_path)
    DAMAGES[damage](template.directory)
    name, place = machines.place()
    with pytest.raises(NotFound, match="corrupt"):
        await other.clone(name, template, place)
    assert not template.directory.exists()
    assert other.find_template(rig.shape, tmp_path / "templates") is None


async def test_a_state_that_qemu_refuses_is_told_with_its_words(machines: Machines, tmp_path: Path) -> None:
    whole = await machines.template()
    attached = qemu_of(machines)._opened.attach(whole.directory)
    assert attached is not None
    write_saved(tmp_path / "wrong", attached[0], b"no state of any machine")
    for descriptor in attached:
        os.close(descriptor)
    name, place = machines.place()
    with pytest.raises(MachineLost, match=r"QEMU failed: .*migration"):
        await machines.hypervisor.clone(name, msgspec.structs.replace(whole, directory=tmp_path / "wrong"), place)
    assert not place.exists()


FULL = """
import asyncio, sys
from pathlib import Path
import msgspec
from blixard.errors import StoreFull
from blixard.vm.hypervisor.contract import MachineShape
from blixard.vm.hypervisor.qemu import QemuHypervisor
async def main():
    here, place, small = map(Path, sys.argv[1:4])
    shape = msgspec.json.decode(sys.argv[4], type=MachineShape, dec_hook=lambda kind, text: kind(text))
    machine = await QemuHypervisor(here).boot("vm-1", shape, place)
    try:
        await QemuHypervisor(here).save(machine, small / "template")
    except StoreFull as error:
        print(error, list(small.iterdir()), place.exists(), await machine.wait())
asyncio.run(main())
"""


async def test_a_disk_that_is_full_fails_the_save_and_leaves_nothing(rig: QemuRig, tmp_path: Path) -> None:
    small, place = tmp_path / "small", tmp_path / "vm-1"
    small.mkdir()
    place.mkdir()
    script = 'mount -t tmpfs -o size=100k none "$1" && exec "$2" -c "$3" "$4" "$5" "$1" "$6"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", str(small), sys.executable, FULL]
    words += [str(rig.templates.parent), str(place), msgspec.json.encode(rig.shape, enc_hook=str).decode()]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.startswith("the disk is full")
    assert done.stdout.endswith(" [] False destroyed\n")
    assert StoreFull.code == "store_full"


# Hosts that lack something


def test_a_host_without_qemu_says_what_to_install(rig: QemuRig, tmp_path: Path) -> None:
    hypervisor = QemuHypervisor(tmp_path, qemu="qemu-of-nowhere")
    info = hypervisor.info()
    assert info.accelerator is None
    assert "there is no qemu-of-nowhere" in info.missing
    assert "apt install qemu-system-x86" in info.missing
    (tmp_path / "vm").mkdir()
    with pytest.raises(NotSupportedHere, match="there is no qemu-of-nowhere"):
        asyncio.run(hypervisor.boot("vm-1", rig.shape, tmp_path / "vm"))


@pytest.mark.parametrize("name", ["vmlinuz", "initrd", "root.ext4"])
async def test_an_image_that_cannot_be_read_is_told(
    name: str, machines: Machines, rig: QemuRig, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.mkdir()
    for path in rig.shape.image.directory.iterdir():
        if path.name != name:
            (image / path.name).symlink_to(path.resolve())
    broken = msgspec.structs.replace(rig.shape.image, directory=image)
    (tmp_path / "vm").mkdir()
    with pytest.raises(NotSupportedHere, match=f"cannot be read: .*{name}"):
        await machines.hypervisor.boot("vm-1", msgspec.structs.replace(rig.shape, image=broken), tmp_path / "vm")


def test_a_kernel_that_hangs_is_given_up_at_the_deadline(rig: QemuRig) -> None:
    before = processes_below(os.getpid())
    answer = probing.try_kernel(Confinement.find(), rig.shape.image.kernel, Accelerator.TCG, seconds=0.2)
    assert answer == "a guest's kernel did not come up within 0.2 s"
    assert processes_below(os.getpid()) == before


def test_a_kernel_that_comes_up_is_believed_and_a_file_that_is_none_is_not(rig: QemuRig, tmp_path: Path) -> None:
    confinement = Confinement.find()
    assert probing.try_kernel(confinement, rig.shape.image.kernel, Accelerator.TCG, seconds=SECONDS) is None
    (tmp_path / "vmlinuz").write_bytes(b"no kernel" * 1000)
    answer = probing.try_kernel(confinement, tmp_path / "vmlinuz", Accelerator.TCG, seconds=SECONDS)
    assert answer is not None
    assert probing.try_kernel(confinement, tmp_path / "none", seconds=SECONDS) is not None


def test_what_was_found_out_about_kvm_is_remembered(rig: QemuRig, tmp_path: Path) -> None:
    """Whatever it is on this host."""
    first = QemuHypervisor(rig.templates.parent).info()
    assert first.accelerator is not None
    if probing.refuse_device() is None:
        (tmp_path / "images" / "x").mkdir(parents=True)
        (tmp_path / "images" / "x" / "vmlinuz").symlink_to(rig.shape.image.kernel.resolve())
        probed = QemuHypervisor(tmp_path).info()
        answer = probing.recall(tmp_path, probing.describe_host(probed.version))
        assert answer is not None
        assert answer.works is (probed.accelerator is Accelerator.KVM)
        contradiction = msgspec.structs.replace(answer, works=not answer.works, reason="as remembered")
        probing.remember(tmp_path, contradiction)
        assert (QemuHypervisor(tmp_path).info().accelerator is Accelerator.KVM) is contradiction.works
    else:
        assert any("KVM is not used" in note for note in first.notes)


# Confinement and memory


async def test_qemu_is_an_ordinary_user_that_sees_and_may_do_nothing(machines: Machines) -> None:
    check_confinement(pid_of(await machines.clone()))


def namespace(pid: int, kind: str) -> Path:
    return Path(f"/proc/{pid}/ns/{kind}").readlink()


def check_confinement(pid: int) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    if os.geteuid() == 0:
        assert set(status["Uid"].split()) == {str(NOBODY)}
        assert set(status["Gid"].split()) == {str(NOBODY)}
        assert status["Groups"].strip() == ""
    for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for space in ("net", "mnt", "pid", "ipc", "uts", "user"):
        assert namespace(pid, space) != namespace(os.getpid(), space), space
    root = Path(f"/proc/{pid}/root")
    assert {path.name for path in root.iterdir()} <= {"usr", "lib", "lib64", "lib32", "etc", "proc"}
    assert {path.name for path in (root / "etc").iterdir()} <= {"ld.so.cache"}
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    assert all("ro" in words[3].split(",") for words in mounts if words[1] != "/proc")
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits
    assert "Max file size             0                    0" in limits


async def test_without_a_network_the_guest_has_no_card(machines: Machines) -> None:
    assert await run(await machines.clone(), "ls /sys/class/net") == "lo"


async def test_a_granted_network_gives_the_guest_a_card(machines: Machines, rig: QemuRig) -> None:
    name, place = machines.place()
    machine = await machines.hypervisor.boot(name, msgspec.structs.replace(rig.shape, network=True), place)
    try:
        await ready(machine)
        assert "eth0" in (await run(machine, "ls /sys/class/net")).split()
        pid = pid_of(machine)
        assert namespace(pid, "net") == namespace(os.getpid(), "net")
    finally:
        await machine.destroy()


async def test_clones_that_share_no_memory_have_files_of_their_own(
    machines: Machines, rig: QemuRig, tmp_path: Path
) -> None:
    template = await machines.template()
    (tmp_path / "alone").mkdir()
    alone = Machines(rig.hypervisor(tmp_path, share_memory=False), rig, tmp_path / "alone")
    try:
        clones = [await alone.clone(template) for _ in range(2)]
        assert [await run(clone, "echo $origin") for clone in clones] == ["template", "template"]
        assert len({memory_file(clone) for clone in clones}) == 2
        again = await alone.hypervisor.save(clones[0], tmp_path / "templates" / "again")
        assert await run(await alone.clone(again), "echo $origin") == "template"
    finally:
        await alone.end()
    shared = [await machines.clone(template) for _ in range(2)]
    assert len({memory_file(clone) for clone in shared}) == 1


def memory_file(machine: Machine) -> str:
    """Return device and inode of the file that holds the guest's memory."""
    size = MEMORY_MB << 20
    for line in Path(f"/proc/{pid_of(machine)}/maps").read_text().splitlines():
        words = line.split()
        start, end = (int(word, 16) for word in words[0].split("-"))
        if end - start == size and "memfd" in line:
            return f"{words[3]} {words[4]}"
    raise AssertionError("its memory is not mapped from a file")


ORDINARY = """
import asyncio, os, sys
from pathlib import Path
import msgspec
import qemu.qmp
from blixard.vm.hypervisor.contract import MachineShape
from blixard.vm.hypervisor.qemu import QemuHypervisor
from tests.conformance.hypervisor.shell_guest import ready, run
os.setgroups([])
os.setresgid(1234, 1234, 1234)
os.setresuid(1234, 1234, 1234)
async def main():
    here = Path(sys.argv[1])
    shape = msgspec.json.decode(sys.argv[2], type=MachineShape, dec_hook=lambda kind, text: kind(text))
    hypervisor = QemuHypervisor(here)
    (here / "a").mkdir(); (here / "b").mkdir()
    machine = await hypervisor.boot("vm-a", shape, here / "a")
    await ready(machine)
    template = await hypervisor.save(machine, here / "template")
    clone = await hypervisor.clone("vm-b", template, here / "b")
    print(await run(clone, "echo from the guest"), clone.private_memory() > 0)
    await clone.destroy()
asyncio.run(main())
"""


def test_an_ordinary_user_has_machines_too(rig: QemuRig) -> None:
    with tempfile.TemporaryDirectory() as place:
        for path in rig.shape.image.directory.iterdir():
            shutil.copy(path, place)
        for path in (Path(place), *Path(place).iterdir()):
            os.chown(path, 1234, 1234)
        shape = msgspec.structs.replace(
            rig.shape, image=msgspec.structs.replace(rig.shape.image, directory=Path(place))
        )
        words = [sys.executable, "-c", ORDINARY, place, msgspec.json.encode(shape, enc_hook=str).decode()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.stdout == "from the guest True\n", done.stderr


def test_machines_run_on_uvloop_too(rig: QemuRig, tmp_path: Path) -> None:
    async def live() -> str:
        machines = Machines(rig.hypervisor(tmp_path), rig, tmp_path)
        try:
            clone = await machines.clone()
            said = await run(clone, "echo $origin")
            await machines.hypervisor.snapshot(clone, tmp_path / "templates" / "fork")
            return said
        finally:
            await machines.end()

    assert uvloop.run(live()) == "template"
    assert list(tmp_path.glob("vm-*")) == []
