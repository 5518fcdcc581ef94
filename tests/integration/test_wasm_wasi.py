"""WASI preview 1 as a guest sees it: 58 behaviours and 28 attempts to break out, each a Python program on CPython for WASI, at both isolations.

The WebAssembly project's own suite comes in no package of the registries, so these stand in for it. The
programs run once per isolation, in two slots; each test then looks at one.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blixard.domain.grants import Grants
from blixard.domain.outcome import Outcome, OutcomeKind
from blixard.domain.requirements import Isolation
from tests.integration.wasm_rig import BOTH, Recorder, WasmRig

PRELUDE = """
import errno, os, select, stat, sys, time
G, W = os.environ["G"], os.environ["W"]
def refused(do):
    try: do()
    except OSError as e: print("refused", errno.errorcode.get(e.errno, e.errno))
    else: print("allowed")
def put(path, text):
    with open(path, "w") as f: f.write(text)
def get(path):
    with open(path) as f: return f.read()
"""

BEHAVIOURS: dict[str, tuple[str, str]] = {
    # arguments, environment, exit
    "argv": ("print(sys.argv[1:])", "['one', 'two words', 'drei ä']"),
    "environment": (
        "print(os.environ['BLIXARD_JOB_ID'][:4], os.environ['BLIXARD_ATTEMPT'], os.environ['BLIXARD_NAMESPACE'])",
        "job_ 1 default",
    ),
    "environment_is_small": (
        "print(sorted(n for n in os.environ if not n.startswith('BLIXARD_') and n not in 'GW'))",
        "[]",
    ),
    "exit_flushes": ("sys.stdout.write('last'); sys.exit(0)", "last"),
    # standard streams
    "stdin_is_empty": ("print(repr(sys.stdin.read()))", "''"),
    "stdout_is_no_terminal": ("print(sys.stdout.isatty(), sys.stdin.isatty())", "False False"),
    "stdout_descriptor": ("os.write(1, b'raw\\n')", "raw"),
    "write_returns_the_count": ("n = os.write(1, b'x' * 3000); print(n <= 3000 and n > 0)", "x" * 3000 + "True"),
    # clocks and randomness
    "realtime_is_now": ("print(1_700_000_000 < time.time() < 4_000_000_000)", "True"),
    "monotonic_never_falls": ("t = [time.monotonic() for _ in range(1000)]; print(t == sorted(t))", "True"),
    "monotonic_has_a_resolution": ("print(0 < time.clock_getres(time.CLOCK_MONOTONIC) <= 1)", "True"),
    "sleep_takes_its_time": ("t = time.monotonic(); time.sleep(0.05); print(time.monotonic() - t >= 0.05)", "True"),
    "random_is_random": ("print(len({os.urandom(16) for _ in range(50)}))", "50"),
    "random_of_any_length": ("print([len(os.urandom(n)) for n in (0, 1, 255, 70000)])", "[0, 1, 255, 70000]"),
    # files
    "write_and_read": ("put('a', 'text'); print(get('a'))", "text"),
    "work_is_the_working_directory": ("put('a', 'x'); print(get('/work/a'), os.listdir('/work'))", "x ['a']"),
    "append": ("put('a', 'x'); f = open('a', 'a'); f.write('y'); f.close(); print(get('a'))", "xy"),
    "exclusive_create": ("put('a', 'x'); refused(lambda: open('a', 'x'))", "refused EEXIST"),
    "truncate_on_open": ("put('a', 'long text'); put('a', 's'); print(get('a'))", "s"),
    "truncate_file": ("put('a', 'abcdef'); f = open('a', 'r+'); f.truncate(3); f.close(); print(get('a'))", "abc"),
    "truncate_extends_with_zeros": (
        "f = open('a', 'wb+'); f.truncate(4); f.seek(0); print(f.read())",
        "b'\\x00\\x00\\x00\\x00'",
    ),
    "seek_and_tell": (
        "f = open('a', 'wb+'); f.write(b'abcdef'); f.seek(-2, 2); print(f.tell(), f.read(), f.tell())",
        "4 b'ef' 6",
    ),
    "seek_beyond_the_end": (
        "f = open('a', 'wb+'); f.seek(5); f.write(b'x'); f.seek(0); print(f.read())",
        "b'\\x00\\x00\\x00\\x00\\x00x'",
    ),
    "seek_before_the_start": (
        "f = os.open('a', os.O_CREAT | os.O_RDWR); refused(lambda: os.lseek(f, -1, 0))",
        "refused EINVAL",
    ),
    "stat_of_a_file": (
        "put('a', 'abc'); s = os.stat('a'); print(s.st_size, stat.S_ISREG(s.st_mode), s.st_nlink)",
        "3 True 1",
    ),
    "stat_of_a_directory": ("print(stat.S_ISDIR(os.stat('.').st_mode))", "True"),
    "stat_of_nothing": ("refused(lambda: os.stat('none'))", "refused ENOENT"),
    "fstat": ("f = open('a', 'wb'); f.write(b'abcd'); f.flush(); print(os.fstat(f.fileno()).st_size)", "4"),
    "utime": (
        "put('a', ''); os.utime('a', (1000, 2000)); s = os.stat('a'); print(s.st_atime, s.st_mtime)",
        "1000.0 2000.0",
    ),
    "fsync": ("f = open('a', 'w'); f.write('x'); f.flush(); os.fsync(f.fileno()); print('synced')", "synced"),
    "read_only_descriptor": (
        "put('a', 'x'); f = os.open('a', os.O_RDONLY); refused(lambda: os.write(f, b'y'))",
        "refused EBADF",
    ),
    "closed_descriptor": (
        "f = os.open('a', os.O_CREAT | os.O_RDWR); os.close(f); refused(lambda: os.read(f, 1))",
        "refused EBADF",
    ),
    "open_a_directory_for_writing": ("os.mkdir('d'); refused(lambda: open('d', 'w'))", "refused EISDIR"),
    "open_below_a_file": ("put('a', ''); refused(lambda: open('a/b'))", "refused ENOTDIR"),
    "large_file": (
        "f = open('a', 'wb')\nfor _ in range(64): f.write(b'z' * 65536)\nf.close(); print(os.stat('a').st_size)",
        "4194304",
    ),
    # directories
    "mkdir_and_list": ("os.mkdir('d'); put('d/a', ''); put('d/b', ''); print(sorted(os.listdir('d')))", "['a', 'b']"),
    "mkdir_twice": ("os.mkdir('d'); refused(lambda: os.mkdir('d'))", "refused EEXIST"),
    "mkdir_deep": ("os.makedirs('a/b/c'); print(os.path.isdir('a/b/c'))", "True"),
    "rmdir": ("os.mkdir('d'); os.rmdir('d'); print(os.listdir('.'))", "[]"),
    "rmdir_not_empty": ("os.mkdir('d'); put('d/a', ''); refused(lambda: os.rmdir('d'))", "refused ENOTEMPTY"),
    "rmdir_of_a_file": ("put('a', ''); refused(lambda: os.rmdir('a'))", "refused ENOTDIR"),
    "unlink": ("put('a', ''); os.unlink('a'); print(os.path.exists('a'))", "False"),
    "unlink_of_nothing": ("refused(lambda: os.unlink('none'))", "refused ENOENT"),
    "unlinked_file_stays_readable": (
        "f = open('a', 'wb+'); f.write(b'x'); os.unlink('a'); f.seek(0); print(f.read())",
        "b'x'",
    ),
    "list_of_many": (
        "[put(f'f{i:04}', '') for i in range(700)]; print(len(os.listdir('.')), len(set(os.listdir('.'))))",
        "700 700",
    ),
    "rename": ("put('a', 'x'); os.rename('a', 'b'); print(os.listdir('.'), get('b'))", "['b'] x"),
    "rename_over": (
        "put('a', 'new'); put('b', 'old'); os.rename('a', 'b'); print(os.listdir('.'), get('b'))",
        "['b'] new",
    ),
    "rename_into_directory": ("put('a', 'x'); os.mkdir('d'); os.rename('a', 'd/b'); print(get('d/b'))", "x"),
    "rename_between_grants": (
        "put('a', 'moved'); import shutil; shutil.copyfile('a', W + '/moved'); print(get(W + '/moved'))",
        "moved",
    ),
    "hard_link": ("put('a', 'x'); os.link('a', 'b'); print(get('b'), os.stat('a').st_nlink)", "x 2"),
    "symlink_inside": (
        "put('a', 'x'); os.symlink('a', 'l'); print(os.readlink('l'), get('l'), os.path.islink('l'))",
        "a x True",
    ),
    "symlink_loop": ("os.symlink('l', 'l'); refused(lambda: open('l'))", "refused ELOOP"),
    # polling
    "poll_times_out": ("r = select.select([], [], [], 0.02); print(r)", "([], [], [])"),
    # no sockets, no processes
    "no_processes": ("print(hasattr(os, 'fork'))", "False"),
    # grants
    "read_granted": (
        "print(get(G + '/in.txt'), sorted(os.listdir(G)))",
        "given ['dir_out', 'in.txt', 'link_in', 'link_out', 'sub']",
    ),
    "read_granted_below": ("print(get(G + '/sub/deep.txt'))", "deep"),
    "write_granted": ("put(W + '/out.txt', 'taken'); print(get(W + '/out.txt'))", "taken"),
    "link_within_a_grant": ("print(get(G + '/link_in'))", "given"),
}

ESCAPES: dict[str, str] = {
    "absolute": "refused(lambda: open('/etc/passwd'))",
    "root": "print('refused' if set(os.listdir('/')) <= {'usr', 'work'} else 'allowed', os.listdir('/'))",
    "parent": "refused(lambda: open('../../../../etc/passwd'))",
    "parent_of_work": "refused(lambda: os.listdir('/work/..'))",
    "dots_within": "os.mkdir('d'); refused(lambda: open('d/../../../etc/passwd'))",
    "parent_of_a_grant": "refused(lambda: open(G + '/../secret.txt'))",
    "own_symlink_absolute": "refused(lambda: (os.symlink('/etc', 'l'), open('l/passwd')))",
    "own_symlink_relative": "refused(lambda: (os.symlink('../../../../etc/passwd', 'l'), open('l')))",
    "own_symlink_to_parent": "refused(lambda: (os.symlink('..', 'l'), os.listdir('l')))",
    "host_symlink_to_file": "refused(lambda: open(G + '/link_out'))",
    "host_symlink_to_directory": "refused(lambda: open(G + '/dir_out/secret.txt'))",
    "create_through_symlink": "refused(lambda: (os.symlink('../escaped', 'l'), open('l', 'w')))",
    "hard_link_from_outside": "refused(lambda: os.link('/etc/passwd', 'p'))",
    "rename_out": "put('a', ''); refused(lambda: os.rename('a', '../a'))",
    "proc": "refused(lambda: open('/proc/self/environ'))",
    "device": "refused(lambda: open('/dev/null'))",
    "write_to_a_read_grant": "refused(lambda: open(G + '/in.txt', 'w'))",
    "append_to_a_read_grant": "refused(lambda: open(G + '/in.txt', 'a'))",
    "create_in_a_read_grant": "refused(lambda: open(G + '/new', 'x'))",
    "unlink_in_a_read_grant": "refused(lambda: os.unlink(G + '/in.txt'))",
    "rename_in_a_read_grant": "refused(lambda: os.rename(G + '/in.txt', G + '/other'))",
    "mkdir_in_a_read_grant": "refused(lambda: os.mkdir(G + '/d'))",
    "rmdir_in_a_read_grant": "refused(lambda: os.rmdir(G + '/sub'))",
    "symlink_in_a_read_grant": "refused(lambda: os.symlink('in.txt', G + '/l'))",
    "touch_a_read_grant": "refused(lambda: os.utime(G + '/in.txt', (0, 0)))",
    "link_a_read_grant_into_work": "refused(lambda: os.link(G + '/in.txt', 'mine'))",
    "truncate_a_read_grant": "refused(lambda: os.truncate(G + '/in.txt', 0))",
    "not_granted": "refused(lambda: open(os.path.dirname(G) + '/secret.txt'))",
}

EXHAUSTION = """
held = []
try:
    while len(held) < 5000: held.append(open('/work/file', 'w'))
