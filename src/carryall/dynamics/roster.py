"""Who moves which systems of a batch: looked at again only when the status was changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.dynamics.forces import Snapshot

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics


@dataclass(frozen=True, eq=False)
class Active:
    """A part of an engine and the systems that it moves: mask (n_systems,) bool, None for all, and their number."""

    part: BaseDynamics
    mask: Tensor | None
    count: int


@dataclass(frozen=True, eq=False)
class Standing:
    """Parts with systems, and all systems that are not done: mask (n_systems,) bool, None for all, and their number."""

    active: list[Active]
    mask: Tensor | None
    count: int


class Roster:
    """Remembers the standing of a status, and which systems have just entered and have no forces yet."""

    def __init__(self) -> None:
        self.unprimed: Tensor | None = None
        """(n_systems,) bool; None where all have forces."""
        self._known: tuple[Snapshot, Standing] | None = None

    def standing(self, status: Tensor, parts: Sequence[BaseDynamics], part_masks: Callable[[Tensor], list[Tensor]]) -> Standing:
        """Who moves what for a status (n_systems,) int64; systems without forces count as running."""
        if self._known is None or not self._known[0].holds(status):
            self._known = (Snapshot.of(status), _standing(status, parts, part_masks(status)))
        return self._known[1]

    def moving(self, standing: Standing) -> list[Active]:
        """The parts with the systems that have forces to move by."""
        if self.unprimed is None:
            return standing.active
        primed = ~self.unprimed
        return [Active(one.part, within(primed, one.mask), one.count) for one in standing.active]


def _standing(status: Tensor, parts: Sequence[BaseDynamics], masks: list[Tensor]) -> Standing:
    # one wait for the device
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    whole, total = len(status), sum(counts)
    active = [
        Active(part, None if count == whole else mask, count)
        for part, mask, count in zip(parts, masks, counts, strict=True)
        if count
    ]
    mask = None if total == whole else masks[0] if len(masks) == 1 else torch.stack(masks).any(0)
    return Standing(active, mask, total)


def within(found: Tensor, mask: Tensor | None) -> Tensor:
    """`found` where `mask` is true; None stands for all true."""
    return found if mask is None else found & mask
