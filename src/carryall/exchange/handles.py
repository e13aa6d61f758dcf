"""An exchange and its handle: the number by which an op inside a program finds it.

A program knows only the op's name and schema and gets the handle as a tensor; who moves the rows is decided where it runs.
The registry holds no exchange alive: whoever has it does, and the handle's tensor, so also what autograd saved of that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.plan import ExchangePlan, Ranges
from carryall.exchange.transport import Transport, agree

_exchanges: WeakValueDictionary[int, Exchange] = WeakValueDictionary()
_numbers = itertools.count(1)


class Exchange:
    """A plan and the transport that carries it out: the `exchange` of a graph whose ghosts belong to other ranks.

    Its methods move values and have no derivative; inside a potential's call exchanges are ops, which have.
    """

    def __init__(self, plan: ExchangePlan, transport: Transport) -> None:
        self.plan, self.transport, self.number = plan, transport, next(_numbers)
        self.failure: Exception | None = None
        self._plans: dict[torch.device, ExchangePlan] = {}
        self._rows: dict[torch.device, tuple[Tensor, Tensor]] = {}
        _exchanges[self.number] = self

    def handle(self) -> Tensor:
        """(1,) int64 on the CPU; the exchange lives as long as this tensor does."""
        handle = torch.tensor([self.number])
        handle.exchange = self  # type: ignore[attr-defined]
        return handle

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank inside fails on all, which nobody waits for then; collective, and nothing inside may be."""
        try:
            yield
        except Exception as error:
            if self.transport.size > 1:
                agree(self.transport, str(error) or type(error).__name__)
            raise
        agree(self.transport, None)

    def rows_of(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(n_local,) and (n_ghost,) int64, the rows of a graph that are local and those that are ghosts; do not change them."""
        if device not in self._rows:
            every = torch.arange(self.plan.n_local + self.plan.n_ghost, device=device)
            self._rows[device] = every[: self.plan.n_local].clone(), every[self.plan.n_local :].clone()
        return self._rows[device]

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """(n_local, ...) rows of owned atoms to (n_ghost, ...), those of the ghosts' owners."""
        plan, flat = self._flat(rows, self.plan.n_local, "local")
        if self.transport.size > 1:
            own, flat = flat, flat.new_empty(plan.n_local + plan.n_received, flat.shape[1])
            flat[: plan.n_local] = own
            self._swap(own.index_select(0, plan.send_row), plan.sends, flat[plan.n_local :], plan.receives)
        return flat.index_select(0, plan.source).reshape(plan.n_ghost, *rows.shape[1:])

    @torch.no_grad()
    def reverse(self, rows: Tensor) -> Tensor:
        """(n_ghost, ...) rows of ghosts to (n_local, ...), their sums by owner; the adjoint of `forward`."""
        plan, flat = self._flat(rows, self.plan.n_ghost, "ghost")
        # images and what goes to other ranks in one sum, the latter behind the own atoms
        both = flat.new_zeros(plan.n_local + plan.n_received, flat.shape[1]).index_add_(0, plan.source, flat)
        sums = both[: plan.n_local]
        if self.transport.size > 1:
            found = flat.new_empty(len(plan.send_row), flat.shape[1])
            self._swap(both[plan.n_local :], plan.receives, found, plan.sends)
            sums.index_add_(0, plan.send_row, found)
        return sums.reshape(plan.n_local, *rows.shape[1:])

    @torch.no_grad()
    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, of numbers."""
        if values.dtype == torch.bool:
            raise InputError(
                f"rank {self.transport.rank}: all_reduce sums numbers, not bool: convert them, for example to int64"
            )
        return values.clone() if self.transport.size == 1 else self.transport.all_reduce(values)

    def _flat(self, rows: Tensor, expected: int, kind: str) -> tuple[ExchangePlan, Tensor]:
        if rows.dim() == 0 or rows.shape[0] != expected:
            found = f"{rows.shape[0]} rows" if rows.dim() else "no rows"
            raise InputError(
                f"rank {self.transport.rank}: {found} to exchange, but the plan is for {expected} {kind} atoms: "
                "one row for each, or the plan belongs to another graph"
            )
        if rows.device not in self._plans:
            self._plans[rows.device] = self.plan.to(rows.device)
        # not -1 for the width: it is ambiguous without rows
        return self._plans[rows.device], rows.reshape(expected, math.prod(rows.shape[1:]))

    def _swap(self, rows: Tensor, sends: Ranges, found: Tensor, receives: Ranges) -> None:
        """Send the ranges of `rows` to peers, and fill those of `found`; both contiguous."""
        if not rows.shape[1]:
            return
        where = self.transport.device(rows.device)
        out, into = rows.to(where), found if found.device == where else torch.empty_like(found, device=where)
        # bytes, so that every dtype travels
        self.transport.send_receive(
            [(peer, out[begin:end].view(torch.uint8)) for peer, begin, end in sends],
            [(peer, into[begin:end].view(torch.uint8)) for peer, begin, end in receives],
        )
        if into is not found:
            found.copy_(into)


def find(handle: Tensor) -> Exchange:
    """The exchange of a handle; InputError when there is none."""
    number = int(handle)
    exchange = _exchanges.get(number)
    if exchange is None:
        raise InputError(
            f"there is no exchange with handle {number}: it was freed, or the handle is of another process; keep the Exchange "
            "as long as what was computed with it"
        )
    return exchange
