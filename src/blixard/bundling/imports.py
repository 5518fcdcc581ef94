"""Which files a Python file needs: its imports, and theirs, as far as they lie under one root directory."""

from __future__ import annotations

import ast
import importlib.machinery
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blixard.errors import InvalidRequest

_SUFFIXES = (*importlib.machinery.EXTENSION_SUFFIXES, *importlib.machinery.SOURCE_SUFFIXES)
_OURS = "blixard"
"""Every worker has it: it is never shipped, not even from a checkout."""


class Import(msgspec.Struct, frozen=True):
    """``from module import names`` with ``level`` leading dots; ``import module`` has no names."""

    module: str
    names: tuple[str, ...] = ()
    level: int = 0


def find_files(root: Path, entry: Path) -> list[Path]:
    """Return ``entry`` and all files under ``root`` that it imports, directly or through others, sorted.

    Both must be resolved paths. Counts as an import: every import statement wherever it stands (also in a branch or a
    function), and ``import_module`` or ``__import__`` of a literal name. What is not under the root is the worker's
    environment's. Nothing is executed. Raises ``InvalidRequest`` if the entry is not Python, or for a link out of the root.
    """
    search = _Search(root)
    search.add(entry)
    for directory in entry.parents:
        if directory == root:
            break
        search.add_package(directory)
    while search.waiting:
        path = search.waiting.pop()
        for found in _imports_of(path, is_entry=path == entry):
            search.follow(path, found)
    return sorted(search.found)


class _Search:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: set[Path] = set()
        self.waiting: list[Path] = []

    def add(self, path: Path) -> None:
        if path in self.found:
            return
        check_inside(self.root, path)
        self.found.add(path)
        if path.suffix == ".py":
            self.waiting.append(path)

    def follow(self, importer: Path, item: Import) -> None:
        base = self._base(importer, item)
        if base is None:
            return
        module = self._walk(base, item.module.split(".") if item.module else [])
        if module is None:
            return
        names = _exported(module / "__init__.py") if "*" in item.names else item.names
        for name in names:
            self._walk(module, [name])

    def _base(self, importer: Path, item: Import) -> Path | None:
        """Return the directory where the first part of the name is looked up; None if that is outside of the root."""
        if item.level == 0:
            return None if item.module.partition(".")[0] == _OURS else self.root
        directory = importer.parent
        for _ in range(item.level - 1):
            directory = directory.parent
        return directory if directory.is_relative_to(self.root) else None

    def _walk(self, directory: Path, parts: list[str]) -> Path | None:
        """Add the module ``parts`` and its packages; return the directory of a package, None for a module or nothing."""
        self.add_package(directory)
        for part in parts:
            if not part.isidentifier():
                return None
            package = directory / part
            if not (package / "__init__.py").is_file() and (module := _module_file(directory, part)):
                self.add(module)
                return None
            if not package.is_dir():
                return None
            directory = package
            self.add_package(directory)
        return directory

    def add_package(self, directory: Path) -> None:
        if directory != self.root and (directory / "__init__.py").is_file():
            self.add(directory / "__init__.py")


def _module_file(directory: Path, name: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := directory / f"{name}{suffix}").is_file()), None)


def check_inside(root: Path, path: Path) -> None:
    """Raise ``InvalidRequest`` if ``path`` is a link that leads out of ``root``."""
    if not path.resolve().is_relative_to(root):
        raise InvalidRequest(
            f"{path} is a link to {path.resolve()}, which is outside of {root}",
            field="bundle",
            hint="copy the file there, or install it as a package in the worker's environment",
        )


def parse(path: Path) -> ast.Module:
    """Return the syntax tree. Raises ``InvalidRequest`` with file and line if it is not Python."""
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise InvalidRequest(f"{path}, line {error.lineno}: {error.msg}", field="file", hint="fix the file") from error
    except ValueError as error:  # null bytes
        raise InvalidRequest(f"{path} is not Python source: {error}", field="file") from error


def _imports_of(path: Path, *, is_entry: bool) -> list[Import]:
    try:
        tree = parse(path)
    except InvalidRequest:
        # An imported file that is no Python may stand in a branch that is never taken; the entry never can.
        if is_entry:
            raise
        return []
    return [found for node in ast.walk(tree) for found in _imports_in(node)]


def _imports_in(node: ast.AST) -> Iterator[Import]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield Import(alias.name)
        case ast.ImportFrom(module=module, names=names, level=level):
            yield Import(module or "", tuple(alias.name for alias in names), level)
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ) if name.strip("."):
            yield Import(name.lstrip("."), level=len(name) - len(name.lstrip(".")))


def _exported(package: Path) -> tuple[str, ...]:
    """Return the names of a literal ``__all__``: what a star import takes, which may be modules."""
    if not package.is_file():
        return ()
    try:
        body = parse(package).body
    except InvalidRequest:
        return ()
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=items) | ast.Tuple(elts=items)):
                return tuple(item.value for item in items if isinstance(item, ast.Constant) and type(item.value) is str)
    return ()
