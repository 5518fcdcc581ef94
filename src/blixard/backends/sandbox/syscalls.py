"""What a sandboxed job may not ask of the kernel: one table, with the reason for every entry.

The base is what Docker's default profile and Flatpak's refuse; on top of it come io_uring, setuid bits and everything that
makes a namespace. Numbers: https://github.com/torvalds/linux/tree/master/arch/x86/entry/syscalls and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from dataclasses import dataclass

EPERM = errno.EPERM
ENOSYS = errno.ENOSYS


class Machine(enum.StrEnum):
    X86_64 = "x86_64"
    AARCH64 = "aarch64"


class Comparison(enum.StrEnum):
    """How the low 32 bits of an argument are judged; the kernel ignores the upper ones of every argument used here."""

    ANY_BIT = "any_bit"
    EQUALS = "equals"
    NOT_IN = "not_in"


@dataclass(frozen=True)
class Condition:
    argument: int
    test: Comparison
    values: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """Refuse ``name`` with ``error`` if all conditions of one of ``cases`` hold; without cases always."""

    name: str
    error: int = EPERM
    cases: tuple[tuple[Condition, ...], ...] = ()


NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
NEW_TIME = 0x80
CREATES_FILE = 0o100 | 0o20000000  # O_CREAT, __O_TMPFILE
SET_ID_BITS = 0o6000
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
SOCKET_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink
PERSONALITIES = (0, 0xFFFFFFFF)  # plain Linux, and the question which one it is


def _any_bit(argument: int, mask: int) -> Condition:
    return Condition(argument, Comparison.ANY_BIT, (mask,))


def _conditional() -> list[Rule]:
    """Frequent calls, judged by an argument."""
    return [
        # A file with a set-id bit in a granted directory would be a way to another user's rights on the host.
        Rule("open", EPERM, ((_any_bit(1, CREATES_FILE), _any_bit(2, SET_ID_BITS)),)),
        Rule("openat", EPERM, ((_any_bit(2, CREATES_FILE), _any_bit(3, SET_ID_BITS)),)),
        Rule("creat", EPERM, ((_any_bit(1, SET_ID_BITS),),)),
        Rule("chmod", EPERM, ((_any_bit(1, SET_ID_BITS),),)),
        Rule("fchmod", EPERM, ((_any_bit(1, SET_ID_BITS),),)),
        Rule("fchmodat", EPERM, ((_any_bit(2, SET_ID_BITS),),)),
        Rule("fchmodat2", EPERM, ((_any_bit(2, SET_ID_BITS),),)),
        Rule("mknod", EPERM, ((_any_bit(1, SET_ID_BITS),),)),
        Rule("mknodat", EPERM, ((_any_bit(2, SET_ID_BITS),),)),
        # Keystrokes put into a terminal are run by the shell behind it.
        Rule(
            "ioctl",
            EPERM,
            ((Condition(1, Comparison.EQUALS, (TIOCSTI,)),), (Condition(1, Comparison.EQUALS, (TIOCLINUX,)),)),
        ),
        # In a user namespace of its own a job would have every capability, and with it far more of the kernel to attack.
        Rule("clone", EPERM, ((_any_bit(0, NAMESPACE_FLAGS),),)),
        Rule("unshare", EPERM, ((_any_bit(0, NAMESPACE_FLAGS | NEW_TIME),),)),
        # Rare protocol families are where kernel bugs live.
        Rule("socket", errno.EAFNOSUPPORT, ((Condition(0, Comparison.NOT_IN, SOCKET_FAMILIES),),)),
        Rule("socketpair", errno.EAFNOSUPPORT, ((Condition(0, Comparison.NOT_IN, SOCKET_FAMILIES),),)),
        Rule("personality", EPERM, ((Condition(0, Comparison.NOT_IN, PERSONALITIES),),)),
    ]


# Their arguments are behind a pointer, which a filter cannot read: programs fall back to the older call, which it can judge.
UNREADABLE = ("clone3", "openat2", "io_uring_setup", "io_uring_enter", "io_uring_register")

DENIED = (
    # mounts and roots
    *("mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "open_tree_attr", "setns", "open_by_handle_at", "name_to_handle_at"),
    # other processes
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"),
    # kernel code and keys
    *("bpf", "perf_event_open", "userfaultfd", "init_module", "finit_module", "delete_module", "create_module"),
    *("get_kernel_syms", "query_module", "kexec_load", "kexec_file_load", "keyctl", "add_key", "request_key"),
    # the machine
    *("reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog", "vhangup", "sethostname"),
    *("setdomainname", "iopl", "ioperm", "modify_ldt", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex"),
    *("fanotify_init", "lookup_dcookie", "nfsservctl", "uselib", "ustat", "sysfs", "_sysctl"),
    # memory of other nodes
    *("mbind", "set_mempolicy", "get_mempolicy", "migrate_pages", "move_pages", "set_mempolicy_home_node"),
)

RULES: tuple[Rule, ...] = (
    *_conditional(),
    *(Rule(name, ENOSYS) for name in UNREADABLE),
    *(Rule(name) for name in DENIED),
)

_SAME_EVERYWHERE = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "clone3": 435,
    "openat2": 437,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "set_mempolicy_home_node": 450,
    "fchmodat2": 452,
    "open_tree_attr": 467,
}
_X86_64 = {
    "open": 2,
    "ioctl": 16,
    "socket": 41,
    "socketpair": 53,
    "clone": 56,
    "creat": 85,
    "chmod": 90,
    "fchmod": 91,
    "ptrace": 101,
    "syslog": 103,
    "mknod": 133,
    "uselib": 134,
    "personality": 135,
    "ustat": 136,
    "sysfs": 139,
    "vhangup": 153,
    "modify_ldt": 154,
    "pivot_root": 155,
    "_sysctl": 156,
    "adjtimex": 159,
    "chroot": 161,
    "acct": 163,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "sethostname": 170,
    "setdomainname": 171,
    "iopl": 172,
    "ioperm": 173,
    "create_module": 174,
    "init_module": 175,
    "delete_module": 176,
    "get_kernel_syms": 177,
    "query_module": 178,
    "quotactl": 179,
    "nfsservctl": 180,
    "lookup_dcookie": 212,
    "clock_settime": 227,
    "mbind": 237,
    "set_mempolicy": 238,
    "get_mempolicy": 239,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "migrate_pages": 256,
    "openat": 257,
    "mknodat": 259,
    "fchmodat": 268,
    "unshare": 272,
    "move_pages": 279,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
}
_AARCH64 = {
    "lookup_dcookie": 18,
    "ioctl": 29,
    "mknodat": 33,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "nfsservctl": 42,
    "chroot": 51,
    "fchmod": 52,
    "fchmodat": 53,
    "openat": 56,
    "vhangup": 58,
    "quotactl": 60,
    "acct": 89,
    "personality": 92,
    "unshare": 97,
    "kexec_load": 104,
    "init_module": 105,
    "delete_module": 106,
    "clock_settime": 112,
    "syslog": 116,
    "ptrace": 117,
    "reboot": 142,
    "sethostname": 161,
    "setdomainname": 162,
    "settimeofday": 170,
    "adjtimex": 171,
    "socket": 198,
    "socketpair": 199,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
    "clone": 220,
    "swapon": 224,
    "swapoff": 225,
    "mbind": 235,
    "get_mempolicy": 236,
    "set_mempolicy": 237,
    "migrate_pages": 238,
    "move_pages": 239,
    "perf_event_open": 241,
    "fanotify_init": 262,
    "name_to_handle_at": 264,
    "open_by_handle_at": 265,
    "clock_adjtime": 266,
    "setns": 268,
    "process_vm_readv": 270,
    "process_vm_writev": 271,
    "kcmp": 272,
    "finit_module": 273,
    "bpf": 280,
    "userfaultfd": 282,
    "kexec_file_load": 294,
}
NUMBERS: Mapping[Machine, Mapping[str, int]] = {
    Machine.X86_64: {**_X86_64, **_SAME_EVERYWHERE},
    Machine.AARCH64: {**_AARCH64, **_SAME_EVERYWHERE},
}
"""Calls that a machine never had are missing from its table."""
AUDIT_ARCH: Mapping[Machine, int] = {Machine.X86_64: 0xC000003E, Machine.AARCH64: 0xC00000B7}
