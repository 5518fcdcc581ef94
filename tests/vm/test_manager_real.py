"""Manager, backend and command line with real virtual machines."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blixard.backends.contract import BackendSettings, Execution, Stream
from blixard.backends.microvm import MicroVmBackend
from blixard.config.settings import Settings
from blixard.domain.lease import AttemptRef
from blixard.domain.outcome import OutcomeKind
from blixard.domain.payload import CommandPayload
from blixard.domain.requirements import Isolation, JobRequirements, VmMode
from blixard.domain.spec import JobSpec
from blixard.domain.vm import VmState
from blixard.infrastructure import ProductionInfrastructureFactory
from blixard.vm.hypervisor.confinement import child_of
from blixard.vm.manager import VmManager

pytestmark = pytest.mark.timeout(300)
CACHE = Path.home() / ".cache/blixard/vm"
MIB = 1 << 20
DEADLINE = 120.0
HOLDER = """
import asyncio, json, sys
from blixard.config.settings import Settings
from blixard.infrastructure import ProductionInfrastructureFactory

async def main():
    settings = Settings.model_validate(json.loads(sys.argv[1]))
    manager = ProductionInfrastructureFactory(settings).create_vm_manager()
    await manager.start()
    leases = [await manager.acquire(manager.default_need()) for _ in range(2)]
    print(*(lease.id for lease in leases), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def settings(tmp_path: Path, **vm: object) -> Settings:
    """Images and templates are shared with other tests; running machines are not."""
    place = tmp_path / "vm"
    place.mkdir(exist_ok=True)
    for name in ("images", "templates"):
        (CACHE / name).mkdir(parents=True, exist_ok=True)
        if not (place / name).exists():
            (place / name).symlink_to(CACHE / name)
    return Settings.model_validate(
        {
            "storage": {"data_dir": str(tmp_path / "data")},
            "vm": {"directory": str(place), "default_memory": 256 * MIB, "pool": 0, **vm},
        }
    )


class Ears:
    def __init__(self) -> None:
        self.heard = bytearray()

    def started(self, at: int) -> None:
        """It does not matter here."""

    def output(self, at: int, stream: Stream, data: bytes) -> None:
        self.heard += data


@asynccontextmanager
async def running(tmp_path: Path, **vm: object) -> AsyncIterator[tuple[VmManager, MicroVmBackend]]:
    manager = ProductionInfrastructureFactory(settings(tmp_path, **vm)).create_vm_manager()
    backend = MicroVmBackend(BackendSettings(scratch=tmp_path, slots=4, memory_mb=160), manager)
    await manager.start()
    await backend.start()
    try:
        yield manager, backend
    finally:
        await backend.stop()
        await manager.shutdown()
    assert list((tmp_path / "vm/run").glob("*")) == []
    assert machines_of(tmp_path) == []


def machines_of(tmp_path: Path) -> list[int]:
    """Return the processes that have anything open below the runtime directory, or are in it by their command."""
    found = []
    for directory in Path("/proc").glob("[0-9]*/fd"):
        try:
            names = [str(link.readlink()) for link in directory.iterdir()]
        except OSError:
            continue
        if (
            any(name.startswith(str(tmp_path / "vm/run")) for name in names)
            and int(directory.parent.name) != os.getpid()
        ):
            found.append(int(directory.parent.name))
    return found


async def run_command(
    backend: MicroVmBackend, name: str, source: str, *, mode: VmMode, ears: Ears | None = None
) -> tuple[OutcomeKind, str]:
    isolation = Isolation.STANDARD if mode is VmMode.SERVICE else Isolation.MAXIMUM
    spec = JobSpec(
        name=name,
        payload=CommandPayload(argv=("sh", "-c", source)),
        requirements=JobRequirements(isolation=isolation, vm_mode=mode),
    )
    ears = ears or Ears()
    async with asyncio.timeout(DEADLINE):
        outcome = await backend.execute(Execution(ref=AttemptRef("default", name, 1), spec=spec), ears)
    return outcome.kind, ears.heard.decode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  processes and machines tell nobody when they come and go
            await asyncio.sleep(0.05)


async def test_fresh_machines_differ_and_a_service_machine_is_used_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, backend):
        look = "cat /proc/sys/kernel/random/uuid"
        fresh = [await run_command(backend, f"job_{n}", look, mode=VmMode.EPHEMERAL) for n in range(3)]
        assert {kind for kind, _ in fresh} == {OutcomeKind.COMPLETED}
        assert len({said for _, said in fresh}) == 3
        assert manager.list_vms() == []
        for number in range(2):
            kind, _ = await run_command(backend, f"service_{number}", "true", mode=VmMode.SERVICE)
            assert kind is OutcomeKind.COMPLETED
        (vm,) = manager.list_vms()
        assert (vm.state, vm.jobs, vm.mode) == (VmState.READY, 2, VmMode.SERVICE)
        assert (await manager.check_vm(vm.id)).value == "healthy"


