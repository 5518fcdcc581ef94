"""From a function, a script or FILE.py:FUNCTION to a bundle; and what to do when there is none."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blixard.bundling import Bundler, bundler, unpack
from blixard.domain.limits import MAX_BUNDLE_BYTES
from blixard.errors import InvalidRequest, LimitExceeded


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root.resolve()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return _write(
        tmp_path / "project",
        {
            "facts.py": "import helper\nfrom sys import path as where\nVALUE = 1\n"
            "def measure(path):\n    return helper.size(path)\n"
            "class Tool:\n    @staticmethod\n    def use():\n        return 7\n"
            "if VALUE:\n    def late():\n        return 3\nelse:\n    async def other():\n        return 4\n",
            "helper.py": "def size(path):\n    return len(path)\n",
            "unrelated.py": "",
            ".env": "SECRET=1",
            "data/words.txt": "a b",
            "data/.hidden": "x",
        },
    )


@pytest.fixture
def importable(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(project))
    before = set(sys.modules)
    yield project
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["measure", "late", "other", "Tool", "Tool.use", "VALUE", "where"])
def test_a_reference_names_a_function_of_a_file(project: Path, name: str) -> None:
    code = Bundler().bundle_reference(f"{project}/facts.py:{name}")
    assert code.function == f"facts:{name}"
    assert code.bundle is not None
    assert code.bundle.files == ("facts.py", "helper.py")
    assert code.bundle.root == project


def test_a_file_within_packages_is_named_from_the_topmost(project: Path) -> None:
    _write(
        project,
        {
            "src/pkg/__init__.py": "",
            "src/pkg/sub/__init__.py": "",
            "src/pkg/sub/m.py": "def f(): ...",
            "src/loose.py": "",
        },
    )
    code = Bundler().bundle_reference(f"{project}/src/pkg/sub/m.py:f")
    assert code.function == "pkg.sub.m:f"
    assert code.bundle is not None
    assert code.bundle.files == ("pkg/__init__.py", "pkg/sub/__init__.py", "pkg/sub/m.py")


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("facts.py:mesure", "has no function 'mesure'", "did you mean facts.py:measure?"),
        ("facts.py:zzz", "has no function 'zzz'", "top level"),
        ("fact.py:measure", "there is no file", "facts.py"),
        ("facts.py", "FILE.py:FUNCTION", "facts.py:measure"),
        ("facts.py:", "FILE.py:FUNCTION", "facts.py:measure"),
        ("data:measure", "FILE.py:FUNCTION", "facts.py:measure"),
    ],
)
def test_a_wrong_reference_says_what_is_right(project: Path, reference: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Bundler().bundle_reference(f"{project}/{reference}")
    assert hint in (caught.value.hint or "")


def test_a_file_that_cannot_be_imported_is_refused(project: Path) -> None:
    _write(project, {"my-facts.py": "def f(): ...", "json.py": "def f(): ...", "broken.py": "def f(:"})
    for name, message in (
        ("my-facts.py", "not a Python name"),
        ("json.py", "standard library"),
        ("broken.py", "line 1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            Bundler().bundle_reference(f"{project}/{name}:f")


def test_a_script_may_have_any_name_and_takes_its_imports(project: Path) -> None:
    _write(project, {"my-script.py": "import helper"})
    code = Bundler().bundle_script(project / "my-script.py")
    assert code.path == "my-script.py"
    assert code.bundle.files == ("helper.py", "my-script.py")
    assert all(".env" not in name for name in code.bundle.files)


def test_a_linked_script_is_taken_from_where_it_really_is(project: Path, tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to(project / "facts.py")
    code = Bundler().bundle_script(tmp_path / "link.py")
    assert (code.path, code.bundle.files) == ("facts.py", ("facts.py", "helper.py"))


@pytest.mark.parametrize(("path", "message"), [("missing.py", "there is no file"), ("data", "is a directory")])
def test_a_script_that_is_none_is_refused(project: Path, path: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Bundler().bundle_script(project / path)


def test_an_imported_function_is_bundled_under_its_module(importable: Path) -> None:
    facts = importlib.import_module("facts")
    code = Bundler().bundle_function(facts.measure)
    assert code.function == "facts:measure"
    assert code.bundle is not None
    assert code.bundle.files == ("facts.py", "helper.py")
    assert code.bundle.digest == _digest_of_reference(importable)
    assert Bundler().bundle_function(facts.Tool.use).function == "facts:Tool.use"


def _digest_of_reference(project: Path) -> str:
    bundle = Bundler().bundle_reference(f"{project}/facts.py:measure").bundle
    assert bundle is not None
    return bundle.digest


def test_the_same_code_elsewhere_has_the_same_digest(project: Path, tmp_path: Path) -> None:
    copy = _write(tmp_path / "copy", {name: (project / name).read_text() for name in ("facts.py", "helper.py")})
    os.utime(copy / "facts.py", (1, 1))
    assert _digest_of_reference(copy) == _digest_of_reference(project)


def test_the_bundle_runs_where_nothing_else_is(project: Path, tmp_path: Path) -> None:
    code = Bundler().bundle_reference(f"{project}/facts.py:measure")
    assert code.bundle is not None
    unpack(code.bundle.archive, tmp_path / "code")
    out = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'code')!r})\nimport facts; print(facts.measure('abc'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout == "3\n"


MAIN = """
import json
from blixard.bundling import Bundler
import helper

