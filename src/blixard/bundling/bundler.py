"""From what a user names (a function, a script, ``FILE.py:FUNCTION``) to what a job carries."""

from __future__ import annotations

import ast
import difflib
import os
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from blixard.bundling.archive import Bundle, archive_digest, check_sizes, pack
from blixard.bundling.imports import check_inside, find_files, parse
from blixard.errors import InvalidRequest

MAX_CACHED_BUNDLES = 16
"""Each may hold ``MAX_BUNDLE_BYTES``."""
INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_Stamp = tuple[tuple[str, int, int], ...]


class FunctionCode(msgspec.Struct, frozen=True, kw_only=True):
    """``function`` is ``module:qualname``. No bundle: the function is part of an installed package."""

    function: str
    bundle: Bundle | None


class ScriptCode(msgspec.Struct, frozen=True, kw_only=True):
    """``path`` of the script within the bundle."""

    path: str
    bundle: Bundle


class Bundler:
    """Makes bundles, and remembers them until a file in them changes its size or time.

    ``include`` names data files and directories that travel along: relative to the root of the code or absolute, under
    that root, without dotfiles. The root is the script's directory, or the directory that holds the module's top package.
    No code of the user's is executed. All methods raise ``InvalidRequest`` that says what to do, and ``LimitExceeded``.
    """

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple[Path, Path, tuple[str, ...]], tuple[_Stamp, Bundle]] = OrderedDict()

    def bundle_function(
        self, function: Callable[..., object], *, include: Sequence[str | os.PathLike[str]] = ()
    ) -> FunctionCode:
        """Take a function that was imported or that the running script defines at its top level."""
        module, qualname = _name_function(function)
        path = _file_of_module(module, qualname)
        if path is None or _is_installed(path):
            return FunctionCode(function=f"{module}:{qualname}", bundle=None)
        name = _real_main_name() if module == "__main__" else module
        return self._bundle_named(path.resolve(), qualname, name, include)

    def bundle_reference(self, reference: str, *, include: Sequence[str | os.PathLike[str]] = ()) -> FunctionCode:
        """Take ``FILE.py:FUNCTION``; the file's source must define the function at its top level."""
        file, _, qualname = reference.rpartition(":")
        if not file.endswith(".py") or not qualname:
            raise InvalidRequest(
                f"{reference!r} is not of the form FILE.py:FUNCTION",
                field="function",
                hint="for example facts.py:measure",
            )
        path = _existing(file)
        _check_defined(path, qualname)
        return self._bundle_named(path, qualname, None, include)

    def bundle_script(
        self, path: str | os.PathLike[str], *, include: Sequence[str | os.PathLike[str]] = ()
    ) -> ScriptCode:
        """Take a script that will run as ``__main__``."""
        entry = _existing(path)
        return ScriptCode(path=entry.name, bundle=self._bundle(entry.parent, entry, include))

    def _bundle_named(
        self, path: Path, qualname: str, module: str | None, include: Sequence[str | os.PathLike[str]]
    ) -> FunctionCode:
        # A module that was loaded under another name than its file's cannot be found again under that name.
        name = module if module and _is_name_of(module, path) else module_name(path)
        root = _root_of(path, name)
        _check_module_name(name, path)
        return FunctionCode(function=f"{name}:{qualname}", bundle=self._bundle(root, path, include))

    def _bundle(self, root: Path, entry: Path, include: Sequence[str | os.PathLike[str]]) -> Bundle:
        key = (root, entry, tuple(sorted(os.fspath(item) for item in include)))
        if (known := self._cache.get(key)) and known[0] == _stamp(root, known[1].files):
            self._cache.move_to_end(key)
            return known[1]
        paths = {*find_files(root, entry), *(path for item in include for path in _data_files(root, Path(item)))}
        files = tuple(sorted(path.relative_to(root).as_posix() for path in paths))
        stamp = _stamp(root, files)
        bundle = _read_bundle(root, files)
        self._cache[key] = (stamp, bundle)
        while len(self._cache) > MAX_CACHED_BUNDLES:
            self._cache.popitem(last=False)
        return bundle


def _read_bundle(root: Path, files: tuple[str, ...]) -> Bundle:
    try:
        check_sizes({file: (root / file).stat().st_size for file in files})
        archive = pack({file: (root / file).read_bytes() for file in files})
    except OSError as error:
        raise InvalidRequest(f"cannot read {error.filename}: {error.strerror}", field="bundle") from error
    return Bundle(archive=archive, digest=archive_digest(archive), root=root, files=files)


def _stamp(root: Path, files: tuple[str, ...]) -> _Stamp:
    """Return what changes when a file does; a missing file is a change as well."""
    return tuple((file, *_size_and_time(root / file)) for file in files)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _existing(path: str | os.PathLike[str]) -> Path:
    """Return the real path, as Python takes a script's directory: links to the file itself are followed."""
    given = Path(path)
    if given.is_dir():
        raise InvalidRequest(f"{given} is a directory, not a Python file", field="file")
    if not given.is_file():
        raise InvalidRequest(f"there is no file {given}", field="file", hint=_similar_file(given))
    return given.resolve()