async def test_a_machine_whose_qemu_is_killed_fails_its_attempt_with_the_cause(tmp_path: Path) -> None:
    async with running(tmp_path) as (manager, backend):
        ears, source = Ears(), "echo begun; sleep 600"
        job = asyncio.create_task(run_command(backend, "job_1", source, mode=VmMode.EPHEMERAL, ears=ears))
        await until(lambda: b"begun" in ears.heard)  # before that a lost machine costs a job nothing but time
        assert len(manager.list_vms(VmState.BUSY)) == 1
        before = machines_below(os.getpid())
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert before, "no fault was made"
        kind, _ = await job
        assert kind is OutcomeKind.LOST
        kind, said = await run_command(backend, "job_2", "echo again", mode=VmMode.EPHEMERAL)
        assert (kind, said) == (OutcomeKind.COMPLETED, "again\n")


def machines_below(pid: int) -> list[int]:
    """Return the QEMU of each bubblewrap that this process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    bubblewraps = [int(word) for word in text.split() if b"bwrap" in Path(f"/proc/{word}/cmdline").read_bytes()]
    return [machine for bubblewrap in bubblewraps if (machine := child_of(bubblewrap)) is not None]


async def test_a_killed_manager_leaves_nothing_for_long(tmp_path: Path) -> None:
    given = settings(tmp_path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, given.model_dump_json(exclude_none=True), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), DEADLINE)).decode()
    assert re.fullmatch(r"vm_\w+ vm_\w+\n", line)
    (owner,) = (tmp_path / "vm/run").iterdir()
    machines = machines_below(process.pid)
    assert len(machines) == 2
    process.kill()
    await process.wait()
    manager = ProductionInfrastructureFactory(given).create_vm_manager()
    await manager.start()
    try:
        assert not owner.exists()
        await until(lambda: not any(is_alive(pid) for pid in machines))
    finally:
        await manager.shutdown()
    assert list((tmp_path / "vm/run").glob("*")) == []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_from_the_command_line(tmp_path: Path) -> None:
    given = settings(tmp_path)
    environment = {
        **os.environ,
        "BLIXARD_STORAGE__DATA_DIR": str(given.storage.data_dir),
        "BLIXARD_VM__DIRECTORY": str(given.vm.directory),
        "BLIXARD_VM__DEFAULT_MEMORY": "256MiB",
    }
    blixard = str(Path(sys.executable).parent / "blixard")
    (tmp_path / "hello.py").write_text("import sys\nprint('hello', *sys.argv[1:])\nsys.exit(4)\n")

    async def call(*words: str, stdin: bytes = b"") -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            blixard, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tmp_path
        )
        out, _ = await asyncio.wait_for(process.communicate(stdin), DEADLINE)
        return process.returncode or 0, out.decode()

    assert await call("vms", "--json") == (0, "[]\n")
    code, said = await call("run", "--isolation", "maximum", "hello.py", "--", "you")
    assert (code, said) == (4, "hello you\n")
    run = asyncio.create_task(call("run", "--isolation", "maximum", "--", "sleep", "600"))

    async def busy_machines() -> list[dict[str, str]]:
        return [vm for vm in json.loads((await call("vms", "--json"))[1]) if vm["job_id"] and vm["state"] == "busy"]

    async with asyncio.timeout(DEADLINE):
        while not (busy := await busy_machines()):
            assert not run.done()
    vm_id, job_id = busy[0]["id"], busy[0]["job_id"]
    assert await call("vm", "exec", vm_id, "--", "sh", "-c", "cat; exit 7", stdin=b"words") == (7, "words")
    assert (await call("vm", "exec", job_id, "--", "sh", "-c", "kill -9 $$"))[0] == 137
    assert (await call("vm", "exec", "vm_none", "--", "true"))[0] == 2
    assert await call("vm", "pause", vm_id) == (0, f"{vm_id}\tpaused\n")
    assert (await call("vm", "exec", vm_id, "--", "true"))[0] == 2
    assert await call("vm", "resume", vm_id) == (0, f"{vm_id}\tresumed\n")
    code, copy = await call("vm", "fork", vm_id)
    assert code == 0
    assert "sleep" in (await call("vm", "exec", copy.strip(), "--", "ps", "aux"))[1]
    assert (await call("cancel", job_id))[0] == 0
    assert (await run)[0] == 130
    assert await call("vms", "--json") == (0, "[]\n")
    assert list((tmp_path / "vm/run").glob("*")) == []
