"""What the backend, the zygote and the supervisors of jobs say to each other."""

from __future__ import annotations

import enum

import msgspec

PYTHON_ENTRY = "blixard.backends.executor.main:serve"


class Role(enum.StrEnum):
    """What a descriptor that comes with a request is for."""

    CONTROL = "control"
    """The supervisor's end of its own socket to the backend."""
    CHANNEL = "channel"
    """The runner's socket: calls in, output and answers out. It has descriptor 3."""
    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"


class InputPlace(msgspec.Struct, frozen=True, array_like=True):
    """Copy the file ``source`` to ``path``, relative to the working directory."""

    source: str
    path: str


class Launch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one runner is started. Paths are the host's, but ``working_directory``, which is as the job sees it.

    With ``argv`` that program is executed, else ``entry`` (``module:function``) is called in the fork with its channel
    and this launch. ``directory`` is the job's private one: made by the supervisor with what ``private`` names in it,
    and removed when everything of the job is gone. ``plan`` is msgpack of a ``SandboxPlan``: where the process moves
    in before anything else.
    """

    directory: str | None = None
    private: tuple[str, ...] = ("work", "home", "tmp")
    working_directory: str
    environment: dict[str, str]
    argv: tuple[str, ...] = ()
    entry: str = PYTHON_ENTRY
    single_use: bool = True
    inputs: tuple[InputPlace, ...] = ()
    plan: bytes | None = None
    memory_mb: int | None = None
    """Address space of every single process of the job."""
    cpus: float | None = None
    """Rounded up to whole processors that the job is bound to."""


class SpawnRequest(msgspec.Struct, frozen=True, array_like=True):
    """Backend to zygote: fork a runner. ``roles`` says what the descriptors are, in their order."""

    roles: tuple[Role, ...]
    launch: Launch


class Starting(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Supervisor to backend: from now on the job's own code may have run. Not heard: it certainly has not."""


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Supervisor to backend: the job's process ended, and nothing of the job is left. ``code`` is minus n after signal n."""

    code: int


class SpawnFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Supervisor or zygote to backend: nothing of the job ran. ``is_fault_of_job``: its program or input is not usable."""

    error_type: str
    message: str
    is_fault_of_job: bool = False
    exit_code: int | None = None


ControlMessage = Starting | Exited | SpawnFailed

TERMINATE = b"t"
"""Backend to supervisor: SIGTERM to the job's process group."""
KILL = b"k"
"""Backend to supervisor: SIGKILL to every process of the job."""
READY = b"ready"
"""Zygote to backend, once."""

encode = msgspec.msgpack.encode
decode_request = msgspec.msgpack.Decoder(SpawnRequest).decode
decode_failure = msgspec.msgpack.Decoder(SpawnFailed).decode
decode_control = msgspec.msgpack.Decoder(ControlMessage).decode
