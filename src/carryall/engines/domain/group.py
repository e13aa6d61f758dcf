"""The ranks that share one system: torch.distributed under torchrun, or this process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import Tensor

from carryall.exchange import SerialTransport, Transport

TIMEOUT = timedelta(minutes=10)
"""Of a message that does not come, where its sender still lives; of one that has died, others know at once."""


def ranks_of_torchrun() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined() -> Iterator[Transport]:
    """The transport between the ranks that torchrun started, or of one process. An open process group is used and kept.

    A rank that leaves by an exception ends its connections, so that the others' next exchange fails and they end too.
    """
    import torch.distributed as dist

    if not dist.is_available() or (ranks_of_torchrun() == 1 and not dist.is_initialized()):
        yield SerialTransport()
        return
    from carryall.exchange.distributed import DistributedTransport

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    yield DistributedTransport()
    if own:
        # nobody leaves while others still read what it sent
        dist.barrier()
        dist.destroy_process_group()


class RankGroup:
    """Sums and maxima over the ranks that share a system of `n_atoms`; all collective."""

    def __init__(self, transport: Transport, n_atoms: int) -> None:
        self.transport, self._n_atoms = transport, n_atoms

    @property
    def rank(self) -> int:
        """This process among the `size`."""
        return self.transport.rank

    @property
    def size(self) -> int:
        """Ranks."""
        return self.transport.size

    @property
    def n_atoms(self) -> int:
        """Atoms of the whole system."""
        return self._n_atoms

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, bit by bit the same on each."""
        return self.transport.all_reduce(values) if self.size > 1 else values

    def gathered(self, values: Tensor) -> Tensor:
        """(size, k) of what each rank gives, (k,) float64: a few numbers."""
        if self.size == 1:
            return values[None]
        rows = values.new_zeros(self.size, len(values))
        rows[self.rank] = values
        return self.transport.all_reduce(rows)

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over ranks of each of (k,) float64; NaN wins."""
        return self.gathered(values).amax(0)
