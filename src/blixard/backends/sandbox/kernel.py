"""The system calls that Python does not have, through the C library that is loaded anyway. Each raises ``OSError`` naming the call.

Numbers above 423 are the same on every machine; mount_setattr (442) makes Linux 5.12 the oldest kernel that works here.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 1, 2, 4, 0x100000
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 4, 0x40
RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 4, 0x10

_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442
_BY_MACHINE = {  # pivot_root, keyctl, capset, seccomp
    "x86_64": (155, 250, 126, 317),
    "aarch64": (41, 219, 91, 277),
}
_PIVOT_ROOT, _KEYCTL, _CAPSET, _SECCOMP = _BY_MACHINE.get(os.uname().machine, (-1, -1, -1, -1))

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 4, 24, 28
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SECUREBITS_ALL_LOCKED = 0b11101111  # noroot, no_setuid_fixup, keep_caps off but locked, no_cap_ambient_raise
LAST_CAPABILITY_TRIED = 63
CAP_SYS_ADMIN = 21
CAP_SETUID = 7

_KEYCTL_JOIN_SESSION_KEYRING = 1
_SECCOMP_SET_MODE_FILTER = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def _fail(call: str, *what: object) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}", *what)


def _syscall(name: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise _fail(name)
    return result


def unshare(flags: int) -> None:
    if _libc.unshare(ctypes.c_int(flags)) != 0:
        raise _fail("unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    if _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]) != 0:
        raise _fail("mount", target)


def unmount(target: str) -> None:
    """Take a mount and all below it out of sight at once."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH) != 0:
        raise _fail("umount", target)


def pivot_root(new: str, old: str) -> None:
    _syscall("pivot_root", _PIVOT_ROOT, os.fsencode(new), os.fsencode(old))


def open_place(directory: int, path: str, resolve: int, flags: int = os.O_PATH) -> int:
    """Open ``path`` below ``directory`` with openat2's rules of resolution; return a descriptor."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    number = ctypes.c_int(directory)
    return _syscall("openat2", _OPENAT2, number, os.fsencode(path), how, ctypes.c_size_t(len(how)))


def clone_mount(place: int) -> int:
    """Return a descriptor of a copy of what is mounted at the opened place, with all below it, attached nowhere."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE
    return _syscall("open_tree", _OPEN_TREE, ctypes.c_int(place), b"", ctypes.c_uint(flags))


def change_mount(tree: int, attributes: int, *, user_namespace: int = 0, recursive: bool = True) -> None:
    attr = struct.pack("=QQQQ", attributes, 0, 0, user_namespace)
    flags = ctypes.c_uint(AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0))
    _syscall("mount_setattr", _MOUNT_SETATTR, ctypes.c_int(tree), b"", flags, attr, ctypes.c_size_t(len(attr)))


def attach_mount(tree: int, place: int) -> None:
    flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
    _syscall("move_mount", _MOVE_MOUNT, ctypes.c_int(tree), b"", ctypes.c_int(place), b"", flags)


def prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) != 0:
        raise _fail("prctl")


def die_with_parent(signal_number: int) -> None:
    """Get this signal when the parent ends. A change of user forgets it, so ask last."""
    prctl(PR_SET_PDEATHSIG, signal_number)


def drop_capabilities() -> None:
    """Give up every capability for good, also those that a program run later could gain."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    prctl(PR_SET_SECUREBITS, SECUREBITS_ALL_LOCKED)
    for capability in range(LAST_CAPABILITY_TRIED + 1):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the kernel knows no capability of this number, nor any higher
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _syscall("capset", _CAPSET, header, bytes(24))


def has_capability(capability: int) -> bool:
    """Say whether this process has the capability now, in its own user namespace."""
    with open("/proc/self/status", "rb") as status:  # bytes: a codec would be loaded anew in every fork
        for line in status:
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def join_new_keyring() -> None:
    _syscall("keyctl", _KEYCTL, ctypes.c_int(_KEYCTL_JOIN_SESSION_KEYRING), None)


def set_seccomp_filter(count: int, address: int) -> None:
    program = struct.pack("HxxxxxxP", count, address)  # struct sock_fprog
    _syscall("seccomp", _SECCOMP, ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(0), program)


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
