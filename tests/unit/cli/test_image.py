"""`blixard image` without building anything real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Shell
from tests.unit.vm.image.builds import Builds


@pytest.fixture
def shell_with_images(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    Builds().put_in_place(monkeypatch)
    monkeypatch.setenv("BLIXARD_VM__DIRECTORY", str(tmp_path / "vm"))
    return shell


def test_an_image_is_built_listed_and_pruned(shell_with_images: Shell) -> None:
    run = shell_with_images.run
    built = run("image", "build", "mine", "--package", "git")
    assert (built.code, built.out.split("\t")[0]) == (0, "mine")
    assert "the image is built" in built.err
    digest = built.out.split()[1]
    (record,) = json.loads(run("image", "list", "--json").out)
    assert (record["names"], record["digest"], record["spec"]["packages"]) == (["mine"], digest, ["git"])
    assert f"mine\t{digest[:12]}\tok" in run("image", "list").out
    again = run("--quiet", "image", "build", "mine", "--package", "git", "--json")
    assert (json.loads(again.out)["digest"], again.err) == (digest, "")
    assert json.loads(run("image", "prune", "mine", "--json").out)["images"] == [digest]
    assert json.loads(run("image", "list", "--json").out) == []


def test_a_refreshed_image_is_another_one_and_stays_so(shell_with_images: Shell) -> None:
    run = shell_with_images.run
    first = run("image", "build").out
    refreshed = run("image", "build", "--refresh").out
    assert refreshed != first
    assert run("image", "build").out == refreshed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["build", "Bad"], "'Bad' cannot be the name"),
        (["build", "x", "--package", "a b"], "'a b' is not a name of a Debian package"),
        (["build", "x", "--requirements", "nothing.txt"], "nothing.txt cannot be read"),
        (["build", "x", "--suite", "sarge"], "sarge"),
        (["build", "x", "--size", "1"], "MB, not 1"),
        (["prune", "nothing"], "there is no guest image 'nothing'"),
    ],
)
def test_a_mistake_is_one_error_with_exit_code_2(shell_with_images: Shell, words: list[str], told: str) -> None:
    said = shell_with_images.run("image", *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert told in said.err
