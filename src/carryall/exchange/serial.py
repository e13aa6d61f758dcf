"""One process: ghosts are images of its own atoms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carryall.exchange.handles import Exchange
from carryall.exchange.plan import plan_from_owners
from carryall.exchange.transport import Messages


class SerialTransport:
    """The group of one."""

    rank = 0
    size = 1

    def device(self, device: torch.device) -> torch.device:
        """Data stays where it is."""
        return device

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        """There is nobody to send to."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over one."""
        return values.clone()

    def all_to_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """What it sends itself."""
        return [row.clone() for row in rows]


def serial_exchange(n_local: int, ghost_owner: Tensor) -> Exchange:
    """The exchange of a process that owns the atoms all its ghosts are images of, ghost_owner (n_ghost,) int64."""
    return Exchange(plan_from_owners(n_local, ghost_owner), SerialTransport())
