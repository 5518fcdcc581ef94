"""Batches: the jobs of one ``map``, told by what they compute, so that the same map is found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from blixard.domain.state_machine import JobState


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """``identity`` hashes namespace, spec (with its code digest) and ordered inputs; ``generation`` counts fresh starts."""

    id: str
    namespace: str
    name: str
    identity: str
    generation: int
    total: int
    created_at: int
    counts: dict[JobState, int] = {}


def batch_identity(namespace: str, spec_text: str, inputs: Iterable[bytes]) -> str:
    """Return the hash that makes the same map the same: length-framed, so no two lists of inputs collide."""
    digest = hashlib.sha256()
    for part in (namespace.encode(), spec_text.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    for item in inputs:
        digest.update(len(item).to_bytes(8, "big") + item)
    return digest.hexdigest()


def batch_id(identity: str, generation: int) -> str:
    return f"map_{identity[:24]}_{generation}"


def batch_job_id(batch: str, index: int) -> str:
    """Return the id of the ``index``-th job: known before it is submitted, so submitting it again is harmless."""
    return f"{batch}.{index:08d}"
