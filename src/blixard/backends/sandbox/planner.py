"""Decides what the sandbox of one attempt looks like. Runs in the worker; looks at the host's files, changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

from blixard.backends.contract import BackendSettings, Execution
from blixard.backends.environment import base_environment, job_variables
from blixard.backends.sandbox import layout, seccomp
from blixard.backends.sandbox.plan import (
    CODE,
    HOME,
    TEMPORARY,
    UNPRIVILEGED_ID,
    WORK,
    Bind,
    BubblewrapCommand,
    Limits,
    SandboxPlan,
)
from blixard.domain.limits import MIB
from blixard.domain.payload import FunctionPayload, ScriptPayload

NEVER_GRANTED = ("/proc", "/sys", "/dev")
"""Through these a job could reach the host itself, not only its files."""


class PlanRefused(Exception):
    """A grant or an input cannot be given as it stands; the message says why and the hint what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Planner:
    def __init__(self, settings: BackendSettings) -> None:
        self._settings = settings
        self._is_root = os.geteuid() == 0
        self._ids = (UNPRIVILEGED_ID, UNPRIVILEGED_ID) if self._is_root else (os.geteuid(), os.getegid())
        self._filter = seccomp.compile_filter(seccomp.this_machine())
        self._system = (*layout.system_binds(), *layout.interpreter_binds())
        self._network = tuple(layout.network_binds())
        self._links = layout.system_links()
        root = layout.library_root()
        self._moved = None if root != layout.LIBRARY else (os.path.dirname(layout.package_directory()), root)

    def base_environment(self) -> dict[str, str]:
        """Return the variables that every job has."""
        variables = base_environment(home=HOME, temporary=TEMPORARY)
        if self._moved is not None:
            variables["PYTHONPATH"] = layout.LIBRARY  # for interpreters that the job starts
        return variables

    def environment(self, execution: Execution) -> dict[str, str]:
        return {**self.base_environment(), **execution.spec.environment, **job_variables(execution.ref)}

    def plan(
        self,
        execution: Execution,
        *,
        cgroups: tuple[str, ...],
        limited: frozenset[str],
        command: BubblewrapCommand | None,
    ) -> SandboxPlan:
        """Return the sandbox of this attempt; ``limited`` is what its cgroups see to. Raises ``PlanRefused`` for what cannot be granted."""
        grants = execution.spec.grants
        binds = (*self._system, *(self._network if grants.network else ()), *self._own_binds(execution))
        settings = self._settings
        limits = Limits(
            disk=settings.disk_mb * MIB,
            processes=settings.processes,
            open_files=settings.open_files,
            address_space=None if "memory" in limited else self.memory_mb(execution) * MIB,
            processors=None if "cpu" in limited else execution.spec.requirements.cpus,
            cgroups=cgroups,
        )
        return SandboxPlan(
            binds=binds,
            limits=limits,
            host_uid=self._ids[0],
            host_gid=self._ids[1],
            links=self._links,
            files=layout.generated_files(network=grants.network),
            network=grants.network,
            seccomp=self._filter,
            moved_library=self._moved if command is None else None,
            command=command,
        )

    def memory_mb(self, execution: Execution) -> int:
        return execution.spec.requirements.memory_mb or self._settings.memory_mb

    def _own_binds(self, execution: Execution) -> Iterator[Bind]:
        """What belongs to this job alone: its code, its inputs, its grants."""
        match execution.spec.payload:
            case FunctionPayload(bundle=bundle) | ScriptPayload(bundle=bundle) if bundle:
                yield self._bind(str(execution.blobs[bundle]), CODE)
        for path in execution.spec.grants.read:
            yield self._grant(path, writable=False)
        for path in execution.spec.grants.write:
            yield self._grant(path, writable=True)
        for place in execution.inputs:
            yield self._bind(str(execution.blobs[place.digest]), os.path.join(WORK, place.path))

    def _grant(self, path: str, *, writable: bool) -> Bind:
        option = "--allow-write" if writable else "--allow-read"
        source = os.path.realpath(path)
        for forbidden in NEVER_GRANTED:
            if layout.is_below(source, forbidden) or layout.is_below(path, forbidden):
                raise PlanRefused(
                    f"{path} cannot be granted: {forbidden} is the machine itself, not files of yours",
                    f"leave {option} {path} out; every sandbox has a {forbidden} of its own or does without",
                )
        if not os.path.exists(source):
            hint = f"create it first, or grant the directory it is to be created in: {option} {os.path.dirname(path)}"
            raise PlanRefused(f"{option} {path}: there is no such file or directory on this machine", hint)
        return self._bind(source, path, writable=writable)

    def _bind(self, source: str, target: str, *, writable: bool = False) -> Bind:
        real = os.path.realpath(source)
        return Bind(real, target, writable, self._owner(real))

    def _owner(self, path: str) -> tuple[int, int] | None:
        """Only a root worker's jobs are somebody else than the worker."""
        if not self._is_root:
            return None
        found = os.stat(path)
        owner = (found.st_uid, found.st_gid)
        return None if owner == self._ids else owner
