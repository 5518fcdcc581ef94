"""Which files travel: all that a script can import from beside it, and nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from blixard.bundling.imports import find_files
from blixard.errors import InvalidRequest


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root.resolve()


def _found(root: Path, entry: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files(root, root / entry)]


PACKAGE = {
    "pkg/__init__.py": "",
    "pkg/a.py": "",
    "pkg/b.py": "",
    "pkg/sub/__init__.py": "",
    "pkg/sub/c.py": "",
    "other.py": "",
    "not_imported.py": "",
    "space/plain.py": "",
    ".secret.py": "",
    "data.txt": "",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("import os, json, requests", []),
        ("import other", ["other.py"]),
        ("import other as x", ["other.py"]),
        ("import pkg", ["pkg/__init__.py"]),
        ("import pkg.a", ["pkg/__init__.py", "pkg/a.py"]),
        ("import pkg.sub.c", ["pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/c.py"]),
        ("from pkg import a", ["pkg/__init__.py", "pkg/a.py"]),
        ("from pkg import a, b as z", ["pkg/__init__.py", "pkg/a.py", "pkg/b.py"]),
        ("from pkg import some_function", ["pkg/__init__.py"]),
        ("from pkg.a import function", ["pkg/__init__.py", "pkg/a.py"]),
        ("from pkg.sub import c", ["pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/c.py"]),
        ("import space.plain", ["space/plain.py"]),
        ("from space import plain", ["space/plain.py"]),
        ("def f():\n    import other", ["other.py"]),
        ("try:\n    import missing\nexcept ImportError:\n    import other", ["other.py"]),
        ("if False:\n    from pkg import a", ["pkg/__init__.py", "pkg/a.py"]),
        (
            "class C:\n    async def f(self):\n        from pkg.sub import c",
            ["pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/c.py"],
        ),
        ("import importlib\nimportlib.import_module('pkg.b')", ["pkg/__init__.py", "pkg/b.py"]),
        ("__import__('other')", ["other.py"]),
        ("import importlib\nimportlib.import_module('../../etc/passwd')", []),
        ("import importlib\nimportlib.import_module('/etc/passwd')", []),
        ("from ..... import os", []),
    ],
)
def test_imports_of_every_form_are_found(tmp_path: Path, text: str, expected: list[str]) -> None:
    root = _write(tmp_path, {**PACKAGE, "main.py": text})
    assert _found(root, "main.py") == sorted(["main.py", *expected])


def test_imports_are_followed_through_other_files_and_cycles(tmp_path: Path) -> None:
    root = _write(
        tmp_path, {"main.py": "import a", "a.py": "import b", "b.py": "import a\nfrom c import x", "c.py": ""}
    )
    assert _found(root, "main.py") == ["a.py", "b.py", "c.py", "main.py"]


def test_relative_imports_within_a_package_are_found(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "pkg/__init__.py": "from .a import x",
            "pkg/a.py": "from . import b",
            "pkg/b.py": "from .sub import c",
            "pkg/unused.py": "",
            "pkg/sub/__init__.py": "",
            "pkg/sub/c.py": "from ..d import y",
            "pkg/d.py": "",
        },
    )
    assert _found(root, "pkg/a.py") == [
        "pkg/__init__.py", "pkg/a.py", "pkg/b.py", "pkg/d.py", "pkg/sub/__init__.py", "pkg/sub/c.py",
    ]  # fmt: skip


def test_a_star_import_takes_the_modules_that_all_names(tmp_path: Path) -> None:
    root = _write(tmp_path, {**PACKAGE, "pkg/__init__.py": "__all__ = ['a', 'VALUE']", "main.py": "from pkg import *"})
    assert _found(root, "main.py") == ["main.py", "pkg/__init__.py", "pkg/a.py"]


def test_a_package_wins_over_a_module_and_a_module_over_a_plain_directory(tmp_path: Path) -> None:
    root = _write(tmp_path, {"main.py": "import x, y", "x.py": "", "x/__init__.py": "", "y.py": "", "y/z.py": ""})
    assert _found(root, "main.py") == ["main.py", "x/__init__.py", "y.py"]


def test_a_compiled_module_travels_too(tmp_path: Path) -> None:
    root = _write(tmp_path, {"main.py": "import fast", "fast.abi3.so": "ELF"})
    assert _found(root, "main.py") == ["fast.abi3.so", "main.py"]


def test_blixard_itself_is_never_shipped(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {"main.py": "import blixard\nfrom blixard.sdk import App", "blixard/__init__.py": "", "blixard/sdk.py": ""},
    )
    assert _found(root, "main.py") == ["main.py"]


def test_a_link_out_of_the_root_is_refused_and_one_within_is_followed(tmp_path: Path) -> None:
    root = _write(tmp_path / "root", {"main.py": "import inner", "real/code.py": ""})
    (root / "inner.py").symlink_to(root / "real/code.py")
    assert _found(root, "main.py") == ["inner.py", "main.py"]
    (tmp_path / "outside.py").write_text("password = 1")
    (root / "inner.py").unlink()
    (root / "inner.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(InvalidRequest, match=r"link to .*outside\.py") as caught:
        _found(root, "main.py")
    assert caught.value.hint


def test_a_linked_directory_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root = _write(tmp_path / "root", {"main.py": "import lib.x"})
    outside = _write(tmp_path / "elsewhere", {"x.py": ""})
    (root / "lib").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="outside of"):
        _found(root, "main.py")


def test_a_syntax_error_names_file_and_line_in_the_entry_and_is_left_to_the_job_elsewhere(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "main.py": "x = 1\nif:\n",
            "ok.py": "try:\n    import old\nexcept SyntaxError:\n    pass",
            "old.py": "print 1",
        },
    )
    assert _found(root, "ok.py") == ["ok.py", "old.py"]
    with pytest.raises(InvalidRequest, match=r"main\.py, line 2: invalid syntax"):
        _found(root, "main.py")
    (root / "main.py").write_bytes(b"x = 1\0")
    with pytest.raises(InvalidRequest, match=r"main\.py"):
        _found(root, "main.py")
