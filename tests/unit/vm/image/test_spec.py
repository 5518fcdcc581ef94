"""What decides the digest of an image, and what is refused before anything is built."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.errors import InvalidRequest, LimitExceeded
from blixard.vm.image import python_packages, recipe
from blixard.vm.image.recipe import Recipe
from blixard.vm.image.spec import (
    MAX_PACKAGES,
    MAX_REQUIREMENTS_BYTES,
    ImageSpec,
    canonical_requirements,
    check_name,
    check_spec,
    digest_of,
    is_digest,
)

packages = st.lists(st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,20}", fullmatch=True), max_size=5)
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True).filter(lambda name: not is_digest(name))
SPEC = ImageSpec(packages=("curl", "git"), requirements="numpy==2.0\nrich\n")


@given(packages, names, st.randoms())
def test_the_order_of_packages_and_the_name_are_no_inputs(wanted: list[str], name: str, random: object) -> None:
    shuffled = sorted(wanted + wanted[:1], key=lambda _: random.random())  # type: ignore[attr-defined]  # Hypothesis' own Random
    first, second = ImageSpec(packages=tuple(wanted)), ImageSpec(name=name, packages=tuple(shuffled))
    assert first.inputs() == second.inputs()
    assert Recipe(first).root_key == Recipe(second).root_key


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), st.sampled_from(["", " ", "\t", "  # why"]))
    )
)
def test_comments_and_blanks_are_no_inputs(lines: list[tuple[str, str]]) -> None:
    plain = "\n".join(name for name, _ in lines)
    noisy = (
        "# first\n\n" + "\r\n".join(f"{space if '#' not in space else ''}{name}{space}" for name, space in lines) + "\n"
    )
    assert canonical_requirements(plain) == canonical_requirements(noisy) == [name for name, _ in lines]


def test_a_line_that_goes_on_is_one_requirement() -> None:
    assert canonical_requirements("rich==13 \\\n  --hash=sha256:ab # x\n") == ["rich==13 --hash=sha256:ab"]


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "trixie"},
        {"packages": ("curl",)},
        {"requirements": "rich\nnumpy==2.0"},
        {"size_mb": 500},
        {"mirror": "http://mirror.example/debian"},
        {"as_of": "2026-11-23"},
    ],
)
def test_every_other_field_is_an_input(change: dict[str, object]) -> None:
    other = msgspec.structs.replace(SPEC, **change)
    assert other.inputs() != SPEC.inputs()
    assert Recipe(other).root_key != Recipe(SPEC).root_key


def test_the_guests_packages_are_inputs_of_the_root_and_our_code_is_one_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Recipe(SPEC)
    digest, root = before.digest, before.root_key
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "our_pins", lambda: ("msgspec==0.0",))
        assert Recipe(SPEC).root_key != root
        assert Recipe(SPEC).boot_key == before.boot_key
    monkeypatch.setattr(recipe, "init_script", lambda: b"another")
    changed = Recipe(SPEC)
    assert changed.digest != digest
    assert (changed.root_key, changed.boot_key) == (root, before.boot_key)


def test_the_guest_has_the_versions_of_this_host() -> None:
    assert [pin.partition("==")[0] for pin in python_packages.our_pins()] == ["msgspec", "wasmtime"]
    assert python_packages.our_pins()[0] == f"msgspec=={msgspec.__version__}"


@given(st.dictionaries(st.text(), st.text()))
def test_a_digest_knows_no_order(inputs: dict[str, str]) -> None:
    assert digest_of(inputs) == digest_of(dict(reversed(inputs.items())))
    assert is_digest(digest_of(inputs))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "Data"}, "name"),
        ({"name": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"suite": "sarge"}, "suite"),
        ({"packages": ("curl; reboot",)}, "packages"),
        ({"packages": ("--yes",)}, "packages"),
        ({"packages": ("a,b",)}, "packages"),
        ({"requirements": "-r other.txt"}, "requirements"),
        ({"requirements": "numpy\n-e ."}, "requirements"),
        ({"requirements": "./local.whl"}, "requirements"),
        ({"requirements": "x @ file:///tmp/x.whl"}, "requirements"),
        ({"mirror": "ftp://x"}, "mirror"),
        ({"mirror": "http://x] main\ndeb"}, "mirror"),
        ({"as_of": "yesterday"}, "as_of"),
        ({"size_mb": 1}, "size_mb"),
        ({"size_mb": 10**9}, "size_mb"),
    ],
)
def test_a_mistake_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_spec(msgspec.structs.replace(SPEC, **change))
    assert caught.value.field == field


def test_limits_hold_at_the_limit() -> None:
    check_spec(
        ImageSpec(packages=tuple(f"p{n}" for n in range(MAX_PACKAGES)), requirements="#" * MAX_REQUIREMENTS_BYTES)
    )
    with pytest.raises(LimitExceeded):
        check_spec(ImageSpec(packages=tuple(f"p{n}" for n in range(MAX_PACKAGES + 1))))
    with pytest.raises(LimitExceeded):
        check_spec(ImageSpec(requirements="#" * (MAX_REQUIREMENTS_BYTES + 1)))


def test_no_name_looks_like_a_digest() -> None:
    with pytest.raises(InvalidRequest):
        check_name("0" * 64)