def _similar_file(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def module_name(path: Path) -> str:
    """Return the dotted name under which the file is imported: packages count from the topmost ``__init__.py``."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    directory = path.parent
    while (directory / "__init__.py").is_file() and directory.name.isidentifier():
        parts.insert(0, directory.name)
        directory = directory.parent
    return ".".join(parts)


def _is_name_of(module: str, path: Path) -> bool:
    parts = tuple(module.split("."))
    return parts == (path.parts[-len(parts) - 1 : -1] if path.name == "__init__.py" else _parts(path)[-len(parts) :])


def _parts(path: Path) -> tuple[str, ...]:
    return path.with_suffix("").parts


def _root_of(path: Path, module: str) -> Path:
    depth = module.count(".") + (1 if path.name == "__init__.py" else 0)
    return path.parents[depth]


def _check_module_name(name: str, path: Path) -> None:
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise InvalidRequest(
            f"{path.name} cannot be imported: {path.stem!r} is not a Python name",
            field="function",
            hint=f"rename it, for example to {''.join(c if c.isalnum() else '_' for c in path.stem)}.py",
        )
    if name.partition(".")[0] in sys.stdlib_module_names:
        raise InvalidRequest(
            f"{path.name} has the name of the standard library's module {name.partition('.')[0]!r} and would hide it",
            field="function",
            hint="rename the file",
        )


def _data_files(root: Path, item: Path) -> Iterator[Path]:
    path = Path(os.path.normpath(root / item))
    if not path.is_relative_to(root):
        raise InvalidRequest(
            f"{item} is not under {root}", field="include", hint="use an input file for data from elsewhere"
        )
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        raise InvalidRequest(f"{item} is a dotfile; bundles never hold one", field="include")
    if not path.exists():
        raise InvalidRequest(f"there is no file {path} to include", field="include")
    check_inside(root, path)
    if path.is_dir():
        yield from _walk_data(root, path)
    else:
        yield path


def _walk_data(root: Path, directory: Path) -> Iterator[Path]:
    # os.walk does not enter linked directories, so it ends and stays inside.
    for parent, directories, names in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name != "__pycache__")
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                check_inside(root, path)
                yield path


def _name_function(function: Callable[..., object]) -> tuple[str, str]:
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        raise InvalidRequest(
            f"{function!r} is no function with a name",
            field="function",
            hint="write a function with `def` at the top level of a file",
        )
    if "<lambda>" in qualname:
        raise InvalidRequest(
            "a lambda has no name by which a worker could find it", field="function", hint="give it one with `def`"
        )
    if "<locals>" in qualname:
        raise InvalidRequest(
            f"{qualname.replace('.<locals>.', ' → ')} is defined inside of a function, where a worker cannot find it",
            field="function",
            hint="move it to the top level of its file and pass what it needs as arguments",
        )
    return module, qualname


def _file_of_module(module: str, qualname: str) -> Path | None:
    """Return the module's source file; None if it has none because it is built in or compiled."""
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if (file is None and (module == "__main__" or loaded is None)) or (file or "").startswith("<"):
        raise InvalidRequest(
            f"{qualname} was typed into an interactive session and has no file that a worker could load",
            field="function",
            hint="put it into a file (my_jobs.py) and import it from there",
        )
    if file is None or not file.endswith(".py"):
        if module == "__main__":
            raise InvalidRequest(
                f"{qualname} is defined in {file}, which is not a .py file", field="function", hint="rename the script"
            )
        return None
    if not Path(file).is_file():
        raise InvalidRequest(
            f"{qualname} has no file that a worker could load: {file} is not there",
            field="function",
            hint="put it into a file (my_jobs.py) and import it from there",
        )
    return Path(file)


def _real_main_name() -> str | None:
    """Return the name of ``__main__`` if it was started as ``python -m package.module``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else None


def _is_installed(path: Path) -> bool:
    real = path.resolve()
    # Debian's own packages are in no path that sysconfig tells.
    return "dist-packages" in real.parts or any(real.is_relative_to(directory) for directory in INSTALLED)


def _check_defined(path: Path, qualname: str) -> None:
    names = set(_top_level_names(parse(path).body))
    first = qualname.partition(".")[0]
    if first in names or "*" in names:
        return
    close = difflib.get_close_matches(first, names, n=1)
    hint = (
        f"did you mean {path.name}:{close[0]}?" if close else "functions must be defined at the top level of the file"
    )
    raise InvalidRequest(f"{path} has no function {first!r}", field="function", hint=hint)


def _top_level_names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield every name that these statements may bind, ``*`` for a star import; branches count."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name.split(".")[0]) for alias in names)
            case ast.Assign() | ast.AnnAssign():
                yield from (item.id for item in ast.walk(node) if _is_stored_name(item) and isinstance(item, ast.Name))
            case _:
                for field in ("body", "orelse", "finalbody"):
                    yield from _top_level_names(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    yield from _top_level_names(handler.body)


def _is_stored_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
