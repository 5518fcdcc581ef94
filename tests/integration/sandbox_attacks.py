"""Attempts to get out of a sandbox, each a Python program. It prints ``held`` if every way was closed, else what it got.

``{secret}``: a file of the host that was not granted. ``{pid}``: a process of the host. ``{port}``: a TCP port on the host's
loopback. ``{abstract}``: an abstract Unix socket of the host. ``{granted}``: a directory granted for writing.
"""

# ruff: noqa: E501 -- one attempt a line reads better than its pieces

from __future__ import annotations

PRELUDE = """
import ctypes, errno, fcntl, glob, json, os, resource, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"

def escaped(what):
    print("ESCAPED", what, flush=True)
    os._exit(1)

def refused(action, *arguments):
    try:
        value = action(*arguments)
    except OSError:
        return
    escaped((getattr(action, "__name__", action), arguments, value))

def call(name, *arguments):
    number = NUMBERS[name]
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result

def read(path):
    with open(path, "rb") as file:
        return file.read(100)

def write(path, data=b"1"):
    descriptor = os.open(path, os.O_WRONLY)
    return os.write(descriptor, data)

NUMBERS = {numbers}
"""

ATTACKS = {
    "read the password file": "refused(read, '/etc/shadow'); refused(read, '/etc/gshadow'); refused(read, '/etc/sudoers')",
    "see the users of the host": "text = read('/etc/passwd')\nif len(open('/etc/passwd').readlines()) != 3: escaped(text)",
    "read a file that was not granted": "refused(read, {secret!r})",
    "read it by a detour": "refused(read, '/proc/self/root' + {secret!r}); refused(read, '/proc/1/root' + {secret!r}); refused(read, '../../../../..' + {secret!r})",
    "read it by a symbolic link": "os.symlink({secret!r}, 'link'); refused(read, 'link')",
    "see the home directory": """
home = {home!r}
for name in os.listdir(home) if os.path.isdir(home) else []:
    if name not in {shown!r}: escaped(name)
refused(read, home + '/.bashrc'); refused(read, home + '/.ssh/id_rsa')
""",
    "see other directories of the host": "for path in ('/var', '/srv', '/mnt', '/boot', '/opt', '/sys', '/etc/ssh', '/run/docker.sock'):\n    if os.path.exists(path): escaped(path)",
    "see the data directory": "refused(os.listdir, os.path.dirname({secret!r}))",
    "see another job's directory": "refused(os.listdir, {scratch!r}); refused(os.stat, {scratch!r})",
    "read the worker's environment": """
for path in glob.glob('/proc/*/environ'):
    try: text = read(path)
    except OSError: continue
    if b'BLIXARD_TEST_SECRET' in open(path, 'rb').read(): escaped(path)
if 'BLIXARD_TEST_SECRET' in os.environ: escaped('inherited')
""",
    "see processes of the host": "pids = [p for p in os.listdir('/proc') if p.isdigit()]\nif len(pids) > 3: escaped(pids)",
    "signal a process of the host": "refused(os.kill, {pid}, 9)",
    "signal by pidfd": "refused(os.pidfd_open, {pid})",
    "signal everything": "pid = os.fork()\nif pid == 0:\n    signal.signal(15, signal.SIG_IGN)\n    try: os.kill(-1, 0)\n    except OSError: pass\n    os._exit(0)\nos.waitpid(pid, 0)",
    "trace a process": "refused(call, 'ptrace', 0, 0, None, None); refused(call, 'ptrace', 16, 1, None, None)",
    "read a process's memory": "buffer = ctypes.create_string_buffer(64)\nrefused(call, 'process_vm_readv', 1, ctypes.byref(buffer), 1, ctypes.byref(buffer), 1, 0)\nrefused(read, '/proc/1/mem')",
    "take a process's descriptor": "refused(call, 'pidfd_getfd', 0, 0, 0)\nfor path in glob.glob('/proc/1/fd/*'):\n    try: target = os.readlink(path)\n    except OSError: continue\n    if target not in ('/dev/null',) and not target.startswith(('pipe:', 'socket:', 'anon_inode:')): escaped(target)",
    "mount": "refused(call, 'mount', b'none', b'/tmp', b'tmpfs', 0, None); refused(call, 'mount', b'/', b'/tmp', None, 4096, None)",
    "unmount": "refused(call, 'umount2', b'/proc', 2); refused(call, 'umount2', b'/', 2)",
    "mount by the new calls": "refused(call, 'fsopen', b'tmpfs', 0); refused(call, 'open_tree', -100, b'/', 1); refused(call, 'move_mount', 0, b'', 0, b'', 0); refused(call, 'mount_setattr', -100, b'/', 0, None, 0)",
    "make a mount writable": "refused(call, 'mount', None, b'/usr', None, 32 | 4096, None)",
    "change the root": "refused(os.chroot, '/tmp'); refused(call, 'pivot_root', b'/tmp', b'/tmp')",
    "leave by chroot and ..": "descriptor = os.open('/', os.O_RDONLY)\nrefused(os.chroot, '/tmp')\nos.fchdir(descriptor)\nfor _ in range(50): os.chdir('..')\nif os.path.exists({secret!r}): escaped('..')",
    "make a user namespace": "refused(call, 'unshare', 0x10000000); refused(call, 'clone', 0x10000000 | 17, None, None, None, None); refused(call, 'clone3', None, 0)",
    "make other namespaces": "[refused(call, 'unshare', flag) for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000, 0x80)]",
    "enter a namespace": "for path in glob.glob('/proc/1/ns/*') + glob.glob('/proc/self/ns/*'):\n    try: descriptor = os.open(path, os.O_RDONLY)\n    except OSError: continue\n    refused(call, 'setns', descriptor, 0)",
    "open by handle": "buffer = ctypes.create_string_buffer(128)\nrefused(call, 'open_by_handle_at', -100, buffer, 0); refused(call, 'name_to_handle_at', -100, b'/', buffer, buffer, 0)",
    "make a device": "refused(os.mknod, '/work/sda', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); refused(os.mknod, '/work/mem', 0o600 | stat.S_IFCHR, os.makedev(1, 1))",
    "open devices of the host": "for name in ('sda', 'vda', 'mem', 'kmsg', 'kvm', 'fuse', 'net/tun', 'loop-control', 'mapper/control', 'port'): refused(open, '/dev/' + name, 'rb')",
    "write to the system": "refused(open, '/usr/bin/evil', 'w'); refused(open, '/usr/bin/env', 'r+b'); refused(os.unlink, '/usr/bin/env'); refused(os.rename, '/usr/bin', '/usr/nib')",
    "write to the interpreter": "refused(open, os.path.realpath(sys.executable), 'r+b'); refused(open, os.__file__, 'a'); refused(os.mkdir, os.path.join(sys.prefix, 'evil')); refused(open, os.path.join(sys.prefix, 'lib', 'evil.pth'), 'w')",
    "write to its own root": "refused(open, '/evil', 'w'); refused(os.mkdir, '/evil'); refused(open, '/etc/passwd', 'a'); refused(open, '/dev/evil', 'w')",
    "reach the network": "s = socket.socket(); s.settimeout(5); refused(s.connect, ('192.0.2.1', 80))\ns = socket.socket(socket.AF_INET6); s.settimeout(5); refused(s.connect, ('2001:db8::1', 80))\nnames = [name for _, name in socket.if_nameindex()]\nif set(names) - {{'lo', 'sit0', 'tunl0', 'ip6tnl0', 'gre0', 'erspan0', 'gretap0', 'ip_vti0', 'ip6_vti0', 'ip6gre0'}}: escaped(names)",
    "reach the host's loopback": "s = socket.socket(); s.settimeout(5); refused(s.connect, ('127.0.0.1', {port}))",
    "reach an abstract socket of the host": "s = socket.socket(socket.AF_UNIX); s.settimeout(5); refused(s.connect, '\\0' + {abstract!r})",
    "use rare protocols": "for family in (17, 5, 29, 31, 38, 40, 44): refused(socket.socket, family, 3)",
    "configure the network": "s = socket.socket(); refused(fcntl.ioctl, s, 0x8914, struct.pack('16sH14x', b'lo', 0))\nrefused(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)",
    "use kernel keys": "refused(call, 'keyctl', 0, -3, 0); refused(call, 'add_key', b'user', b'x', b'x', 1, -3); refused(call, 'request_key', b'user', b'x', None, 0)\nrefused(read, '/proc/keys') if not stat.S_ISCHR(os.stat('/proc/keys').st_mode) else None",
    "type into the terminal": "master, slave = os.openpty()\nrefused(fcntl.ioctl, slave, 0x5412, b'x'); refused(fcntl.ioctl, slave, 0x541C, b'x')\nrefused(open, '/dev/tty', 'r')",
    "run set-uid programs": """
for program in ('/usr/bin/su', '/usr/bin/sudo', '/usr/bin/passwd', '/usr/bin/mount', '/usr/bin/newgrp'):
    if os.path.exists(program):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open('/dev/null', os.O_RDWR), 0)
            os.execv('/bin/sh', ['sh', '-c', program + ' -c true </dev/null >/dev/null 2>&1; exit 0'])
        os.waitpid(pid, 0)
status = open('/proc/self/status').read()
if 'NoNewPrivs:\\t1' not in status: escaped('new privileges')
for word in ('CapPrm', 'CapEff', 'CapBnd', 'CapInh', 'CapAmb'):
    if word + ':\\t0000000000000000' not in status: escaped(status)
""",
    "become another user": "refused(os.setuid, 0); refused(os.setgid, 0); refused(os.setgroups, [0]); refused(os.setresuid, 0, 0, 0); refused(write, '/proc/self/uid_map', b'0 0 1')\nif os.getuid() == 0 or os.geteuid() == 0: escaped('root')",
    "make a set-uid file in a granted directory": "path = {granted!r} + '/suid'\nopen(path, 'w').close()\nrefused(os.chmod, path, 0o4755); refused(os.chmod, path, 0o2755); refused(os.open, path + '2', os.O_CREAT | os.O_WRONLY, 0o4755); refused(os.mknod, path + '3', 0o4755 | stat.S_IFREG)\nif os.path.exists(path + '2') or os.path.exists(path + '3') or os.stat(path).st_mode & 0o6000: escaped('set-uid')",
    "pull the host's switches": "for path in ('/proc/sysrq-trigger', '/proc/sys/kernel/core_pattern', '/proc/sys/kernel/modprobe', '/proc/sys/vm/drop_caches', '/proc/sys/kernel/hostname', '/proc/sys/net/ipv4/ip_forward'):\n    try: written = write(path)\n    except OSError: continue\n    if not stat.S_ISCHR(os.stat(path).st_mode): escaped(path)",
    "read the kernel's secrets": "for name in ('kcore', 'kallsyms', 'kmsg', 'vmallocinfo', 'timer_list'):\n    try: data = read('/proc/' + name)\n    except OSError: continue\n    if data: escaped(name)\nrefused(call, 'syslog', 3, ctypes.create_string_buffer(100), 100)",
    "attack the kernel": "buffer = ctypes.create_string_buffer(256)\nrefused(call, 'bpf', 0, buffer, 128); refused(call, 'perf_event_open', buffer, 0, -1, -1, 0); refused(call, 'userfaultfd', 0); refused(call, 'io_uring_setup', 1, buffer); refused(call, 'init_module', buffer, 1, b''); refused(call, 'finit_module', 0, b'', 0); refused(call, 'kexec_load', 0, 0, None, 0)",
    "set the clock and the machine": "refused(time.clock_settime, time.CLOCK_REALTIME, 1.0); refused(socket.sethostname, 'evil'); refused(call, 'reboot', 0xfee1dead, 672274793, 0, None); refused(call, 'swapon', b'/work/x', 0); refused(call, 'acct', b'/work/x'); refused(call, 'personality', 0x0400000)",
    "raise its own limits": "soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)\nif hard == resource.RLIM_INFINITY: escaped('no limit')\ntry:\n    resource.setrlimit(resource.RLIMIT_NPROC, (hard + 1, hard + 1)); escaped('limit')\nexcept (OSError, ValueError): pass",
    "leave its cgroup": "for path in glob.glob('/sys/fs/cgroup/*'): escaped(path)",
    "find descriptors of ours": """
for name in os.listdir('/proc/self/fd'):
    try: target = os.readlink('/proc/self/fd/' + name)
    except OSError: continue
    if 'lock' in target or target.startswith(('/tmp/', {scratch!r})) or 'ns' in target.split(':')[0] and ':' in target: escaped(target)
""",
    "inherit blocked or ignored signals": """
status = dict(line.split(':\\t') for line in open('/proc/self/status').read().splitlines() if ':\\t' in line)
if int(status['SigBlk'], 16): escaped('blocked ' + status['SigBlk'])
# SIGPIPE and SIGXFSZ are Python's; 32 and 33 belong to the C library, whose posix_spawn (of make, say) has them ignored
if int(status['SigIgn'], 16) & ~(1 << 12 | 1 << 24 | 1 << 31 | 1 << 32): escaped('ignored ' + status['SigIgn'])
if os.getpid() == 1: escaped('init')
""",
    "plant a link in a granted directory": "os.symlink('/etc/shadow', {granted!r} + '/link'); refused(read, {granted!r} + '/link'); os.symlink('..', {granted!r} + '/up'); refused(read, {granted!r} + '/up/secret/secret.txt')",
    "climb out of a granted directory": "descriptor = os.open({granted!r}, os.O_RDONLY)\nrefused(os.open, '../secret/secret.txt', os.O_RDONLY, 0o600)\ntry:\n    os.stat('../secret/secret.txt', dir_fd=descriptor); escaped('..')\nexcept OSError: pass",
    "use other machines' call numbers": """
if X86:
    pid = os.fork()
    if pid == 0:
        libc.syscall(ctypes.c_long(0x40000000 | 39)); os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -31: escaped('x32')
""",
}
"""What to try, by name. Each is a body of Python with ``str.format`` fields."""

FINISH = "\nprint('held', flush=True)\n"


def program_of(name: str, numbers: dict[str, int], facts: dict[str, object]) -> str:
    """Return the program that tries it."""
    body = ATTACKS[name].format(**facts)
    return PRELUDE.replace("{numbers}", repr(numbers)) + body + FINISH
