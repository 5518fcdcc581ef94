"""Our own code inside the guest: the modules of this package that the agent imports, found by reading their imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import blixard
from blixard.errors import InternalError
from blixard.vm.image.cpio import Entry

AGENT = "blixard.vm.guest.agent"
IMPORTED_BY_JOBS = (
    *("blixard.sdk.app", "blixard.sdk.collecting", "blixard.sdk.executor"),
    *("blixard.client.blocking", "blixard.client.opening"),
)
"""A job's module imports what submits it, too, but there is nowhere to submit to: what only its functions import is left out."""
LIBRARY = "guest/lib"
"""Where the initrd has it; init moves it to /opt/blixard/lib."""


def find_guest_code() -> tuple[Entry, ...]:
    """Return the files of the guest's library as they go into the initrd, in order of their paths."""
    package = Path(blixard.__file__).parent
    guest = package / "vm/guest"
    gathered = _Gathered(package)
    for path in sorted(guest.rglob("*.py")):
        gathered.follow(_name_of(path, package), inside_functions=True)
    for module in IMPORTED_BY_JOBS:
        gathered.follow(module, inside_functions=False)
    files = [Entry(f"{LIBRARY}/{path.relative_to(package.parent)}", path.read_bytes()) for path in gathered.paths()]
    files.append(Entry(f"{LIBRARY}/start_agent.py", (guest / "init_agent.py").read_bytes()))
    return tuple(sorted(files, key=lambda entry: entry.path))


def init_script() -> bytes:
    return (Path(blixard.__file__).parent / "vm/guest/init.sh").read_bytes()


def _name_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Gathered:
    """Modules of ``package`` and where they are."""

    def __init__(self, package: Path) -> None:
        self._package = package
        self._found: dict[str, Path] = {}

    def paths(self) -> list[Path]:
        return list(self._found.values())

    def follow(self, module: str, *, inside_functions: bool) -> None:
        """Add ``module``, what it lies in and what it imports, with or without what it imports only when a function runs."""
        path = None if module in self._found else _locate(module, self._package)
        if path is None:
            return
        self._found[module] = path
        if "." in module:
            self.follow(module.rpartition(".")[0], inside_functions=inside_functions)
        for name in _imports(path, inside_functions):
            self.follow(name, inside_functions=inside_functions)


def _locate(module: str, package: Path) -> Path | None:
    base = package.parent.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None  # a name out of a module


def _imports(path: Path, inside_functions: bool) -> list[str]:
    """Return what of this package a module imports; what only type checkers read is left out."""
    names: list[str] = []
    for node in _nodes_that_run(ast.parse(path.read_bytes(), str(path)), inside_functions):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise InternalError(f"{path} imports relatively; the guest's library cannot be gathered")
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == "blixard"]


def _nodes_that_run(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
        return
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _nodes_that_run(child, inside_functions)
