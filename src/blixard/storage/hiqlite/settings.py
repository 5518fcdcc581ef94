"""What a node of a cluster must know before it starts."""

from __future__ import annotations

from pathlib import Path

import msgspec

from blixard.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
MIN_SECRET_LENGTH = 16
LOG_FILE_BYTES = 16 * MIB
"""The log is kept in files of this size."""
MAX_OPERATION_BYTES = 32 * MIB
"""Largest single write. It travels in parts of 256 KiB: the engine sends an entry again from its start when it takes longer than a heartbeat."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a cluster. ``raft`` and ``api`` are ``host:port``, reachable from the other nodes; both are for nodes only."""

    id: int
    raft: str
    api: str


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files with which a node proves itself to the others."""

    certificate: Path
    key: Path


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One node. ``members`` are all nodes, this one too; the cluster's own list wins once the node belongs to it.

    Every cluster has a member with the id 1, which founds it. The secrets are the same on all nodes and end with the cluster.
    """

    node_id: int
    members: tuple[Member, ...]
    data_dir: Path
    raft_secret: str
    api_secret: str
    listen: str = "127.0.0.1"
    heartbeat_seconds: float = 0.25
    """Also the time within which a follower must have received and stored what the leader sends at once, up to 2 MiB."""
    election_seconds: tuple[float, float] = (0.75, 1.5)
    """A follower that hears nothing for a random time between the two asks for a new leader."""
    entries_until_snapshot: int = 5_000
    tls: TlsFiles | None = None
    is_learner: bool = False
    """Gets all data and has no vote."""


def check_settings(settings: NodeSettings) -> None:
    """Raise ``ConfigError`` for settings with which no node could start. Says which one and what it should be."""
    ids = [member.id for member in settings.members]
    if len(set(ids)) != len(ids):
        raise ConfigError("two members of the cluster have the same id", hint="give each node an id of its own")
    if settings.node_id not in ids:
        raise ConfigError(f"node {settings.node_id} is not among the members {sorted(ids)}")
    if 1 not in ids:
        raise ConfigError("no member has the id 1", hint="the first node of a cluster has the id 1")
    addresses = [address for member in settings.members for address in (member.raft, member.api)]
    if len(set(addresses)) != len(addresses):
        raise ConfigError("two addresses of the cluster's members are the same", hint="give each its own port")
    for address in addresses:
        _check_address(address)
    for name, secret in (("raft_secret", settings.raft_secret), ("api_secret", settings.api_secret)):
        if len(secret) < MIN_SECRET_LENGTH:
            raise ConfigError(f"{name} is shorter than {MIN_SECRET_LENGTH} characters")
    _check_times(settings)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{address!r} is not an address", hint="write it as host:port, such as 10.0.0.1:7101")


def _check_times(settings: NodeSettings) -> None:
    shortest, longest = settings.election_seconds
    if not 0 < settings.heartbeat_seconds < shortest < longest:
        raise ConfigError("heartbeat_seconds must be less than both election_seconds, which must rise")
    if settings.entries_until_snapshot < 1:
        raise ConfigError("entries_until_snapshot must be at least 1")
