"""Loopback addresses for nodes: no two tests meet, whichever run at once."""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

from blixard.storage.hiqlite.settings import Member, NodeSettings

RAFT_PORT = 7101
API_PORT = 7102


def pick_host() -> str:
    """Return an address of 127.0.0.0/8 that nobody else uses: one of sixteen million, so ports can be fixed."""
    parts = [1 + secrets.randbelow(254) for _ in range(3)]
    return "127." + ".".join(map(str, parts))


def make_member(node_id: int) -> Member:
    host = pick_host()
    return Member(id=node_id, raft=f"{host}:{RAFT_PORT}", api=f"{host}:{API_PORT}")


def make_settings(node_id: int, members: tuple[Member, ...], data_dir: Path) -> NodeSettings:
    own = next(member for member in members if member.id == node_id)
    return NodeSettings(
        node_id=node_id,
        members=members,
        data_dir=data_dir,
        raft_secret="raft secret of a test",
        api_secret="api secret of a test",
        listen=own.raft.rpartition(":")[0],
    )


def make_single(data_dir: Path) -> NodeSettings:
    """Return the settings of a cluster of one node, which starts quickly: it looks for others during five heartbeats."""
    settings = make_settings(1, (make_member(1),), data_dir)
    return msgspec.structs.replace(settings, heartbeat_seconds=0.02, election_seconds=(0.1, 0.2))
