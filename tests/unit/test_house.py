"""The rules of the house, each as a test that names every place that breaks it."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blixard import errors
from blixard.config.schema import all_keys

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted(path for folder in ("benches", "examples") for path in (ROOT / folder).rglob("*.py"))
EVERYTHING = SOURCES + TESTS + OTHERS
MAX_FUNCTION_LINES = 70
MAX_MODULE_LINES = 700
MEDIAN_FUNCTION_LINES = 9

SKIPPED = re.compile(r"pytest\.(skip|mark\.(skip|skipif|xfail))|importorskip|unittest\.skip")
UNDONE = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
HUSHED = re.compile(r"#\s*(?:noqa|type:\s*ignore)(?::\s*[A-Z0-9, ]+?|\[[a-z-, ]+\])?\s*(?P<reason>$|#.*|\s.*)")
SLEEPERS = {"time.sleep", "asyncio.sleep", "anyio.sleep"}
LONGEST_LOOK = 0.1
STATEMENT_NAME = re.compile(r"^-- name: (\w+)", re.MULTILINE)

BROAD_EXCEPTS = {
    "blixard.api.operation:run": "the edge of a request: becomes a problem document",
    "blixard.backends.executor.calls:_shut_down": "the edge of a job: its exit handlers are its own code",
    "blixard.backends.executor.calls:_text_of": "the edge of a job: __str__ is its own code",
    "blixard.backends.executor.calls:call": "the edge of a job: becomes its outcome",
    "blixard.backends.executor.calls:format_traceback": "the edge of a job: __str__ and __repr__ are its own code",
    "blixard.backends.executor.calls:load": "the edge of a job: importing its module runs its own code",
    "blixard.backends.executor.calls:run_script": "the edge of a job: becomes its outcome",
    "blixard.backends.sandbox.bubblewrap:_execute": "the edge of a job: told to the supervisor before the process ends",
    "blixard.backends.sandbox.namespaces:_run_init": "the edge of a job: told to the supervisor before the process ends",
    "blixard.backends.wasm.zygote:_become_executor": "the edge of a process: the traceback is printed, the exit code tells",
    "blixard.backends.zygote.supervisor:_become_runner": "the edge of a job: told to the supervisor before the process ends",
    "blixard.backends.zygote.supervisor:_call_entry": "the edge of a job: the traceback is printed, the exit code tells",
    "blixard.cli.checks:_check_backends": "the edge of one check of `doctor`: what it met is its answer",
    "blixard.cli.checks:_guarded": "the edge of one check of `doctor`: what it met is its answer",
    "blixard.cli.checks:_judge": "the edge of one check of `doctor`: what it met is its answer",
    "blixard.cli.main:run_command_line": "the edge of a command: told to the user, exit code 125",
    "blixard.sdk.executor:_run": "the edge of a thread: told to every future that waits",
    "blixard.sdk.executor:_succeed": "the edge of a job: its result's class may refuse to be read; told to the future",
    "blixard.sdk.mapping:work": "the edge of a background task: raised where results are taken",
    "blixard.sdk.values:_serialises": "asks only whether it works: any class may refuse in its own way",
    "blixard.sdk.waiting:watch": "the edge of a background task: raised where ends are taken",
    "blixard.storage.hiqlite.lane:_carry": "answered to everybody whose call was in the batch",
    "blixard.storage.reader:_run": "answered to the caller on another thread",
    "blixard.storage.writer:_apply_all": "answered to the owner of the operation, so that one bad row fails only its owner",
    "blixard.storage.writer:_commit_batch": "answered to everybody whose operation was in the batch",
    "blixard.storage.writer:_run": "the edge of a thread: answered to all who wait",
    "blixard.vm.guest.runner:become_runner": "the edge of a job: its stderr shows the traceback, the exit code tells",
    "blixard.worker.attempt_runner:begin": "the edge of a job: becomes its outcome",
    "blixard.worker.attempt_runner:_run": "the edge of a job: becomes its outcome",
    "blixard.vm.coordinator:_run": "the edge of the VM layer: its machines are ended, and every call says why",
    "blixard.vm.image_source:work": "the edge of a thread: whoever waits for the image gets what it met",
    "blixard.vm.pool:_live": "the edge of one machine: told to the job that wanted it",
    "blixard.vm.templates:_fill": "the edge of one template: those who wait for it get the error",
}
"""``module:function`` -> why it may catch everything: the edge of a job, a request or a maintenance pass."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def lines_matching(paths: list[Path], pattern: re.Pattern[str]) -> list[str]:
    me = Path(__file__)
    return [
        f"{place(path, number)}: {line.strip()}"
        for path in paths
        if path != me
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_function_is_longer_than_70_lines() -> None:
    long = [
        f"{place(path, node.lineno)} {node.name}: {length(node)} lines"
        for path in EVERYTHING
        for node in functions(path)
        if length(node) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_half_of_the_functions_are_within_9_lines() -> None:
    assert statistics.median(length(node) for path in SOURCES for node in functions(path)) <= MEDIAN_FUNCTION_LINES


def test_no_module_is_longer_than_700_lines() -> None:
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {path: count for path, count in counts.items() if count > MAX_MODULE_LINES} == {}


def test_every_test_runs_everywhere() -> None:
    assert lines_matching(TESTS, SKIPPED) == []


def test_nothing_is_left_undone() -> None:
    assert lines_matching(EVERYTHING, UNDONE) == []


def test_no_check_is_hushed_without_a_reason_beside_it() -> None:
    bare = [
        line
        for line in lines_matching(EVERYTHING, HUSHED)
        if not any(match["reason"].strip() for match in HUSHED.finditer(line))
    ]
    assert bare == []


def sleeps(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield every sleep but the short ones in the body of a ``while``, which look for something that nothing announces."""
    looks = {id(child) for node in ast.walk(tree) if isinstance(node, ast.While) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SLEEPERS:
            length = ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else LONGEST_LOOK + 1
            if length > (LONGEST_LOOK if id(node) in looks else 0):
                yield node


def test_tests_wait_for_events_instead_of_sleeping() -> None:
    """A line that must sleep says why: ``# sleep: …``. Source text of jobs is not looked into."""
    sleeping = []
    for path in TESTS:
        rows = path.read_text().splitlines()
        lines = [node.lineno for node in sleeps(ast.parse("\n".join(rows)))]
        sleeping += [place(path, line) for line in lines if "# sleep: " not in rows[line - 1]]
    assert sleeping == []


def broad_excepts(path: Path) -> Iterator[str]:
    """Yield ``module:function`` of every handler that catches everything; the innermost function counts."""
    module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    tree = ast.parse(path.read_text())
    owners = {
        child: node
        for node in ast.walk(tree)
        for child in ast.walk(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _passes_on(node):
            owner = owners.get(node)
            yield f"{module}:{owner.name if owner else ''}"


def _is_broad(kind: ast.expr | None) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(name is None or ast.unparse(name) in {"Exception", "BaseException"} for name in names)


def _passes_on(handler: ast.ExceptHandler) -> bool:
    """Say whether the handler ends by raising what it caught, or a translation of it."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and (last.exc is None or last.cause is not None)


def test_everything_is_caught_only_at_the_edges() -> None:
    found = {where for path in SOURCES for where in broad_excepts(path)}
    assert found - set(BROAD_EXCEPTS) == set(), "catch what you expect, or argue for it in BROAD_EXCEPTS"
    assert set(BROAD_EXCEPTS) - found == set(), "these are gone: take them out of BROAD_EXCEPTS"


def drawn_tree() -> dict[str, str]:
    """Return child -> parent as the docstring of errors.py draws it."""
    parents: list[str] = []
    tree: dict[str, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"(?P<indent>[│├└─ ]*)(?P<names>[A-Z]\w+(?:, [A-Z]\w+)*)(?: {2,}|$)", line)
        if match is None or (not match["indent"] and match["names"] != "BlixardError"):
            continue
        depth = len(match["indent"]) // 4
        assert depth <= len(parents), f"nothing stands above this line: {line}"
        for name in match["names"].split(", "):
            if depth:
                tree[name] = parents[depth - 1]
        parents[depth:] = [match["names"]]
    return tree


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    real = {
        name: kind.__base__.__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind is not errors.BlixardError and kind.__base__ is not None
    }
    assert drawn_tree() == real


def test_every_error_has_its_own_code() -> None:
    codes = [
        kind.code for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.BlixardError)
    ]
    assert len(set(codes)) == len(codes) > 1


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "\n__all__ = " in path.read_text()], ids=lambda path: path.parent.name
)
def test_public_names_stand_in_one_sorted_list(path: Path) -> None:
    lists = [
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert lists == [sorted(set(lists[0]))]


def test_every_sql_statement_is_used() -> None:
    source = "\n".join(path.read_text() for path in SOURCES)
    names = [name for path in (ROOT / "src").rglob("*.sql") for name in STATEMENT_NAME.findall(path.read_text())]
    assert [name for name in names if f'"{name}"' not in source] == []
    assert len(names) == len(set(names)) > 0


def reads(source: str, section: str, name: str) -> bool:
    """Say whether a module reads a setting: as ``….section.name``, or as ``….name`` where it holds ``settings.section``."""
    whole = re.search(rf"\b{section}\.{name}\b", source)
    held = re.search(rf"settings\.{section}\b(?!\.)", source) and re.search(rf"\.{name}\b", source)
    return bool(whole or held)


def test_every_setting_is_used() -> None:
    users = [path.read_text() for path in SOURCES if "config" not in path.relative_to(ROOT / "src/blixard").parts[:1]]
    unused = [key for key in all_keys() if not any(reads(source, *key.split(".")) for source in users)]
    assert unused == []


def test_imports_point_one_way() -> None:
    """The table of docs/architecture.md, as contracts in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_changelog_fragments_are_well_formed() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/changelog", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
