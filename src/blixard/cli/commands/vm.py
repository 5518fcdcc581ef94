"""`blixard vms` and `blixard vm setup | exec | shell | pause | resume | stop | snapshot | fork`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated

import typer

from blixard.cli.completion import complete_vm_ids
from blixard.cli.invocation import Invocation
from blixard.cli.output import note, print_json, print_line, print_table, show_duration
from blixard.cli.root import PLAIN, WordsCommand, examples
from blixard.errors import InvalidRequest, NotSupportedHere

if TYPE_CHECKING:
    from blixard.cli.machines import Found
    from blixard.domain.vm import VmView

app = typer.Typer(rich_markup_mode=PLAIN)
group = typer.Typer(rich_markup_mode=PLAIN, no_args_is_help=True, help="Set up virtual machines, look into them.")
app.add_typer(group, name="vm")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
VmId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="Id of the machine or of its job, or the beginning.", autocompletion=complete_vm_ids
    ),
]
MIB = 1 << 20


@app.command(
    help="List the virtual machines of the workers on this machine that use this data directory, oldest first.",
    epilog=examples("vms", "vms --json"),
)
def vms(ctx: typer.Context, as_json: Json = False) -> int:
    from blixard.cli.machines import find_machines, vm_directory

    invocation: Invocation = ctx.obj
    found = [item.vm for item in invocation.run(find_machines(vm_directory(invocation)))]
    if as_json:
        print_json(found)
        return 0
    columns = ("ID", "STATE", "MODE", "HEALTH", "JOB", "NAMESPACE", "IMAGE", "SIZE", "OWN", "JOBS", "AGE", "NOTE")
    print_table(columns, [_row(vm) for vm in found], state="STATE")
    if not found and not invocation.quiet:
        note("no virtual machine runs here; they start with the first job at isolation maximum")
    return 0


def _row(vm: VmView) -> tuple[str, ...]:
    return (
        vm.id,
        vm.state,
        vm.mode,
        vm.health,
        vm.job_id or "-",
        vm.namespace or "-",
        vm.image,
        f"{vm.memory_mb} MB, {vm.vcpus} cpu{'s' if vm.vcpus > 1 else ''}{', network' if vm.network else ''}",
        f"{vm.private_memory // MIB} MB" if vm.private_memory else "-",
        str(vm.jobs),
        show_duration(float(round(time.time() - vm.created_at / 1e6))),
        vm.note or "-",
    )


@group.command(
    help="Make this machine ready for jobs in virtual machines: install what lacks (as root, with apt) or name it, build the "
    "guest image, boot it once, save its template, and run a program in a clone of it.",
    epilog=examples("vm setup"),
)
def setup(ctx: typer.Context) -> int:
    from blixard.cli.machines import build_image, tell_step

    invocation: Invocation = ctx.obj
    tell = tell_step(invocation.quiet)
    if invocation.config.settings.vm.skip:
        raise NotSupportedHere("virtual machines are switched off (SKIP_VM_MANAGER, vm.skip)", hint="unset it first")
    if not _install_missing(tell):
        return 1
    print_line(f"image\t{build_image(invocation)}")
    from blixard.cli.vm_check import check_machines

    for line in invocation.run(check_machines(invocation, tell)):
        print_line(line)
    return 0


def _install_missing(tell: Callable[[str], None]) -> bool:
    """Install what lacks. False: a person did not want it. Raises ``NotSupportedHere`` with what to do by hand."""
    from blixard.cli.machines import confirm
    from blixard.vm.setup import can_install, install_missing, list_missing

    missing = list_missing()
    if missing and can_install():
        packages = ", ".join(sorted({finding.package for finding in missing if finding.package}))
        if not confirm(f"This host lacks {packages}. Install with apt?"):
            note("nothing was installed")
            return False
    installed = install_missing(tell)
    print_line(f"host\t{'installed ' + ', '.join(installed) if installed else 'has what it needs'}")
    return True


@group.command(
    name="exec",
    cls=WordsCommand,
    help="Run a program in a running machine, beside its job, as its root. Its output appears here; its exit code is passed on; "
    "128+n: killed by signal n, 125: the machine was lost.",
    epilog=examples("vm exec vm_01jd… -- ps aux", "vm exec vm_01jd… -- sh -c 'cat > /tmp/x' < notes.txt"),
)
def execute(ctx: typer.Context, vm_id: VmId) -> int:
    words: list[str] = ctx.meta.get(WordsCommand.TAIL) or []
    if not words:
        raise InvalidRequest(
            "a program is needed behind `--`", field="command", hint=f"blixard vm exec {vm_id} -- ps aux"
        )
    return _run_program(ctx.obj, vm_id, tuple(words), terminal=False)


@group.command(
    help="Open a shell in a running machine, beside its job, as its root. Leave it with exit or Ctrl-D.",
    epilog=examples("vm shell vm_01jd…"),
)
def shell(ctx: typer.Context, vm_id: VmId) -> int:
    return _run_program(ctx.obj, vm_id, ("/bin/sh", "-i"), terminal=sys.stdin.isatty())


def _run_program(invocation: Invocation, vm_id: str, argv: tuple[str, ...], *, terminal: bool) -> int:
    async def run(found: Found) -> int:
        from blixard.cli.guest_terminal import run_in_guest

        return await run_in_guest(found.client, found.vm.id, argv, terminal=terminal)

    return _with_machine(invocation, vm_id, run)


def _with_machine(invocation: Invocation, vm_id: str, use: Callable[[Found], Coroutine[object, object, int]]) -> int:
    from blixard.cli.machines import find_machine, vm_directory

    async def work() -> int:
        return await use(await find_machine(vm_directory(invocation), vm_id))

    return invocation.run(work())


@group.command(help="Stop a machine's processors. Its job's timeout goes on.", epilog=examples("vm pause vm_01jd…"))
def pause(ctx: typer.Context, vm_id: VmId) -> int:
    async def use(found: Found) -> int:
        from blixard.vm.control import PauseOne

        await found.client.ask(PauseOne(vm=found.vm.id), type(None))
        print_line(f"{found.vm.id}\tpaused")
        return 0

    return _with_machine(ctx.obj, vm_id, use)


@group.command(help="Let a paused machine go on.", epilog=examples("vm resume vm_01jd…"))
def resume(ctx: typer.Context, vm_id: VmId) -> int:
    async def use(found: Found) -> int:
        from blixard.vm.control import ResumeOne

        await found.client.ask(ResumeOne(vm=found.vm.id), type(None))
        print_line(f"{found.vm.id}\tresumed")
        return 0

    return _with_machine(ctx.obj, vm_id, use)


@group.command(
    help="End a machine, whatever it runs: the attempt of its job is lost and runs again on another.",
    epilog=examples("vm stop vm_01jd…"),
)
def stop(ctx: typer.Context, vm_id: VmId) -> int:
    async def use(found: Found) -> int:
        from blixard.vm.control import StopOne

        await found.client.ask(StopOne(vm=found.vm.id), type(None))
        print_line(f"{found.vm.id}\tstopped")
        return 0

    return _with_machine(ctx.obj, vm_id, use)


@group.command(
    help="Save a copy of a machine as it is now, for `vm fork`. It is kept as long as its worker lives; its name is printed.",
    epilog=examples("vm snapshot vm_01jd…"),
)
def snapshot(ctx: typer.Context, vm_id: VmId) -> int:
    async def use(found: Found) -> int:
        from blixard.vm.control import SnapshotOne

        print_line(await found.client.ask(SnapshotOne(vm=found.vm.id), str))
        return 0

    return _with_machine(ctx.obj, vm_id, use)


@group.command(
    help="Start a copy of a machine, or of a snapshot, to look into while the original goes on. No job gets the copy; "
    "`vm stop` ends it, and so does vm.max_uptime. Its id is printed.",
    epilog=examples("vm fork vm_01jd…", "vm fork vm_01jd….1"),
)
def fork(ctx: typer.Context, vm_id: VmId) -> int:
    origin, dot, _ = vm_id.rpartition(".")

    async def use(found: Found) -> int:
        from blixard.vm.control import ForkOne

        print_line(await found.client.ask(ForkOne(vm=vm_id if dot else found.vm.id), str))
        return 0

    return _with_machine(ctx.obj, origin if dot else vm_id, use)


# As in the other groups: with one command alone Typer would make it the program itself.
@app.callback()
def _() -> None: ...
