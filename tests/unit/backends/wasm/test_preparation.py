from __future__ import annotations

import os
from pathlib import Path

import pytest

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.wasm.preparation import MAX_PREOPENS, clear, environment_of, lay_out_sandbox, lay_out_shared
from blixard.backends.wasm.signature import JobRefused
from blixard.domain.grants import Grants, InputFile
from blixard.domain.lease import AttemptRef
from blixard.domain.payload import WasmPayload
from blixard.domain.spec import JobSpec


def make(grants: Grants | None = None, inputs: dict[str, Path] | None = None, **environment: str) -> Execution:
    return Execution(
        ref=AttemptRef("ns", "job_1", 3),
        spec=JobSpec(
            name="n", payload=WasmPayload(module="m"), grants=grants or Grants(), environment=dict(environment)
        ),
        inputs=tuple(InputFile(path=path, digest=path) for path in inputs or {}),
        blobs=inputs or {},
    )


def test_the_environment_is_the_spec_s_and_says_which_attempt() -> None:
    seen = dict(environment_of(make(A="b", BLIXARD_ATTEMPT="99")))
    assert seen == {"A": "b", "BLIXARD_JOB_ID": "job_1", "BLIXARD_ATTEMPT": "3", "BLIXARD_NAMESPACE": "ns"}


def test_inputs_are_copies_in_their_places(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("data")
    preopens = lay_out_shared(make(inputs={"a/b.txt": blob, "/data/c.txt": blob}), tmp_path / "job")
    assert [preopen.guest for preopen in preopens] == ["/work", ".", "/data"]
    placed = tmp_path / "job" / "work" / "a" / "b.txt"
    assert placed.read_text() == "data"
    assert placed.stat().st_ino != blob.stat().st_ino
    assert (Path(preopens[2].host) / "c.txt").read_text() == "data"
    assert not preopens[2].writable


def test_a_granted_file_comes_without_its_neighbours(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("read.txt", "write.txt", "secret.txt"):
        (home / name).write_text(name)
    grants = Grants(read=(str(home / "read.txt"),), write=(str(home / "write.txt"),))
    preopens = lay_out_shared(make(grants), tmp_path / "job")
    (shown,) = [preopen for preopen in preopens if preopen.guest == str(home)]
    place = Path(shown.host)
    assert sorted(path.name for path in place.iterdir()) == ["read.txt", "write.txt"]
    (place / "write.txt").write_text("changed")
    (place / "read.txt").chmod(0o644)
    (place / "read.txt").write_text("changed")
    assert (home / "write.txt").read_text() == "changed"
    assert (home / "read.txt").read_text() == "read.txt"


def test_the_sandbox_shows_grants_away_from_its_own_places(tmp_path: Path) -> None:
    settings = BackendSettings(scratch=tmp_path)
    file, taken = tmp_path / "file", tmp_path / "taken"
    file.write_text("x")
    taken.mkdir()
    plan, preopens = lay_out_sandbox(make(Grants(read=("/proc", str(file)), write=(str(taken),))), settings)
    assert {bind.source: bind.writable for bind in plan.binds} == {"/proc": False, str(file): False, str(taken): True}
    assert all(bind.target.startswith("/shown/") for bind in plan.binds)
    assert {preopen.guest for preopen in preopens} == {"/work", ".", "/proc", str(taken), str(tmp_path)}


def test_a_file_within_a_granted_directory_needs_nothing_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "file"
    file.parent.mkdir()
    file.write_text("x")
    execution = make(Grants(read=(str(tmp_path), str(file))))
    assert [preopen.guest for preopen in lay_out_shared(execution, tmp_path / "job")] == ["/work", ".", str(tmp_path)]
    plan, _ = lay_out_sandbox(execution, BackendSettings(scratch=tmp_path))
    assert [bind.source for bind in plan.binds] == [str(tmp_path)]


def test_a_writable_file_within_a_directory_to_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(JobRefused) as caught:
        lay_out_shared(make(Grants(read=(str(tmp_path),), write=(str(file),))), tmp_path / "job")
    assert caught.value.error.type == "GrantNotPossible"


def test_two_things_at_one_place_are_refused(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("x")
    execution = make(Grants(read=(str(tmp_path),)), {f"{tmp_path}/in.txt": blob})
    with pytest.raises(JobRefused) as caught:
        lay_out_shared(execution, tmp_path / "job")
    assert caught.value.error.type == "GrantNotPossible"
    with pytest.raises(JobRefused):
        lay_out_sandbox(execution, BackendSettings(scratch=tmp_path))


@pytest.mark.parametrize("which", ["read", "write"])
def test_a_grant_that_is_not_there_is_named(tmp_path: Path, which: str) -> None:
    grants = Grants(read=("/no/such",)) if which == "read" else Grants(write=("/no/such",))
    with pytest.raises(JobRefused) as caught:
        lay_out_shared(make(grants), tmp_path / "job")
    assert caught.value.error.type == "GrantMissing"
    assert "/no/such" in caught.value.error.message


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    execution = Execution(
        ref=AttemptRef("ns", "job_1", 1),
        spec=JobSpec(name="n", payload=WasmPayload(module="m")),
        inputs=(InputFile(path="a", digest="d"),),
    )
    with pytest.raises(JobRefused, match="not on this worker"):
        lay_out_shared(execution, tmp_path / "job")


@pytest.mark.parametrize("extra", [0, 1])
def test_directories_have_a_limit(tmp_path: Path, extra: int) -> None:
    directories = [tmp_path / str(number) for number in range(MAX_PREOPENS - 2 + extra)]
    for directory in directories:
        directory.mkdir()
    execution = make(Grants(read=tuple(map(str, directories))))
    if extra:
        with pytest.raises(JobRefused) as caught:
            lay_out_shared(execution, tmp_path / "job")
        assert caught.value.error.type == "TooManyGrants"
    else:
        assert len(lay_out_shared(execution, tmp_path / "job")) == MAX_PREOPENS


def test_clear_removes_what_is_nested_beyond_any_path(tmp_path: Path) -> None:
    private = tmp_path / "job"
    private.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (private / "link").symlink_to(outside)
    here = os.open(private, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    clear(private)
    assert not private.exists()
    assert (outside / "kept").exists()
    clear(private)
