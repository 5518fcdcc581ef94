"""MicroVmBackend in real virtual machines: scripts and commands in a fresh clone each, functions and scripts in service machines, Wasm."""

from __future__ import annotations

from pathlib import Path

from blixard.backends.contract import BackendSettings
from blixard.backends.microvm import MicroVmBackend
from blixard.domain.payload import CommandPayload, Payload
from blixard.domain.requirements import Isolation, VmMode
from tests.vm.leaser import DirectLeaser

from .harness import BackendHarness, Capability
from .harness_process import script_program
from .harness_wasm import CACHE, python_in_wasm


class OwnMachines(MicroVmBackend):
    """With a keeper of machines that stops with it."""

    def __init__(self, settings: BackendSettings) -> None:
        self.leaser = DirectLeaser()
        super().__init__(settings, self.leaser)

    async def start(self) -> None:
        self.leaser.open()
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        await self.leaser.stop()


def command_in_guest(_directory: Path, source: str) -> tuple[Payload, dict[str, Path]]:
    return CommandPayload(argv=("python3", "-c", source)), {}


_UNSEEN = {
    Capability.PROCESSES_SEEN: "the host does not see a guest's processes: tests/vm/test_microvm_backend.py asks the guest",
    Capability.LIVE_GRANTS: "granted files are copied into the machine",
    Capability.WARM: "every job has a process of its own",
    Capability.BULK: "nobody runs thousands of jobs a second in virtual machines",
    Capability.SHORT_JOBS: "hundreds of jobs take a minute under emulation, and pass",
}
_SETTINGS = {"memory_mb": 160}
"""For machines of 256 MB."""
_ALL = frozenset(Capability) - set(_UNSEEN)
_NO_FUNCTIONS = frozenset({Capability.FUNCTIONS, Capability.FUNCTION_STREAMS_ORDERED})

HARNESSES = [
    BackendHarness(
        name="microvm-service",
        create=OwnMachines,
        program=script_program,
        isolation=Isolation.STANDARD,
        vm_mode=VmMode.SERVICE,
        capabilities=_ALL,
        lacks=_UNSEEN,
        settings=_SETTINGS,
    ),
    BackendHarness(
        name="microvm-script",
        create=OwnMachines,
        program=script_program,
        isolation=Isolation.MAXIMUM,
        capabilities=_ALL - _NO_FUNCTIONS,
        lacks=_UNSEEN
        | dict.fromkeys(
            _NO_FUNCTIONS, "hundreds of clones take minutes: microvm-service, tests/vm/test_microvm_backend.py"
        ),
        settings=_SETTINGS,
    ),
    BackendHarness(
        name="microvm-command",
        create=OwnMachines,
        program=command_in_guest,
        isolation=Isolation.MAXIMUM,
        capabilities=_ALL - _NO_FUNCTIONS - {Capability.PROGRAM_TRACEBACK},
        lacks=_UNSEEN
        | dict.fromkeys(_NO_FUNCTIONS, "tested by microvm-service")
        | {Capability.PROGRAM_TRACEBACK: "a command is not known to be Python"},
        settings=_SETTINGS,
    ),
    BackendHarness(
        name="microvm-wasm",
        create=OwnMachines,
        program=python_in_wasm,
        isolation=Isolation.MAXIMUM,
        capabilities=frozenset({Capability.FILES_PRIVATE, Capability.MEMORY_LIMIT}),
        lacks=_UNSEEN
        | dict.fromkeys(_NO_FUNCTIONS, "Python functions are not a Wasm payload")
        | {
            Capability.SIGNALS: "WASI has none: a guest is ended by the end of its process",
            Capability.PROCESSES: "WASI has none",
            Capability.PROGRAM_TRACEBACK: "a module is not known to be Python",
            Capability.ENVIRONMENT_PATHS: "a guest gets what the spec names and which attempt it is, nothing more",
        },
        arguments_prefix=lambda source: ("-c", source),
        settings=_SETTINGS | {"wasm_cache": CACHE.with_name("test-wasm-cache-portable")},
    ),
]
