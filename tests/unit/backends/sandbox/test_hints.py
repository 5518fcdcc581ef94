from __future__ import annotations

from pathlib import Path

import pytest

from blixard.backends.sandbox.hints import explain_denial
from blixard.domain.grants import Grants
from blixard.domain.outcome import AttemptError


def hint_of(message: str, grants: Grants | None = None, kind: str = "OSError") -> str | None:
    return explain_denial(AttemptError(type=kind, message=message), grants or Grants()).hint


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that does not lie below the sandbox's own /tmp."""
    monkeypatch.setattr("blixard.backends.sandbox.hints._OWN", ("/work", "/dev"))
    (tmp_path / "data.csv").write_text("x")
    return tmp_path


def test_a_hidden_file_names_the_grant(place: Path) -> None:
    path = place / "data.csv"
    hint = hint_of(f"[Errno 2] No such file or directory: '{path}'")
    assert hint == f"the sandbox hides {path}; grant it with --allow-read {path} (or --allow-write {path})"


def test_a_file_that_the_host_lacks_too_needs_no_grant() -> None:
    assert hint_of("[Errno 2] No such file or directory: '/nowhere/at/all'") is None


def test_a_new_file_in_a_hidden_directory_names_the_directory(place: Path) -> None:
    hint = hint_of(f"[Errno 2] No such file or directory: '{place / 'new'}'")
    assert hint is not None
    assert hint.endswith(f"--allow-write {place}")


def test_writing_where_only_reading_was_granted(place: Path) -> None:
    path = place / "data.csv"
    hint = hint_of(f"[Errno 30] Read-only file system: '{path}'", Grants(read=(str(place),)))
    assert hint == f"the sandbox lets {path} be read only; grant it with --allow-write {path}"


def test_a_granted_path_that_is_missing_is_the_job_s_own_matter(place: Path) -> None:
    assert hint_of(f"[Errno 2] No such file or directory: '{place / 'new'}'", Grants(read=(str(place),))) is None


def test_writing_to_the_system() -> None:
    hint = hint_of("[Errno 30] Read-only file system: '/usr/bin/tool'")
    assert hint is not None
    assert "--allow-write /usr/bin" in hint


@pytest.mark.parametrize("path", ["/work/missing", "relative", "/dev/missing"])
def test_the_sandbox_s_own_places_need_no_grant(path: str) -> None:
    assert hint_of(f"[Errno 2] No such file or directory: '{path}'") is None


@pytest.mark.parametrize(
    "message",
    [
        "[Errno 101] Network is unreachable",
        "[Errno -3] Temporary failure in name resolution",
        "<urlopen error [Errno -2] Name or service not known>",
        "[Errno 111] Connection refused",
    ],
)
def test_a_missing_network_names_the_grant(message: str) -> None:
    hint = hint_of(message)
    assert hint is not None
    assert "--allow-net" in hint
    assert hint_of(message, Grants(network=True)) is None


def test_other_errors_stay_as_they_are() -> None:
    error = AttemptError(type="ValueError", message="no", hint=None)
    assert explain_denial(error, Grants()) is error
    known = AttemptError(type="OSError", message="[Errno 101] x", hint="known")
    assert explain_denial(known, Grants()) is known


@pytest.mark.parametrize(("number", "text"), [(13, "Permission denied"), (1, "Operation not permitted")])
def test_a_granted_path_whose_own_rights_forbid_it_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str
) -> None:
    message = f"[Errno {number}] {text}: '{place / 'new'}'"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    hint = hint_of(message, Grants(write=(str(place),)))
    assert hint is not None
    assert "a worker of root runs its jobs as an ordinary user" in hint
    assert f"chmod o+rwX {place}" in hint
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    hint = hint_of(message, Grants(write=(str(place),)))
    assert hint == f"{place / 'new'} is granted, but its own rights forbid this to the user of the worker"
    assert hint_of(f"[Errno 2] No such file or directory: '{place / 'new'}'", Grants(write=(str(place),))) is None