except OSError as e:
    print(errno.errorcode[e.errno], len(held) < 5000)
for f in held: f.close()
print(get('/work/file') == '')
"""


@dataclass
class World:
    root: Path
    results: dict[tuple[Isolation, str], tuple[Outcome, Recorder]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="blixard-wasi-") as name:
        root = Path(name)
        root.chmod(0o755)
        _furnish(root)
        yield World(root, asyncio.run(_run_all(root)))


def _furnish(root: Path) -> None:
    given = root / "given"
    (given / "sub").mkdir(parents=True)
    (given / "in.txt").write_text("given")
    (given / "sub" / "deep.txt").write_text("deep")
    (root / "secret.txt").write_text("secret")
    (root / "outside").mkdir()
    (root / "outside" / "secret.txt").write_text("secret")
    (given / "link_in").symlink_to("in.txt")
    (given / "link_out").symlink_to("../secret.txt")
    (given / "dir_out").symlink_to(root / "outside")
    for isolation in BOTH:
        (root / f"taken-{isolation}").mkdir()
        (root / f"taken-{isolation}").chmod(0o777)


async def _run_all(root: Path) -> dict[tuple[Isolation, str], tuple[Outcome, Recorder]]:
    rig = WasmRig(root)
    await rig.backend.start()
    programs = {name: code for name, (code, _) in BEHAVIOURS.items()} | ESCAPES | {"exhaustion": EXHAUSTION}
    results = {}

    async def one(isolation: Isolation, name: str, code: str) -> None:
        given, taken = str(root / "given"), str(root / f"taken-{isolation}")
        results[isolation, name] = await rig.python(
            PRELUDE + code,
            ["one", "two words", "drei ä"],
            isolation=isolation,
            environment={"G": given, "W": taken},
            grants=Grants(read=(given,), write=(taken,)),
        )

    await asyncio.gather(*(one(isolation, name, code) for isolation in BOTH for name, code in programs.items()))
    await rig.backend.stop()
    return results


both = pytest.mark.parametrize("isolation", BOTH)


@both
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_wasi_behaves(world: World, isolation: Isolation, name: str) -> None:
    outcome, heard = world.results[isolation, name]
    assert outcome.kind is OutcomeKind.COMPLETED, heard.data().decode()
    assert heard.text.rstrip("\n") == BEHAVIOURS[name][1]


@both
@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_leads_out(world: World, isolation: Isolation, name: str) -> None:
    outcome, heard = world.results[isolation, name]
    assert outcome.kind is OutcomeKind.COMPLETED, heard.data().decode()
    assert heard.text.startswith("refused "), heard.text
    assert "secret" not in heard.text


@both
def test_running_out_of_descriptors_is_the_guest_s_own_trouble(world: World, isolation: Isolation) -> None:
    outcome, heard = world.results[isolation, "exhaustion"]
    assert outcome.kind is OutcomeKind.COMPLETED, heard.data().decode()
    assert heard.text.endswith(" True\nTrue\n")
    assert heard.text.split()[0] in {"EMFILE", "ENFILE", "EIO"}


def test_the_host_s_files_are_as_they_were(world: World) -> None:
    assert sorted(os.listdir(world.root / "given")) == ["dir_out", "in.txt", "link_in", "link_out", "sub"]  # noqa: PTH208 -- names, not paths
    assert (world.root / "given" / "in.txt").read_text() == "given"
    assert not (world.root / "escaped").exists()
    assert sorted(path.name for path in world.root.glob("taken-*/*")) == ["moved", "moved", "out.txt", "out.txt"]