def work(path):
    return helper.size(path)

def outer():
    def inner(): ...
    return inner

if __name__ == "__main__":
    code = Bundler().bundle_function(work)
    print(json.dumps([code.function, code.bundle.files]))
"""


def test_a_function_of_the_running_script_is_named_after_its_file(project: Path) -> None:
    _write(project, {"job_script.py": MAIN})
    out = subprocess.run([sys.executable, "job_script.py"], cwd=project, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == ["job_script:work", ["helper.py", "job_script.py"]]


def test_a_function_of_a_module_run_with_m_keeps_its_dotted_name(project: Path) -> None:
    _write(
        project,
        {
            "pkg/__init__.py": "",
            "pkg/cmd.py": MAIN.replace("import helper", "from . import helper"),
            "pkg/helper.py": "",
        },
    )
    out = subprocess.run([sys.executable, "-m", "pkg.cmd"], cwd=project, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == ["pkg.cmd:work", ["pkg/__init__.py", "pkg/cmd.py", "pkg/helper.py"]]


def test_a_function_typed_into_a_session_says_what_to_do(project: Path) -> None:
    program = """
from blixard.bundling import Bundler
def f(): ...
try:
    Bundler().bundle_function(f)
except Exception as e:
    print(type(e).__name__, e, e.hint)
"""
    for args in (["-c", program], ["-"]):
        out = subprocess.run(
            [sys.executable, *args], input=program, cwd=project, capture_output=True, text=True, check=True
        )
        assert out.stdout.startswith("InvalidRequest f was typed into an interactive session")
        assert "put it into a file" in out.stdout


def test_an_installed_function_needs_no_bundle() -> None:
    assert Bundler().bundle_function(json.dumps) == bundler.FunctionCode(function="json:dumps", bundle=None)
    assert Bundler().bundle_function(math.sqrt) == bundler.FunctionCode(function="math:sqrt", bundle=None)
    assert Bundler().bundle_function(pytest.raises).bundle is None


def _nested() -> Callable[[], None]:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: 1, "lambda"),
        (_nested(), "inside of a function"),
        (functools.partial(print), "no function with a name"),
    ],
    ids=["lambda", "nested", "partial"],
)
def test_a_function_without_a_name_to_import_is_refused(function: Callable[..., object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Bundler().bundle_function(function)
    assert caught.value.hint


def test_a_function_whose_file_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vanished")
    module.__file__ = "/nowhere/vanished.py"
    exec("def f(): ...", module.__dict__)  # a module without a file, as a notebook makes them
    monkeypatch.setitem(sys.modules, "vanished", module)
    with pytest.raises(InvalidRequest, match="no file that a worker could load"):
        Bundler().bundle_function(module.f)


def test_data_files_travel_only_when_named(project: Path) -> None:
    code = Bundler().bundle_script(project / "facts.py", include=["data"])
    assert code.bundle.files == ("data/words.txt", "facts.py", "helper.py")
    one = Bundler().bundle_script(project / "facts.py", include=[project / "data/words.txt"])
    assert one.bundle.digest == code.bundle.digest


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("../x", "is not under"),
        ("/etc/passwd", "is not under"),
        (".env", "dotfile"),
        ("data/.hidden", "dotfile"),
        ("nothing", "no file"),
    ],
)
def test_data_that_may_not_travel_is_refused(project: Path, item: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Bundler().bundle_script(project / "facts.py", include=[item])


def test_linked_data_out_of_the_root_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (project / "data/link").symlink_to(tmp_path / "secret")
    for item in ("data", "data/link"):
        with pytest.raises(InvalidRequest, match="outside of"):
            Bundler().bundle_script(project / "facts.py", include=[item])


def test_too_much_code_names_the_largest_files(project: Path) -> None:
    with (project / "data/big.bin").open("wb") as file:
        file.truncate(MAX_BUNDLE_BYTES)
    with pytest.raises(LimitExceeded, match=r"10 MiB are allowed \(MAX_BUNDLE_BYTES\). Largest: data/big.bin"):
        Bundler().bundle_script(project / "facts.py", include=["data"])


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []
    real = bundler._read_bundle
    monkeypatch.setattr(bundler, "_read_bundle", lambda root, files: made.append(files) or real(root, files))  # type: ignore[func-returns-value]  # append is wanted for its effect
    mine = Bundler()
    first = mine.bundle_script(project / "facts.py")
    assert mine.bundle_script(project / "facts.py").bundle is first.bundle
    assert len(made) == 1
    _write(project, {"helper.py": "import unrelated\ndef size(path):\n    return 0\n"})
    changed = mine.bundle_script(project / "facts.py")
    assert changed.bundle.digest != first.bundle.digest
    assert changed.bundle.files == ("facts.py", "helper.py", "unrelated.py")
    assert len(made) == 2


def test_the_cache_is_bounded(project: Path) -> None:
    mine = Bundler()
    for number in range(bundler.MAX_CACHED_BUNDLES + 3):
        _write(project, {f"s{number}.py": ""})
        mine.bundle_script(project / f"s{number}.py")
    assert len(mine._cache) == bundler.MAX_CACHED_BUNDLES
