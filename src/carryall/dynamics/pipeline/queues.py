"""Systems that wait for a stage: who of them fits into the room that a rank has, none passed over for ever."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable

from carryall.dynamics.pipeline.books import Waiting
from carryall.dynamics.samplers import Room

LOOK_AHEAD = 256
"""How many systems of a queue are looked at for those that fit."""


class StageQueue:
    """The systems that wait for one stage, the oldest first."""

    def __init__(self, systems: Iterable[Waiting] = ()) -> None:
        self._waiting = deque(systems)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, systems: Iterable[Waiting]) -> None:
        """Systems come in."""
        self._waiting.extend(systems)

    def drop(self, ids: Container[int]) -> None:
        """Systems are done already."""
        self._waiting = deque(one for one in self._waiting if one.id not in ids)

    def take(self, room: Room, must: bool, most: int | None = None) -> list[Waiting]:
        """Systems that fit into `room`, at most `most`; the oldest in any case where `must` says so and none fits."""
        systems = min(one for one in (room.n_systems, most, len(self)) if one is not None)
        atoms = math.inf if room.n_atoms is None else room.n_atoms
        taken: list[Waiting] = []
        passed: list[Waiting] = []
        while self._waiting and len(taken) < systems and len(passed) < LOOK_AHEAD:
            one = self._waiting.popleft()
            if one.n_atoms > atoms:
                passed.append(one)
                continue
            taken.append(one)
            atoms -= one.n_atoms
        self._waiting.extendleft(reversed(passed))
        if must and not taken and self._waiting:
            taken.append(self._waiting.popleft())
        return taken
