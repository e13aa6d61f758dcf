"""Ranks of torch.distributed, point to point: `torchrun` and no further package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.transport import Messages


class DistributedTransport:
    """A group of torch.distributed, the default one when None; gloo takes messages on the CPU, other backends where data is."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "torch.distributed has no process group: call torch.distributed.init_process_group('gloo') first, "
                "in a script started by torchrun"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._on_cpu = dist.get_backend(group) == "gloo"

    def device(self, device: torch.device) -> torch.device:
        """The CPU under gloo."""
        return torch.device("cpu") if self._on_cpu else device

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        """All at once; returns when all is there."""
        operations = [dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=peer) for peer, buffer in receives]
        operations += [dist.P2POp(dist.isend, buffer, group=self.group, group_peer=peer) for peer, buffer in sends]
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the group."""
        total = values.detach().clone(memory_format=torch.contiguous_format).to(self.device(values.device))
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def all_to_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Lengths first, then the vectors."""
        counts = torch.tensor([len(row) for row in rows])
        lengths = torch.empty_like(counts)
        dist.all_to_all_single(lengths, counts, group=self.group)
        sizes: list[int] = lengths.tolist()
        found = torch.empty(sum(sizes), dtype=torch.int64)
        dist.all_to_all_single(found, torch.cat(list(rows)), sizes, counts.tolist(), group=self.group)
        return list(found.split(sizes))
