"""Requests to the cluster, repeated until an answer comes or the patience ends."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

import blixard_hiqlite
from blixard_hiqlite import Failure, Node, Operation

from blixard.errors import BlixardError, InternalError, OutcomeUnknown, StoreUnavailable
from blixard.storage.hiqlite.operations import Outcome, translate_trouble

WRITE_SECONDS = 15.0
"""How long a write is repeated while the cluster has no leader or does not answer."""
READ_SECONDS = 10.0
ATTEMPT_SECONDS = 1.5
"""How long one attempt waits: a request on a connection that has died hangs for ten seconds in the engine. Doubled with each further attempt."""
MAX_ATTEMPT_SECONDS = 6.0
LAG_SECONDS = 0.2
"""How long a local read waits for this node to catch up before the leader is asked instead."""
PAUSE_SECONDS = 0.02
MAX_PAUSE_SECONDS = 0.3

ORIGIN_BYTES = 16


class Patience:
    """The time of one request: how long each attempt and each pause may be."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._attempt = ATTEMPT_SECONDS
        self._pause = PAUSE_SECONDS

    def attempt(self) -> float:
        """Return how long the next attempt may take."""
        seconds, self._attempt = self._attempt, min(2 * self._attempt, MAX_ATTEMPT_SECONDS)
        return seconds

    async def pause(self) -> bool:
        """Wait a little. False once the time is over."""
        if time.monotonic() > self._deadline:
            return False
        await asyncio.sleep(self._pause)  # between attempts of one request: nothing tells when a leader will be there
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
        return True


class ReplicatedLog:
    """Writes and reads of one node, as of one process: one write request is away at a time.

    Each request has a number that grows and stays the same when it is repeated, so a repetition is answered and not carried
    out again. A request given up is overtaken by the next one: if it arrives after that, it is refused.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._origin = os.urandom(ORIGIN_BYTES)
        self._number = 0
        self._acknowledged = 0

    @property
    def acknowledged(self) -> int:
        """The last commit that this object has told a caller of."""
        return self._acknowledged

    async def write(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Carry out operations as one entry of the log; return the outcome of each once a majority has it on disk.

        Raises ``StoreUnavailable`` (nothing was done), ``OutcomeUnknown`` (nobody knows), ``InternalError``.
        """
        self._number += 1
        base, _ = self._node.progress()
        patience = Patience(WRITE_SECONDS)
        is_sent = False
        while True:
            try:
                commit, outcomes = await self._node.write(
                    operations, self._origin, self._number, base, patience.attempt()
                )
            except blixard_hiqlite.NoLeader as error:
                trouble: Exception = error
            except blixard_hiqlite.OutcomeUnknown as error:
                trouble, is_sent = error, True
            except blixard_hiqlite.HiqliteError as error:
                raise _translate(error, is_sent=is_sent) from error
            else:
                if commit == 0:
                    raise InternalError(f"the cluster could not carry out a request: {_first_message(outcomes)}")
                self._acknowledged = max(self._acknowledged, commit)
                return outcomes
            if self._node.trouble() is not None or not await patience.pause():
                raise self._give_up(trouble, is_sent=is_sent) from trouble

    async def read_at_leader(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Read what is true at the moment of the call, as the leader knows it. Raises ``StoreUnavailable`` without a leader."""
        patience = Patience(READ_SECONDS)
        while True:
            try:
                _, outcomes = await self._node.read(operations, True, self._acknowledged, patience.attempt())
            except (blixard_hiqlite.NoLeader, blixard_hiqlite.OutcomeUnknown, blixard_hiqlite.Behind) as error:
                if not await patience.pause():
                    raise self._give_up(error, is_sent=False) from error
            except blixard_hiqlite.HiqliteError as error:
                raise _translate(error, is_sent=False) from error
            else:
                return outcomes

    async def read_here(self, operations: Sequence[Operation]) -> Sequence[Outcome]:
        """Read what this node has, and at least what it has acknowledged. The leader is asked where this node lags behind."""
        try:
            _, outcomes = await self._node.read(operations, False, self._acknowledged, LAG_SECONDS)
        except blixard_hiqlite.Behind:
            return await self.read_at_leader(operations)
        except blixard_hiqlite.HiqliteError as error:
            raise _translate(error, is_sent=False) from error
        return outcomes

    def _give_up(self, error: Exception, *, is_sent: bool) -> BlixardError:
        if is_sent:
            return OutcomeUnknown(
                f"the cluster did not answer within {WRITE_SECONDS:.0f} s: {error}",
                hint="repeat the request with the same ids",
            )
        trouble = self._node.trouble()
        if trouble is not None:
            return translate_trouble(trouble)
        return StoreUnavailable(
            f"the cluster has no leader: {error}", hint="a majority of its nodes must run and reach each other"
        )


def _first_message(outcomes: Sequence[Outcome]) -> str:
    return next((outcome.message for outcome in outcomes if isinstance(outcome, Failure)), "nothing said why")


def _translate(error: blixard_hiqlite.HiqliteError, *, is_sent: bool) -> BlixardError:
    if isinstance(error, blixard_hiqlite.Refused):
        return InternalError(f"the cluster refused a request of ours: {error}")
    if is_sent or isinstance(error, blixard_hiqlite.Stale):
        return OutcomeUnknown(
            f"the node stopped before it knew the outcome: {error}", hint="repeat the request with the same ids"
        )
    return StoreUnavailable(f"this node of the cluster has stopped: {error}", hint="start the node again")
