"""ProcessBackend, the oracle: Python programs as scripts and as commands."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from blixard.backends.process import ProcessBackend
from blixard.domain.payload import CommandPayload, Payload, ScriptPayload
from blixard.domain.requirements import Isolation

from .harness import BackendHarness, Capability


def script_program(directory: Path, source: str) -> tuple[Payload, dict[str, Path]]:
    (directory / "main.py").write_text(source)
    digest = hashlib.sha256(source.encode()).hexdigest()
    return ScriptPayload(path="main.py", bundle=digest), {digest: directory}


def command_program(directory: Path, source: str) -> tuple[Payload, dict[str, Path]]:
    return CommandPayload(argv=(sys.executable, "-c", source)), {}


_NOT_PRIVATE = {Capability.FILES_PRIVATE: "isolation minimal hides nothing of the machine"}

HARNESSES = [
    BackendHarness(
        name="process-script",
        create=ProcessBackend,
        program=script_program,
        isolation=Isolation.MINIMAL,
        capabilities=frozenset(Capability) - {Capability.FILES_PRIVATE},
        lacks=_NOT_PRIVATE,
    ),
    BackendHarness(
        name="process-command",
        create=ProcessBackend,
        program=command_program,
        isolation=Isolation.MINIMAL,
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
            }
        ),
        lacks=_NOT_PRIVATE
        | {
            Capability.FUNCTIONS: "tested by process-script",
            Capability.FUNCTION_STREAMS_ORDERED: "tested by process-script",
            Capability.WARM: "tested by process-script",
            Capability.PROGRAM_TRACEBACK: "a command is not known to be Python",
        },
    ),
]
