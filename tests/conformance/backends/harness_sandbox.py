"""SandboxBackend: Python programs as scripts in forked sandboxes, and as commands in bubblewrap."""

from __future__ import annotations

from blixard.backends.sandbox.backend import SandboxBackend
from blixard.domain.requirements import Isolation

from .harness import BackendHarness, Capability
from .harness_process import command_program, script_program

_USED_ONCE = {Capability.WARM: "a sandbox is used once"}

HARNESSES = [
    BackendHarness(
        name="sandbox-script",
        create=SandboxBackend,
        program=script_program,
        isolation=Isolation.STANDARD,
        capabilities=frozenset(Capability) - {Capability.WARM},
        lacks=_USED_ONCE,
    ),
    BackendHarness(
        name="sandbox-command",
        create=SandboxBackend,
        program=command_program,
        isolation=Isolation.STANDARD,
        capabilities=frozenset(
            {
                Capability.BULK,
                Capability.SIGNALS,
                Capability.PROCESSES,
                Capability.PROCESSES_SEEN,
                Capability.LIVE_GRANTS,
                Capability.SHORT_JOBS,
                Capability.MEMORY_LIMIT,
                Capability.ENVIRONMENT_PATHS,
                Capability.FILES_PRIVATE,
            }
        ),
        lacks=_USED_ONCE
        | {
            Capability.FUNCTIONS: "tested by sandbox-script",
            Capability.FUNCTION_STREAMS_ORDERED: "tested by sandbox-script",
            Capability.PROGRAM_TRACEBACK: "a command is not known to be Python",
        },
    ),
]
