"""The slots of a worker, shared by its backends: how many jobs run at the same time, of whatever kind."""

from __future__ import annotations

from collections import deque
from typing import Protocol


class SlotUser(Protocol):
    """A backend. Nothing but its own processes says how many slots it uses, so none can be lost or counted twice."""

    def busy_slots(self) -> int:
        """Return how many slots its jobs and what is left of them take now."""

    def wants_slot(self) -> bool:
        """Say whether a job waits for a slot."""

    def slot_is_free(self) -> None:
        """Try again, now or soon."""


class Slots:
    """Whoever asks in vain queues; so no backend can keep the others from running, however many jobs it has."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._users: list[SlotUser] = []
        self._hungry: deque[SlotUser] = deque()

    def join(self, user: SlotUser) -> None:
        self._users.append(user)

    def may_take(self, user: SlotUser) -> bool:
        """Say whether one more job may start now. If not, the user is told when to try again."""
        hungry = self._hungry
        while hungry and hungry[0] is not user and not hungry[0].wants_slot():
            hungry.popleft()
        has_room = self._has_room()
        if has_room and (not hungry or hungry[0] is user):
            if hungry:
                hungry.popleft()
            return True
        if user not in hungry:
            hungry.append(user)
        if has_room:
            hungry[0].slot_is_free()
        return False

    def must_yield(self, user: SlotUser) -> bool:
        """Say whether the user should let slots that it has run empty, since it has more than its share and others wait."""
        hungry = self._hungry
        if not hungry or (len(hungry) == 1 and hungry[0] is user):
            return False
        others = [other for other in hungry if other is not user and other.wants_slot()]
        if not others or user.busy_slots() <= self.total // (len(others) + 1):
            return False
        hungry.clear()
        hungry.extend([*others, user])
        return True

    def freed(self) -> None:
        """Tell those who wait that there may be room again."""
        for user in tuple(self._hungry):
            user.slot_is_free()

    def _has_room(self) -> bool:
        return sum(user.busy_slots() for user in self._users) < self.total
