"""Whether KVM works here: tried by booting a kernel under it with a deadline, and remembered.

A /dev/kvm that exists and can be opened proves nothing: there are hosts, nested ones above all, where firmware runs under KVM and Linux
hangs for ever. So a real kernel is booted, without a root file system: it has come up when it complains about that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import stat
import subprocess
import uuid
from pathlib import Path

import msgspec

from blixard.vm.hypervisor.confinement import KVM_DEVICE, Confinement, communicate
from blixard.vm.hypervisor.contract import Accelerator
from blixard.vm.hypervisor.guest_memory import Descriptors, create_memory, write_all

PROBE_SECONDS = 20.0
"""Where KVM works, the kernel is through in one or two seconds, also nested and loaded."""
PROBE_MEMORY_MB = 256
ANSWER = "kvm.json"
MAX_ANSWER_BYTES = 64 * 1024
_MAX_CONSOLE_BYTES = 1024 * 1024
_CAME_UP = b"Kernel panic - not syncing: VFS: Unable to mount root fs"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``host``: what the answer holds for. ``reason``: why KVM does not work; empty when it does."""

    host: dict[str, str]
    works: bool
    reason: str = ""


def describe_host(qemu_version: str, device: str = KVM_DEVICE) -> dict[str, str]:
    """Return what the working of KVM depends on. Raises ``OSError`` when there is no such device."""
    found = os.stat(device)
    return {
        "kernel": platform.release(),
        "processor": _processor(),
        "qemu": qemu_version,
        "device": f"{found.st_dev}:{found.st_ino}:{found.st_rdev}",
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def recall(directory: Path, host: dict[str, str]) -> Answer | None:
    """Return what was found out for this very host; None if nothing was, or it cannot be read."""
    try:
        with (directory / ANSWER).open("rb") as file:
            answer = msgspec.json.decode(file.read(MAX_ANSWER_BYTES), type=Answer)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return answer if answer.host == host else None


def remember(directory: Path, answer: Answer) -> None:
    """A directory that cannot be written costs another probe next time, no more."""
    beside = directory / f".{ANSWER}.{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(msgspec.json.encode(answer))
        beside.replace(directory / ANSWER)


def refuse_device(device: str = KVM_DEVICE) -> str | None:
    """Return why KVM is not even worth a try; None if it is."""
    try:
        mode = os.stat(device).st_mode
    except OSError:
        return f"there is no {device}"
    if not stat.S_ISCHR(mode):
        return f"{device} is no device"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} cannot be opened; add this user to the group that owns it"
    return None


def try_kernel(
    confinement: Confinement, kernel: Path, accelerator: Accelerator = Accelerator.KVM, seconds: float = PROBE_SECONDS
) -> str | None:
    """Boot the kernel and return None if it came up, else what happened instead. Blocking, for ``seconds`` at most."""
    with Descriptors() as owned:
        try:
            image = owned.own(load_file(kernel))
            process = confinement.start(
                _arguments(accelerator, image),
                keep=(image,),
                space_mb=PROBE_MEMORY_MB,
                kvm=accelerator is Accelerator.KVM,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            return f"it could not be tried: {error}"
        try:
            console, _ = communicate(process, seconds)
        except subprocess.TimeoutExpired:
            return f"a guest's kernel did not come up within {seconds:g} s"
    if _CAME_UP in console[-_MAX_CONSOLE_BYTES:]:
        return None
    last = console.decode(errors="replace").strip().splitlines()[-1:]
    return f"a guest's kernel did not come up: {''.join(last)[:300] or 'it printed nothing'}"


def load_file(path: Path) -> int:
    """Return an anonymous copy of a file: QEMU's user may read it, wherever the file lies. Raises ``OSError``."""
    data = path.read_bytes()
    copy = create_memory(path.name, len(data))
    write_all(copy, 0, data)
    return copy


def _arguments(accelerator: Accelerator, kernel: int) -> list[str]:
    return [
        *("-machine", "q35,usb=off,sata=off", "-accel", accelerator.value, "-m", f"{PROBE_MEMORY_MB}M"),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-cpu", "host" if accelerator is Accelerator.KVM else "qemu64"),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-kernel", f"/proc/self/fd/{kernel}", "-append", "console=ttyS0 quiet panic=-1 tsc=reliable"),
    ]
