"""Exchanges of one call of a model: which exchange, and in what order.

Models never see this: the graph of a call carries it, and `communicate` and `all_reduce` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange import ExchangeGraph, ops, own_ghosts
from carryall.exchange.handles import Exchange
from carryall.exchange.serial import serial_exchange


class ReplaceableGraph(ExchangeGraph, Protocol):
    """An immutable graph of which copies with other fields are made."""

    def replace(self, **changes: Any) -> Self:
        """The copy."""
        ...


G = TypeVar("G", bound=ReplaceableGraph)


@dataclass(eq=False)
class ExchangeContext:
    """Sizes, handle and order of the exchanges of one call; of its own for each call, since the token moves on."""

    local: Tensor
    """(n_local,) int64, 0, 1, ..., n_local - 1."""
    ghost: Tensor
    """(n_ghost,) int64, n_local, n_local + 1, ..., n_atoms - 1: the rows of ghosts."""
    handle: Tensor
    """(1,) int64 on the CPU."""
    token: Tensor
    """(1,) float64 on the CPU, always 0: each exchange takes the token of the one before."""

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Errors of an exchange as they were raised; compiled code makes RuntimeErrors of them."""
        try:
            yield
        except RuntimeError as error:
            exchange: Exchange | None = getattr(self.handle, "exchange", None)
            failure = None if exchange is None else exchange.failure
            if exchange is None or failure is None or failure is error:
                raise
            exchange.failure = None
            raise failure from None

    def ghosts(self, rows: Tensor) -> Tensor:
        """(n_local, ...) to (n_ghost, ...)."""
        found, self.token = ops.exchange_forward(rows, self.local, self.ghost, self.handle, self.token)
        return found

    def owners(self, rows: Tensor) -> Tensor:
        """(n_ghost, ...) to (n_local, ...)."""
        found, self.token = ops.exchange_reverse(rows, self.local, self.ghost, self.handle, self.token)
        return found

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        found, self.token = ops.all_reduce(values, self.handle, self.token)
        return found


def open_exchange(graph: G, prepare: Callable[[G], G] | None = None) -> G:
    """The graph with the context of one call, from its `exchange`, or from `ghost_owner` where one process owns all atoms.

    Collective. `prepare` gets the graph first. InputError, on every rank, when that fails on one, and when a rank's graph is
    not the one of its plan. A graph that has a context is returned as it is.
    """
    if isinstance(graph.exchange, ExchangeContext):
        return graph
    exchange = _own_exchange(graph) if graph.exchange is None else graph.exchange
    if not isinstance(exchange, Exchange):
        raise InputError(f"graph.exchange is a {type(exchange).__name__}, expected a carryall.exchange.Exchange")
    with exchange.together():
        if problem := exchange.plan.misfit(graph.n_local, graph.n_atoms - graph.n_local):
            raise InputError(problem)
        ready = graph if prepare is None else prepare(graph)
        local, ghost = exchange.rows_of(ready.device)
    token = torch.zeros(1, dtype=torch.float64)
    return ready.replace(exchange=ExchangeContext(local, ghost, exchange.handle(), token))


def _own_exchange(graph: ExchangeGraph) -> Exchange:
    owner = own_ghosts(graph)
    return serial_exchange(graph.n_local, torch.zeros(0, dtype=torch.int64) if owner is None else owner)
