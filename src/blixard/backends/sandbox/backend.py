"""SandboxBackend: jobs at isolation standard, each in a sandbox that is used once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import msgspec

from blixard.backends.contract import BackendInfo, BackendSettings, Execution
from blixard.backends.outcomes import refused
from blixard.backends.runner_backend import Plan, Refused, RunnerBackend, python_task
from blixard.backends.sandbox import bubblewrap
from blixard.backends.sandbox.cgroups import Cgroup, Hierarchy, find_hierarchies, new_group_name, remove_stale
from blixard.backends.sandbox.hints import explain_denial
from blixard.backends.sandbox.plan import CODE, WORK, BubblewrapCommand
from blixard.backends.sandbox.planner import Planner, PlanRefused
from blixard.backends.sandbox.probe import Findings, probe
from blixard.backends.zygote.messages import Launch
from blixard.domain.lease import AttemptRef
from blixard.domain.limits import MIB
from blixard.domain.outcome import AttemptError, Outcome, OutcomeKind
from blixard.domain.payload import CommandPayload, FunctionPayload, Runtime, ScriptPayload
from blixard.domain.requirements import Isolation

_NOTES = {
    "memory": "standard: without a memory cgroup, memory_mb bounds each process of a job by itself, not all together",
    "pids": "standard: without a pids cgroup, kernels before 5.14 count the processes of all sandboxes of a user together",
    "cpu": "standard: without a cpu cgroup, cpus binds a job to whole processors; fractions are rounded up",
}
_HOW = (
    "delegate cgroups to the worker: systemd-run --user --scope -p Delegate=yes blixard worker, or run it as a service"
)


class SandboxBackend(RunnerBackend):
    """Forks Python jobs from the zygote into namespaces of their own; runs commands in bubblewrap within the same walls.

    Raises ``NotSupportedHere`` from ``start`` if the host allows no sandbox. Nothing weaker is ever used instead.
    """

    def __init__(self, settings: BackendSettings) -> None:
        super().__init__(settings)
        self._findings: Findings | None = None
        self._hierarchies: tuple[Hierarchy, ...] = ()
        self._planner: Planner | None = None
        self._name = new_group_name()
        self._free: list[Cgroup] = []
        self._taken: dict[AttemptRef, Cgroup] = {}
        self._groups = 0

    def info(self) -> BackendInfo:
        findings = self._find_out()
        if findings.python is not None:
            missing = {Isolation.STANDARD: findings.python}
            return BackendInfo(name="sandbox", runtimes=frozenset(), isolations=frozenset(), missing=missing)
        runtimes = {Runtime.PYTHON} if findings.command is not None else {Runtime.PYTHON, Runtime.COMMAND}
        return BackendInfo(
            name="sandbox",
            runtimes=frozenset(runtimes),
            isolations=frozenset({Isolation.STANDARD}),
            notes=tuple(self._notes(findings)),
        )

    async def start(self) -> None:
        await asyncio.to_thread(self._find_out)
        await asyncio.to_thread(remove_stale, self._hierarchies)
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        groups = [*self._free, *self._taken.values()]
        self._free.clear()
        self._taken.clear()
        for group in groups:
            await asyncio.to_thread(group.remove)

    def plan(self, execution: Execution) -> Plan:
        match execution.spec.payload:
            case FunctionPayload(bundle=bundle):
                return self._plan_python(execution, None if bundle is None else CODE)
            case ScriptPayload():
                return self._plan_python(execution, CODE)
            case CommandPayload(argv=argv):
                return Plan(launch=self._sandboxed_launch(execution, (*argv, *_words(execution))))
        raise Refused(refused("NotSupportedHere", f"SandboxBackend cannot run {execution.spec.runtime} jobs"))

    def amend(self, execution: Execution, outcome: Outcome) -> Outcome:
        """Say which wall the job ran into, where that can be known."""
        group = self._taken.pop(execution.ref, None)
        if group is not None:
            self._free.append(group)
        error = outcome.error
        if error is None or outcome.kind is not OutcomeKind.FAILED:
            return outcome
        was_out = group is not None and group.was_out_of_memory()
        if error.type == "MemoryError" or (was_out and outcome.exit_code == 128 + signal.SIGKILL):
            return msgspec.structs.replace(outcome, error=self._out_of_memory(execution, error))
        return msgspec.structs.replace(outcome, error=explain_denial(error, execution.spec.grants))

    # -- what this host allows ----------------------------------------------------------------------------------------

    def _find_out(self) -> Findings:
        if self._findings is None:
            findings = probe()
            if findings.python is None:
                self._hierarchies = find_hierarchies()
                self._planner = Planner(self.settings)
            self._findings = findings
        return self._findings

    def _notes(self, findings: Findings) -> Iterator[str]:
        if findings.command is not None:
            yield f"standard: commands cannot run: {findings.command}"
        limited = {controller for hierarchy in self._hierarchies for controller in hierarchy.controllers}
        for controller, note in _NOTES.items():
            if controller not in limited:
                yield f"{note} ({_HOW})"

    # -- launching ----------------------------------------------------------------------------------------------------

    def _plan_python(self, execution: Execution, root: str | None) -> Plan:
        return Plan(launch=self._sandboxed_launch(execution, ()), task=python_task(execution, root))

    def _sandboxed_launch(self, execution: Execution, argv: tuple[str, ...]) -> Launch:
        assert self._planner is not None, "execute before start"
        environment = self._planner.environment(execution)
        command = self._command(argv, environment) if argv else None
        group = self._limit(execution)
        try:
            plan = self._planner.plan(
                execution,
                cgroups=() if group is None else group.directories,
                limited=frozenset(c for h in self._hierarchies for c in h.controllers),
                command=command,
            )
        except PlanRefused as refusal:
            raise Refused(refused("GrantRefused", str(refusal), hint=refusal.hint)) from refusal
        return Launch(working_directory=WORK, environment=environment, argv=argv, plan=msgspec.msgpack.encode(plan))

    def _command(self, argv: tuple[str, ...], environment: dict[str, str]) -> BubblewrapCommand:
        assert self._findings is not None
        if self._findings.command is not None:
            raise Refused(
                refused(
                    "NotSupportedHere",
                    f"commands cannot run in a sandbox here: {self._findings.command}",
                    hint="`blixard doctor` says what this machine lacks; isolation minimal needs no sandbox",
                )
            )
        program, version = bubblewrap.find_bubblewrap()
        return BubblewrapCommand(program=program, version=version, argv=argv, environment=environment)

    def _limit(self, execution: Execution) -> Cgroup | None:
        """Take a group for the attempt and set its limits. A second try of the same attempt keeps its group."""
        if not self._hierarchies:
            return None
        group = self._taken.get(execution.ref) or self._take_group()
        self._taken[execution.ref] = group
        assert self._planner is not None
        group.limit(
            memory=self._planner.memory_mb(execution) * MIB,
            processes=self.settings.processes + bubblewrap.OWN_PROCESSES,
            cpus=execution.spec.requirements.cpus,
        )
        return group

    def _take_group(self) -> Cgroup:
        if self._free:
            return self._free.pop()
        self._groups += 1
        group = Cgroup(f"{self._name}-{self._groups}", self._hierarchies)
        group.create()
        return group

    def _out_of_memory(self, execution: Execution, error: AttemptError) -> AttemptError:
        assert self._planner is not None
        limit = self._planner.memory_mb(execution)
        hint = "ask for more with memory_mb; what a job writes into its private directories counts, too"
        return msgspec.structs.replace(
            error, type="MemoryLimit", message=f"the job needs more than its memory limit of {limit} MB", hint=hint
        )


def _words(execution: Execution) -> list[str]:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(execution.arguments, type=list[str])
    raise Refused(refused("InvalidArguments", "the arguments of a command are a JSON list of strings"))
