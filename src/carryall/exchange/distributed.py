"""Ranks of torch.distributed, point to point: `torchrun` and no further package."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.transport import Messages, PeerError

PATIENCE = 300.0
"""Seconds that a rank waits for another, which may be compiling."""


class DistributedTransport:
    """A group of torch.distributed, the default one when None; gloo takes messages on the CPU, other backends where data is.

    A rank that waits for another for more than `timeout` seconds, or whose connection to it is closed, gets a PeerError; this
    becomes the timeout of the group's collectives too, which gloo would else wait half an hour for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = PATIENCE) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "torch.distributed has no process group: call torch.distributed.init_process_group('gloo') first, "
                "in a script started by torchrun"
            )
        if timeout <= 0:
            raise InputError(f"timeout is {timeout} s, expected more than 0")
        self.group, self.timeout = group, float(timeout)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._calls = 0
        if self._on_cpu:
            from torch.distributed.distributed_c10d import _set_pg_timeout

            _set_pg_timeout(timedelta(seconds=self.timeout), group)

    def device(self, device: torch.device) -> torch.device:
        """The CPU under gloo."""
        return torch.device("cpu") if self._on_cpu else device

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        """All at once; returns when all is there. PeerError when a peer is gone, or silent for too long."""
        self._calls += 1
        if not sends and not receives:
            return
        if not self._on_cpu:
            operations = [dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=peer) for peer, buffer in receives]
            operations += [dist.P2POp(dist.isend, buffer, group=self.group, group_peer=peer) for peer, buffer in sends]
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            return
        began, call = time.monotonic(), self._calls
        waits: list[tuple[str, dist.Work | None]] = []
        for peer, buffer in receives:
            what = f"{buffer.numel()} bytes from rank {peer}"
            with self._named(began, what, call):
                waits.append((what, dist.irecv(buffer, group=self.group, group_src=peer, tag=_tag(call, buffer))))
        for peer, buffer in sends:
            what = f"rank {peer} to take {buffer.numel()} bytes"
            with self._named(began, what, call):
                waits.append((what, dist.isend(buffer, group=self.group, group_dst=peer, tag=_tag(call, buffer))))
        for what, started in waits:
            with self._named(began, what, call):
                assert started is not None  # it is outside the group only
                started.wait(timedelta(seconds=max(0.001, self.timeout - (time.monotonic() - began))))

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the group."""
        total = values.detach().clone(memory_format=torch.contiguous_format).to(self.device(values.device))
        with self._named(time.monotonic(), "a sum over all ranks"):
            dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def all_to_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Lengths first, then the vectors."""
        # nccl has no messages between CPUs
        where = torch.device("cpu" if self._on_cpu else "cuda")
        counts = torch.tensor([len(row) for row in rows], device=where)
        lengths = torch.empty_like(counts)
        with self._named(time.monotonic(), "vectors from every rank"):
            dist.all_to_all_single(lengths, counts, group=self.group)
            sizes: list[int] = lengths.tolist()
            found = torch.empty(sum(sizes), dtype=torch.int64, device=where)
            dist.all_to_all_single(found, torch.cat(list(rows)).to(where), sizes, counts.tolist(), group=self.group)
        return list(found.cpu().split(sizes))

    @contextmanager
    def _named(self, began: float, what: str, call: int | None = None) -> Iterator[None]:
        """Errors of the backend as PeerErrors that say who waited for what."""
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - began
            exchange = "" if call is None else f" in exchange {call}"
            if waited < self.timeout:
                raise PeerError(
                    f"rank {self.rank} waited for {what}{exchange}, but the connection failed: another rank has ended; its own "
                    f"message says why ({_reason(error)})"
                ) from error
            raise PeerError(
                f"rank {self.rank} waited {waited:.0f} s for {what}{exchange}: the other rank hangs, works on something "
                "that takes longer, or makes other exchanges; DistributedTransport(timeout=...) sets how long to wait "
                f"({_reason(error)})"
            ) from error


def _tag(call: int, buffer: Tensor) -> int:
    """Of the call and the length, so that a message of another call or length is waited for in vain, not taken."""
    return (call % (1 << 15)) << 16 | buffer.numel() % 65521


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].split(". This is")[0]
