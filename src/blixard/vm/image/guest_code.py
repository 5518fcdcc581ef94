"""Our own code inside the guest: the modules of this package that the agent imports, found by reading their imports."""

from __future__ import annotations

import ast
from pathlib import Path

import blixard
from blixard.errors import InternalError
from blixard.vm.image.cpio import Entry

AGENT = "blixard.vm.guest.agent"
STARTED_BY_NAME = ("blixard.backends.wasm.zygote",)
"""Modules that are started as programs: nothing imports them."""
LIBRARY = "guest/lib"
"""Where the initrd has it; init moves it to /opt/blixard/lib."""


def find_guest_code() -> tuple[Entry, ...]:
    """Return the files of the guest's library as they go into the initrd, in order of their paths."""
    package = Path(blixard.__file__).parent
    guest = package / "vm/guest"
    found: dict[str, Path] = {}
    for path in sorted(guest.rglob("*.py")):
        _follow(_name_of(path, package), package, found)
    for module in STARTED_BY_NAME:
        _follow(module, package, found)
    files = [Entry(f"{LIBRARY}/{path.relative_to(package.parent)}", path.read_bytes()) for path in found.values()]
    files.append(Entry(f"{LIBRARY}/start_agent.py", (guest / "init_agent.py").read_bytes()))
    return tuple(sorted(files, key=lambda entry: entry.path))


def init_script() -> bytes:
    return (Path(blixard.__file__).parent / "vm/guest/init.sh").read_bytes()


def _name_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _follow(module: str, package: Path, found: dict[str, Path]) -> None:
    if module in found:
        return
    path = _locate(module, package)
    if path is None:
        return
    found[module] = path
    if "." in module:
        _follow(module.rpartition(".")[0], package, found)
    for name in _imports(path):
        _follow(name, package, found)


def _locate(module: str, package: Path) -> Path | None:
    base = package.parent.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _imports(path: Path) -> list[str]:
    """Return what of this package a module imports when it runs, anywhere in it; what only type checkers read is left out."""
    names: list[str] = []
    for node in _nodes_that_run(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise InternalError(f"{path} imports relatively; the guest's library cannot be gathered")
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == "blixard"]


def _nodes_that_run(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return [inner for child in node.orelse for inner in _nodes_that_run(child)]
    return [node, *(inner for child in ast.iter_child_nodes(node) for inner in _nodes_that_run(child))]
