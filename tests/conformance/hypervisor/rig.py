"""What the hypervisor suite needs of each hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from blixard.testing.fake_hypervisor import FakeHypervisor, Guest
from blixard.vm.hypervisor.contract import Hypervisor, Machine, MachineShape, Template
from blixard.vm.hypervisor.qemu import QemuHypervisor
from blixard.vm.image.guest_image import GuestImage
from tests.conformance.hypervisor.shell_guest import make_image, ready, run

MEMORY_MB = 128


class Rig(Protocol):
    shape: MachineShape
    templates: Path

    def hypervisor(self, directory: Path, *, available: int = 1 << 20) -> Hypervisor: ...


class QemuRig:
    """One template for the whole session, made by the first test that asks for a clone."""

    def __init__(self, directory: Path) -> None:
        image = directory / "image"
        image.mkdir(parents=True)
        self.shape = MachineShape(image=make_image(image), memory_mb=MEMORY_MB)
        self.templates = directory / "templates"
        self._directory = directory

    def hypervisor(self, directory: Path, *, available: int = 1 << 20, share_memory: bool = True) -> QemuHypervisor:
        """What is found out about KVM is kept for the whole session."""
        return QemuHypervisor(self._directory, available=lambda: available, share_memory=share_memory)


class FakeRig:
    def __init__(self, directory: Path) -> None:
        image = GuestImage(name="shell", digest="0" * 64, directory=directory)
        self.shape = MachineShape(image=image, memory_mb=MEMORY_MB)
        self.templates = directory / "templates"
        self._saved = FakeHypervisor(tiny_shell)

    def hypervisor(self, directory: Path, *, available: int = 1 << 20) -> FakeHypervisor:
        self._saved.available = available
        return self._saved


async def tiny_shell(guest: Guest) -> None:
    """The few words of a shell that the suite speaks."""
    if guest.booted:
        await guest.write(b"ready\n")
    while line := (await guest.reader.readline()).decode().strip():
        if line == "poweroff -f":
            guest.shut_down()
            return
        said = _run(guest.memory, line)
        await guest.write(f"{said}end 0\n".encode())


def _run(memory: dict[str, object], line: str) -> str:
    if line.startswith("echo $"):
        return f"{memory.get(line.removeprefix('echo $'), '')}\n"
    name, _, value = line.partition("=")
    memory[name] = value
    return ""


class Machines:
    """Makes machines for one test and ends what the test leaves."""

    def __init__(self, hypervisor: Hypervisor, rig: Rig, directory: Path) -> None:
        self.hypervisor = hypervisor
        self.rig = rig
        self.directory = directory
        self._made: list[Machine] = []
        self._places = 0

    def place(self) -> tuple[str, Path]:
        self._places += 1
        name = f"vm-{self._places}"
        (self.directory / name).mkdir()
        return name, self.directory / name

    async def boot(self) -> Machine:
        name, place = self.place()
        machine = await self.hypervisor.boot(name, self.rig.shape, place)
        self._made.append(machine)
        await ready(machine)
        return machine

    async def template(self) -> Template:
        """Return the session's template, in which the guest remembers ``origin=template``."""
        found = self.hypervisor.find_template(self.rig.shape, self.rig.templates)
        if found is not None:
            return found
        machine = await self.boot()
        await run(machine, "origin=template")
        return await self.hypervisor.save(machine, self.hypervisor.template_path(self.rig.shape, self.rig.templates))

    async def clone(self, template: Template | None = None) -> Machine:
        chosen = template or await self.template()
        name, place = self.place()
        machine = await self.hypervisor.clone(name, chosen, place)
        self._made.append(machine)
        return machine

    async def end(self) -> None:
        for machine in self._made:
            await machine.destroy()
        self.hypervisor.close()
