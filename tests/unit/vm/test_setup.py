"""What a host lacks, and how each distribution gets it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blixard.errors import NotSupportedHere, Unavailable
from blixard.vm import setup
from blixard.vm.image.tools import Tools
from blixard.vm.setup import check_host, describe_missing, find_manager, install_missing, list_missing

PROGRAMS = {"qemu-system-x86_64", "mmdebstrap", "apt-get", "dpkg-deb", "mke2fs"}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Debian host without any of the programs; what is put into the directory is there."""
    monkeypatch.setattr(setup, "find_program", lambda name: str(path) if (path := tmp_path / name).exists() else name)
    monkeypatch.setattr(setup, "KEYRING", tmp_path / "keys")
    monkeypatch.setattr(setup, "_find_pip", lambda: "")
    monkeypatch.setattr(setup, "find_manager", lambda: "apt-get")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def test_this_host_has_everything() -> None:
    """The tests of virtual machines need it: scripts/setup-test-host installs it."""
    assert list_missing() == ()
    assert {finding.name for finding in check_host()} >= PROGRAMS
    assert all(finding.found and not finding.fix for finding in check_host())


def test_on_a_bare_host_everything_is_named_with_one_command(bare: Path) -> None:
    missing = list_missing()
    assert {finding.name for finding in missing} == {*PROGRAMS, "Debian's keys", "pip"}
    assert describe_missing(missing) == (
        "apt-get install -y --no-install-recommends apt debian-archive-keyring dpkg e2fsprogs mmdebstrap python3-pip qemu-system-x86"
    )
    assert [finding.name for finding in missing if not finding.builds] == ["qemu-system-x86_64"]


def test_an_ordinary_user_needs_more_and_is_told_to_use_sudo(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    names = {finding.name for finding in list_missing()}
    assert {"fakeroot", "newuidmap"} <= names
    assert describe_missing(list_missing()).startswith("sudo apt-get install ")
    with pytest.raises(NotSupportedHere) as caught:
        install_missing(lambda text: None)
    assert "sudo apt-get install" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("release", "manager"),
    [
        ("ID=debian\n", "apt-get"),
        ('ID=ubuntu\nID_LIKE="debian"\n', "apt-get"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt-get"),
        ("ID=fedora\n", "dnf"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf"),
        ("ID=arch\n", "pacman"),
        ("ID=manjaro\nID_LIKE=arch\n", "pacman"),
        ("ID=nixos\n", ""),
        ("", ""),
    ],
)
def test_the_package_manager_follows_from_the_release(tmp_path: Path, release: str, manager: str) -> None:
    (tmp_path / "os-release").write_text(release)
    assert find_manager(tmp_path / "os-release") == manager
    assert find_manager(tmp_path / "nothing") == ""


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "pacman", ""])
def test_every_host_is_told_something(bare: Path, monkeypatch: pytest.MonkeyPatch, manager: str) -> None:
    monkeypatch.setattr(setup, "find_manager", lambda: manager)
    assert all(finding.fix for finding in list_missing())
    assert "mmdebstrap" in describe_missing(list_missing())


def test_what_is_missing_is_installed_by_root(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(self: Tools, argv: list[str], **_: object) -> str:
        ran.append(argv)
        if argv[1] == "install":
            for name in (*PROGRAMS, "keys"):
                (bare / name).touch()
            monkeypatch.setattr(setup, "_find_pip", lambda: "/usr/bin/pip3")
        return ""

    monkeypatch.setattr(Tools, "run", run)
    told: list[str] = []
    assert "qemu-system-x86" in install_missing(told.append)
    assert [argv[:2] for argv in ran] == [["apt-get", "update"], ["apt-get", "install"]]
    assert any("mmdebstrap" in text for text in told)
    assert install_missing(told.append) == ()
    assert len(ran) == 2


def test_what_apt_did_not_bring_is_told(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tools, "run", lambda self, argv, **_: "")
    with pytest.raises(Unavailable, match="still there is no"):
        install_missing(lambda text: None)
