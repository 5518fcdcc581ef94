"""`blixard image list | build | prune`."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blixard.cli.invocation import Invocation
from blixard.cli.output import note, plural, print_json, print_line, print_table, show_time
from blixard.cli.root import PLAIN, examples
from blixard.vm.image.spec import DEFAULT_NAME, DEFAULT_SUITE, GUEST_PYTHON

if TYPE_CHECKING:
    from blixard.vm.image.spec import ImageSpec
    from blixard.vm.image.store import ImageRecord, ImageStore

app = typer.Typer(rich_markup_mode=PLAIN)
group = typer.Typer(rich_markup_mode=PLAIN, no_args_is_help=True, help="List, build and remove guest images.")
app.add_typer(group, name="image")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SHORT_DIGEST = 12
MB = 1024 * 1024


# A second, nameless command group around one group: without it Typer would make `image` the program itself.
@app.callback()
def _() -> None: ...


@group.command(
    name="list",
    help="List the guest images of this machine, newest first. Their files are compared with their checksums.",
    epilog=examples("image list", "image list --json"),
)
def list_images(ctx: typer.Context, as_json: Json = False) -> int:
    invocation: Invocation = ctx.obj
    found = _open_store(invocation).records()
    if as_json:
        print_json(found)
        return 0
    print_table(
        ("NAME", "DIGEST", "STATE", "SIZE", "CREATED", "DEBIAN", "PACKAGES"),
        [_row(record) for record in found],
        state="STATE",
    )
    return 0


def _row(record: ImageRecord) -> tuple[str, ...]:
    spec = record.spec
    wanted = [*spec.packages, *record.contents.get("python", ())] if spec else []
    created = show_time(dt.datetime.fromisoformat(record.created)) if record.created else "-"
    return (
        ", ".join(record.names) or "-",
        record.digest[:SHORT_DIGEST],
        "damaged" if record.damage else "ok",
        f"{record.size_bytes / MB:.0f} MB",
        created,
        spec.suite if spec else "-",
        ", ".join(wanted) or "-",
    )


@group.command(
    help="Build a guest image and give it a name, which jobs ask for with --image. What is built already is not built again.\n\n"
    "Every image has Python and what Blixard needs. Needs mmdebstrap and a network, but no root. About a minute.",
    epilog=examples(
        "image build",
        "image build data-science --package libgomp1 --requirements requirements.txt",
        "image build data-science --refresh --requirements requirements.txt",
    ),
)
def build(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="How jobs ask for it.")] = DEFAULT_NAME,
    package: Annotated[
        list[str] | None, typer.Option(metavar="P", help="A Debian package, with what it depends on. Repeatable.")
    ] = None,
    requirements: Annotated[
        str | None, typer.Option(metavar="FILE", help="A requirements.txt: packages from PyPI, as wheels.")
    ] = None,
    suite: Annotated[
        str, typer.Option(metavar="S", help=f"Debian release: {', '.join(GUEST_PYTHON)}.")
    ] = DEFAULT_SUITE,
    size: Annotated[
        int, typer.Option(metavar="MB", help="Size of its read-only file system; 0: as large as its contents.")
    ] = 0,
    mirror: Annotated[str, typer.Option(metavar="URL", help="Debian mirror; else the one of this machine.")] = "",
    refresh: Annotated[bool, typer.Option("--refresh", help="Build it anew with the packages of today.")] = False,
    as_json: Json = False,
) -> int:
    from blixard.cli.build_view import show_build
    from blixard.vm.image.builder import ImageBuilder
    from blixard.vm.image.spec import ImageSpec

    invocation: Invocation = ctx.obj
    spec = ImageSpec(
        name=name,
        suite=suite,
        packages=tuple(package or ()),
        requirements=_read_requirements(requirements) if requirements is not None else "",
        size_mb=size,
        mirror=mirror,
        as_of=dt.datetime.now(dt.UTC).date().isoformat() if refresh else _kept_day(invocation, name),
    )
    store = _open_store(invocation)
    _check_programs(store, spec)
    with show_build(quiet=invocation.quiet) as progress:
        image = ImageBuilder(store).build(spec, progress)
    record = next(record for record in store.records() if record.digest == image.digest)
    if as_json:
        print_json(record)
    else:
        print_line(f"{image.name}\t{image.digest}")
    return 0


def _kept_day(invocation: Invocation, name: str) -> str:
    """Return the day of the last refresh of this image, so that building it again does not go back behind it."""
    store = _open_store(invocation)
    manifest = store.manifest(store.names().get(name, ""))
    return manifest.spec.as_of if manifest else ""


def _check_programs(store: ImageStore, spec: ImageSpec) -> None:
    """Tell at once of everything that lacks, not of one thing after the other as the build meets it."""
    from blixard.errors import NotSupportedHere
    from blixard.vm.image.recipe import Recipe
    from blixard.vm.image.spec import check_spec
    from blixard.vm.setup import describe_missing, list_missing

    recipe = Recipe(check_spec(spec))
    if store.find_part(recipe.boot_key) and store.find_part(recipe.root_key):
        return
    missing = [finding for finding in list_missing() if finding.builds]
    if missing:
        names = ", ".join(f"{finding.name} ({finding.purpose})" for finding in missing)
        raise NotSupportedHere(f"an image cannot be built without {names}", hint=describe_missing(missing))


def _read_requirements(path: str) -> str:
    from blixard.errors import InvalidRequest

    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise InvalidRequest(f"{path} cannot be read: {reason}", field="requirements") from error


@group.command(
    help="Remove images without a name, parts that no image needs any more, and what interrupted builds left. "
    "Machines that run are not disturbed.",
    epilog=examples("image prune", "image prune data-science", "image prune --json"),
)
def prune(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Names to forget first, with their images.")
    ] = None,
    as_json: Json = False,
) -> int:
    invocation: Invocation = ctx.obj
    pruned = _open_store(invocation).prune(tuple(names or ()))
    if as_json:
        print_json(pruned)
        return 0
    for digest in pruned.images:
        print_line(f"{digest}\tremoved")
    if not invocation.quiet:
        note(f"{plural(len(pruned.images), 'image')} removed, {pruned.freed_bytes / MB:.0f} MB freed")
    return 0


def _open_store(invocation: Invocation) -> ImageStore:
    from blixard.vm.image.store import ImageStore

    settings = invocation.config.settings
    directory = settings.vm.directory or settings.storage.data_dir / "vm"
    return ImageStore(directory / "images")
