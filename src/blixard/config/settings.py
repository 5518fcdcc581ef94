"""Every setting with its kind, default and meaning. CONFIGURATION.md and config/default.toml are made from this file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blixard.config.kinds import Choice, Duration, Flag, Labels, Number, Place, Size, Text, Whole, Words

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
MINUTE = 60.0
DAY = 86400.0


def default_data_dir() -> Path:
    """Return the platform's place for a user's data, such as ~/.local/share/blixard."""
    import platformdirs  # here: 30 ms that only those pay who set no directory

    return Path(platformdirs.user_data_dir("blixard", appauthor=False))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(Section):
    """The HTTP server (`blixard serve`), and which server commands and the SDK talk to."""

    host: Annotated[str, Text("address or host name")] = Field(
        default="127.0.0.1",
        description="Address to listen on. Anything but loopback needs a token (`blixard token create`) before it starts.",
    )
    port: Annotated[int, Whole(0, 65535)] = Field(default=3020, description="Port to listen on; 0 takes any free one.")
    tls_certificate: Annotated[Path | None, Place()] = Field(
        default=None,
        description="Certificate chain in PEM form; together with tls_key it makes the server speak HTTPS.",
    )
    tls_key: Annotated[Path | None, Place()] = Field(
        default=None, description="Private key in PEM form of tls_certificate."
    )
    url: Annotated[str, Text("http:// or https:// URL", prefixes=("http://", "https://"))] = Field(
        default="",
        description="Server that commands, SDK and workers talk to. Empty: the local data directory. Short form: BLIXARD_SERVER.",
    )
    token: Annotated[str, Text("token", secret=True)] = Field(
        default="", description="Token sent to server.url. Short form: BLIXARD_TOKEN.", repr=False
    )
    shutdown_grace: Annotated[float, Duration(0, 60 * MINUTE)] = Field(
        default=10.0,
        description="How long a stopping server or worker lets running jobs go on before it gives them back.",
    )
    request_limit: Annotated[int, Size(2 * MIB, GIB)] = Field(
        default=16 * MIB, description="Largest body of one request that the server accepts."
    )

    @model_validator(mode="after")
    def _need_both_tls_files(self) -> ServerSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("server.tls_certificate and server.tls_key are needed together; only one is set")
        return self


class StorageSettings(Section):
    """Where jobs, results and logs are kept, and for how long."""

    data_dir: Annotated[Path, Place(optional=False)] = Field(
        default_factory=default_data_dir,
        description="Directory of the database, blobs and logs, on a local file system. Default: the platform's user data directory.",
    )
    blob_url: Annotated[str, Text("object store URL", prefixes=("file://", "s3://", "gs://", "az://", "memory://"))] = (
        Field(default="", description="Object store for large inputs and results. Empty: `blobs/` in data_dir.")
    )
    completed_retention: Annotated[float, Duration(0, 3650 * DAY)] = Field(
        default=7 * DAY, description="How long completed jobs are kept."
    )
    failed_retention: Annotated[float, Duration(0, 3650 * DAY)] = Field(
        default=30 * DAY, description="How long failed and cancelled jobs are kept."
    )
    events_retention: Annotated[float, Duration(0, 3650 * DAY)] = Field(
        default=90 * DAY, description="How long events, which are also the audit, are kept."
    )


class WorkerSettings(Section):
    """What a worker takes on: `blixard worker`, the one inside `blixard serve`, and the one a waiting command starts."""

    slots: Annotated[int, Whole(0, 4096)] = Field(
        default=0, description="Jobs that run at the same time; 0 means the number of CPUs."
    )
    types: Annotated[tuple[str, ...], Words(("process", "wasm", "microvm"))] = Field(
        default=(), description="Kinds of jobs it runs; empty means all that this host can run."
    )
    queues: Annotated[tuple[str, ...], Words()] = Field(
        default=(), description="Queues it takes jobs from; empty means every queue."
    )
    labels: Annotated[dict[str, str], Labels()] = Field(
        default_factory=dict, description="Labels that jobs may ask for. In a variable: zone=a,disk=fast."
    )
    name: Annotated[str, Text("name")] = Field(
        default="", description="Name shown in lists; empty means host name and process id."
    )
    cpus: Annotated[float, Number(0, 4096)] = Field(
        default=0.0, description="CPUs that its jobs may ask for together; 0 means all of the machine."
    )
    memory: Annotated[int, Size(0, 1024 * TIB)] = Field(
        default=0, description="Memory that its jobs may ask for together; 0 means all of the machine."
    )
    prefetch: Annotated[int, Whole(0, 1000)] = Field(
        default=800, description="Jobs claimed ahead of free slots, so that short jobs do not wait for the server."
    )
    grace: Annotated[float, Duration(0, 60 * MINUTE)] = Field(
        default=5.0,
        description="Time between SIGTERM and SIGKILL for a job that is cancelled. One past its timeout is killed at once.",
    )


class LeaseSettings(Section):
    """The right of a worker to run a job until it stops renewing it."""

    duration: Annotated[float, Duration(1, 60 * MINUTE)] = Field(
        default=10.0, description="A worker that has not been heard of for this long loses its jobs to others."
    )


class MaintenanceSettings(Section):
    """Background passes: rescue of lost jobs, promotion of due ones, pruning of old ones."""

    interval: Annotated[float, Duration(0.05, 60 * MINUTE)] = Field(
        default=1.0, description="Time between two passes that rescue and promote jobs."
    )
    prune_interval: Annotated[float, Duration(0.05, DAY)] = Field(
        default=60.0, description="Time between two passes that remove what is past its retention."
    )
    batch: Annotated[int, Whole(1, 10_000)] = Field(
        default=1000, description="Rows that one step of a pass changes at most."
    )


class SandboxSettings(Section):
    """Limits of one job that names none of its own."""

    minimum_isolation: Annotated[
        Literal["minimal", "standard", "maximum"], Choice(("minimal", "standard", "maximum"))
    ] = Field(
        default="minimal", description="The server's policy: it refuses jobs that ask for less isolation than this."
    )
    memory: Annotated[int, Size(16 * MIB, 1024 * TIB)] = Field(default=GIB, description="Memory of one job.")
    processes: Annotated[int, Whole(1, 65536)] = Field(default=128, description="Processes and threads of one job.")
    disk: Annotated[int, Size(MIB, 1024 * TIB)] = Field(
        default=GIB, description="What one job may write into its private directories together."
    )
    open_files: Annotated[int, Whole(16, 1_048_576)] = Field(
        default=1024, description="Open files of one process of a job."
    )


class WasmSettings(Section):
    """WebAssembly jobs."""

    fuel: Annotated[int, Whole(0, 2**63 - 1)] = Field(
        default=0, description="Instructions a module may execute, roughly; 0 means no limit but the job's timeout."
    )
    cache_size: Annotated[int, Size(0, 1024 * TIB)] = Field(
        default=GIB, description="Compiled modules kept on disk; the oldest go first."
    )


class VmSettings(Section):
    """Virtual machines: what isolation maximum and service machines run on."""

    skip: Annotated[bool, Flag()] = Field(
        default=False, description="Do without virtual machines. Short form: SKIP_VM_MANAGER."
    )
    directory: Annotated[Path | None, Place()] = Field(
        default=None, description="Images, templates and running machines. Empty: `vm/` in storage.data_dir."
    )
    max_vms: Annotated[int, Whole(1, 1000)] = Field(
        default=10, description="Virtual machines at the same time, those kept ready among them."
    )
    memory: Annotated[int, Size(128 * MIB, 1024 * TIB)] = Field(
        default=16 * GIB, description="Memory of all of them together; never more than this machine has."
    )
    default_memory: Annotated[int, Size(128 * MIB, TIB)] = Field(
        default=512 * MIB, description="Memory of the machine of a job that names none."
    )
    image: Annotated[str, Text("image name")] = Field(
        default="default", description="Guest image of jobs that name none."
    )
    pool: Annotated[int, Whole(0, 100)] = Field(
        default=1, description="Machines kept ready for the next job at isolation maximum, once there was one."
    )
    service_vms: Annotated[int, Whole(0, 100)] = Field(
        default=0, description="Service machines that a worker starts with, for the namespace default."
    )
    auto_create: Annotated[bool, Flag()] = Field(
        default=True, description="Start a service machine when a job wants one and none is free."
    )
    prefer_service: Annotated[bool, Flag()] = Field(
        default=True, description="Off: jobs with vm_mode service get a fresh machine each."
    )
    max_jobs_per_vm: Annotated[int, Whole(1, 1_000_000)] = Field(
        default=50, description="Jobs after which a service machine is replaced."
    )
    max_uptime: Annotated[float, Duration(1, 365 * DAY)] = Field(
        default=3600.0, description="Age at which a service machine is replaced, never during a job."
    )
    memory_share: Annotated[float, Number(0.1, 10)] = Field(
        default=0.9, description="Share of its memory above which a service machine is replaced, never during a job."
    )
    idle_shutdown: Annotated[float, Duration(0.1, 365 * DAY)] = Field(
        default=300.0, description="A machine that nobody has used for so long is ended."
    )
    share_memory: Annotated[bool, Flag()] = Field(
        default=True,
        description="Machines share the unchanged memory of their template. Off: each has a copy, so that no tenant can tell by the time "
        "an access takes what another has used.",
    )
    health_interval: Annotated[float, Duration(0.1, 60 * MINUTE)] = Field(
        default=10.0, description="Time between two pings of a machine."
    )
    health_timeout: Annotated[float, Duration(0.1, 60 * MINUTE)] = Field(
        default=10.0, description="A ping that has no answer by then has failed."
    )
    failure_threshold: Annotated[int, Whole(1, 1000)] = Field(
        default=3, description="Failed pings in a row after which a machine counts as dead, and its job runs elsewhere."
    )
    recovery_threshold: Annotated[int, Whole(1, 1000)] = Field(
        default=2, description="Answered pings in a row after which a degraded machine counts as healthy."
    )
    breaker_threshold: Annotated[int, Whole(1, 1000)] = Field(
        default=3,
        description="Machines of one kind that fail to start, one after the other, until no more are tried for a while.",
    )
    breaker_time: Annotated[float, Duration(0.1, DAY)] = Field(
        default=60.0, description="How long no machine of that kind is tried."
    )
    start_timeout: Annotated[float, Duration(1, 60 * MINUTE)] = Field(
        default=120.0, description="How long a machine may take until it answers."
    )
    shutdown_timeout: Annotated[float, Duration(0.1, 60 * MINUTE)] = Field(
        default=10.0, description="How long a stopping worker waits for its machines before it kills them."
    )


class LogSettings(Section):
    """What the program says about itself on standard error; the output of jobs is kept elsewhere."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Choice(("debug", "info", "warning", "error"))] = (
        Field(default="info", description="Least severe message that is written.")
    )
    format: Annotated[Literal["auto", "text", "json"], Choice(("auto", "text", "json"))] = Field(
        default="auto", description="auto writes text to a terminal and JSON elsewhere."
    )


class Settings(Section):
    """All settings, checked. Immutable; made by ``AppConfig.load_with_layers``."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    storage: StorageSettings = Field(default_factory=StorageSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    leases: LeaseSettings = Field(default_factory=LeaseSettings)
    maintenance: MaintenanceSettings = Field(default_factory=MaintenanceSettings)
    sandbox: SandboxSettings = Field(default_factory=SandboxSettings)
    wasm: WasmSettings = Field(default_factory=WasmSettings)
    vm: VmSettings = Field(default_factory=VmSettings)
    log: LogSettings = Field(default_factory=LogSettings)
