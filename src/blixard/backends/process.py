"""ProcessBackend: jobs at isolation minimal, as ordinary processes of the worker's user."""

from __future__ import annotations

import os
import sys

import msgspec

from blixard.backends.contract import BackendInfo, Execution
from blixard.backends.environment import base_environment, job_variables
from blixard.backends.outcomes import refused
from blixard.backends.runner_backend import Plan, Refused, RunnerBackend, input_places, python_task
from blixard.backends.zygote.messages import Launch
from blixard.domain.payload import CommandPayload, FunctionPayload, Runtime, ScriptPayload
from blixard.domain.requirements import Isolation

NOTES = (
    "minimal: memory_mb bounds the address space of each process of a job by itself",
    "minimal: cpus binds a job to whole processors; fractions are rounded up",
    "minimal: disk and number of processes are not limited, and nothing of the machine is hidden",
)


class ProcessBackend(RunnerBackend):
    """Runs functions in warm executors that are reused for jobs of the same bundle, scripts and commands in a process each."""

    def info(self) -> BackendInfo:
        if sys.platform != "linux":
            reason = "running jobs needs Linux (subreapers, SEQPACKET sockets)"
            return BackendInfo(
                name="process", runtimes=frozenset(), isolations=frozenset(), missing={Isolation.MINIMAL: reason}
            )
        runtimes = frozenset({Runtime.PYTHON, Runtime.COMMAND})
        return BackendInfo(name="process", runtimes=runtimes, isolations=frozenset({Isolation.MINIMAL}), notes=NOTES)

    def plan(self, execution: Execution) -> Plan:
        match execution.spec.payload:
            case FunctionPayload(bundle=bundle):
                return self._plan_function(execution, bundle)
            case ScriptPayload(bundle=bundle):
                root = str(execution.blobs[bundle])
                return Plan(launch=self._launch_once(execution), task=python_task(execution, root), code=bundle)
            case CommandPayload(argv=argv):
                return Plan(launch=self._launch_once(execution, (*argv, *_words(execution))))
        raise Refused(refused("NotSupportedHere", f"ProcessBackend cannot run {execution.spec.runtime} jobs"))

    def _plan_function(self, execution: Execution, bundle: str | None) -> Plan:
        task = python_task(execution, None if bundle is None else str(execution.blobs[bundle]))
        needs = execution.spec.requirements
        is_warm = needs.memory_mb is None and needs.cpus is None and execution.stdin is None
        launch = self.warm_launch() if is_warm else self._launch_once(execution)
        return Plan(launch=launch, task=task, is_warm=is_warm, code=bundle)

    def warm_launch(self) -> Launch:
        directory = self.new_directory()
        return Launch(
            directory=directory,
            working_directory=os.path.join(directory, "work"),
            environment=_environment(directory),
            single_use=False,
        )

    def _launch_once(self, execution: Execution, argv: tuple[str, ...] = ()) -> Launch:
        directory = self.new_directory()
        spec = execution.spec
        return Launch(
            directory=directory,
            working_directory=os.path.join(directory, "work"),
            environment=_environment(directory) | spec.environment | job_variables(execution.ref),
            argv=argv,
            inputs=input_places(execution),
            memory_mb=spec.requirements.memory_mb,
            cpus=spec.requirements.cpus,
        )


def _environment(directory: str) -> dict[str, str]:
    return base_environment(home=os.path.join(directory, "home"), temporary=os.path.join(directory, "tmp"))


def _words(execution: Execution) -> list[str]:
    try:
        return msgspec.json.decode(execution.arguments, type=list[str])
    except msgspec.DecodeError as error:
        message = f"the arguments of a command are a JSON list of strings: {error}"
        raise Refused(refused("InvalidArguments", message)) from error
