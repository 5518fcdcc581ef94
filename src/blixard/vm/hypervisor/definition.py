"""The machine that QEMU shows its guest, as a command line. Whatever changes here needs a new ``VERSION``: templates depend on it."""

from __future__ import annotations

import msgspec

from blixard.vm.hypervisor.contract import Accelerator, MachineShape

VERSION = 2
AGENT_PORT = "agent"
"""The virtio-serial port's name in the guest: /dev/virtio-ports/agent where udev runs, /dev/vport*p1 everywhere."""
TRANSLATION_CACHE_MB = 64
"""A bound on TCG's translated code. Only what was translated takes memory: 2 MB in an idle clone, 14 MB after a Python job. With 8 MB
the cache overflows within one such job, which then takes twice the processor time."""
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 tsc=reliable"
"""``panic=-1``: a guest that panics ends its machine at once."""
TCG_KERNEL_ARGUMENTS = " mitigations=off"
"""Translated code does not speculate as the guest's kernel fears, and its defences cost a tenth of a short job."""
TCG_CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand"
"""x86-64-v2, which Python packages are compiled for. ``max`` has more, and the C library's wider routines translate slower."""
SYSTEM_CALLS = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Attachments(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors that QEMU inherits; it opens no file of ours by name.

    ``kernel`` and ``initrd`` only for a cold boot; without them the machine waits for a saved state.
    """

    memory: int
    root: int
    agent: int
    monitor: int
    kernel: int | None = None
    initrd: int | None = None


def arguments_of(
    shape: MachineShape, accelerator: Accelerator, attached: Attachments, *, machine_id: str, shared: bool
) -> list[str]:
    """Return QEMU's arguments. ``shared``: what the guest writes goes into the memory file, else it stays private to this machine.

    Device order is the guest's hardware addresses, hence the same for a template and its clones.
    """
    words = [*_machine(shape, accelerator), *_memory(shape, attached.memory, shared=shared), *_devices(attached)]
    words += _network(shape)
    words += _boot(accelerator, attached)
    return [*words, "-sandbox", SYSTEM_CALLS, "-name", f"blixard-{machine_id}"]


def _machine(shape: MachineShape, accelerator: Accelerator) -> list[str]:
    tcg = accelerator is Accelerator.TCG
    return [
        "-machine",
        "q35,usb=off,sata=off,smbus=off,vmport=off,i8042=off,hpet=off,graphics=off,memory-backend=ram",
        *("-accel", f"tcg,tb-size={TRANSLATION_CACHE_MB}" if tcg else "kvm"),
        *("-cpu", TCG_CPU if tcg else "host"),
        *("-smp", str(shape.vcpus)),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-global", "migration.store-global-state=off"),  # so a clone runs as soon as it is loaded
    ]


def _memory(shape: MachineShape, memory: int, *, shared: bool) -> list[str]:
    backend = f"memory-backend-file,id=ram,size={shape.memory_mb}M,mem-path=/proc/self/fd/{memory}"
    return ["-m", f"{shape.memory_mb}M", "-object", f"{backend},share={'on' if shared else 'off'}"]


def _devices(attached: Attachments) -> list[str]:
    return [
        *("-chardev", f"socket,id=agent,fd={attached.agent}"),
        *("-device", "virtio-serial-pci,max_ports=2"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT},nr=1"),
        *("-add-fd", f"fd={attached.root},set=1"),
        "-blockdev",
        "driver=raw,node-name=root,read-only=on,file.driver=file,file.filename=/dev/fdset/1,file.locking=off",
        *("-device", "virtio-blk-pci,drive=root"),
        *("-object", "rng-builtin,id=random", "-device", "virtio-rng-pci,rng=random"),
        *("-chardev", f"socket,id=monitor,fd={attached.monitor}", "-mon", "chardev=monitor,mode=control"),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
    ]


def _network(shape: MachineShape) -> list[str]:
    if not shape.network:
        return ["-nic", "none"]
    return ["-netdev", "user,id=network", "-device", "virtio-net-pci,netdev=network,romfile="]


def _boot(accelerator: Accelerator, attached: Attachments) -> list[str]:
    if attached.kernel is None or attached.initrd is None:
        return ["-incoming", "defer"]
    words = KERNEL_ARGUMENTS + (TCG_KERNEL_ARGUMENTS if accelerator is Accelerator.TCG else "")
    return [
        *("-kernel", f"/proc/self/fd/{attached.kernel}", "-initrd", f"/proc/self/fd/{attached.initrd}"),
        *("-append", words),
    ]
