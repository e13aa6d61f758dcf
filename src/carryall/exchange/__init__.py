"""What makes a model parallel: features of ghosts from the atoms that own them, and sums over all owners.

A model calls `communicate` and `all_reduce` and knows nothing else. One process that owns all atoms needs no transport: a
ghost is an image of a local atom, and an exchange is a gather whose derivative (a sum into the owners) autograd knows to any
order. Where atoms are spread over ranks, the graph carries an `Exchange`: a plan of who needs which rows, and a transport.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.handles import Exchange
from carryall.exchange.plan import ExchangePlan, plan_from_ids, plan_from_owners
from carryall.exchange.serial import SerialTransport, serial_exchange
from carryall.exchange.transport import Transport

__all__ = [
    "Exchange",
    "ExchangeGraph",
    "ExchangePlan",
    "SerialTransport",
    "Transport",
    "all_reduce",
    "communicate",
    "plan_from_ids",
    "plan_from_owners",
    "serial_exchange",
    "sum_to_owners",
]


class ExchangeGraph(Protocol):
    """What an exchange needs to know of a graph."""

    @property
    def n_atoms(self) -> int:
        """Local and ghost atoms."""
        ...

    @property
    def n_local(self) -> int:
        """Owned atoms, which come first."""
        ...

    @property
    def ghost_owner(self) -> Tensor | None:
        """(n_ghost,) local atom that each ghost is an image of."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        ...

    @property
    def exchange(self) -> Any:
        """An `Exchange`, the `ExchangeContext` of the call that is under way, or None."""
        ...


def communicate(features: Tensor, graph: ExchangeGraph) -> Tensor:
    """(n_local, ...) features of owned atoms to (n_atoms, ...): ghost rows get the row of their owner.

    Any dtype, any trailing shape; every rank has to call it, one without atoms too. InputError when the rows are not the owned
    atoms', or when a ghost's owner is in no process that the graph knows of.
    """
    if features.shape[0] != graph.n_local:
        raise InputError(f"features have {features.shape[0]} rows, expected one for each of the {graph.n_local} local atoms")
    if graph.exchange is None:
        owner = own_ghosts(graph)
        return features if owner is None else torch.cat([features, features.index_select(0, owner)])
    if isinstance(graph.exchange, Exchange):
        _refuse_gradient(features)
        return torch.cat([features.detach(), graph.exchange.forward(features)])
    context = graph.exchange
    # placed by index: a program then knows that there are n_atoms rows, which the sum of two sizes would not tell it
    rows = features.new_zeros((graph.n_atoms, *features.shape[1:])).index_copy(0, context.local, features)
    return rows.index_copy(0, context.ghost, context.ghosts(features))


def sum_to_owners(values: Tensor, graph: ExchangeGraph) -> Tensor:
    """(n_atoms, ...) to (n_local, ...): rows of ghosts are added to their owners'; the adjoint of `communicate`.

    It makes the whole force of each owned atom of forces that a Potential returns, which has rows for ghosts.
    """
    n_local = graph.n_local
    if values.shape[0] != graph.n_atoms:
        raise InputError(f"values have {values.shape[0]} rows, expected one for each of the {graph.n_atoms} atoms")
    if graph.exchange is None:
        owner = own_ghosts(graph)
        return values if owner is None else values[:n_local].index_add(0, owner, values[n_local:])
    if isinstance(graph.exchange, Exchange):
        _refuse_gradient(values)
        return values[:n_local].detach() + graph.exchange.reverse(values[n_local:])
    context = graph.exchange
    return values.index_select(0, context.local) + context.owners(values.index_select(0, context.ghost))


def all_reduce(values: Tensor, graph: ExchangeGraph) -> Tensor:
    """The sum of `values` over all processes that share the graph; one process owns all of a graph without foreign ghosts."""
    if graph.exchange is None:
        own_ghosts(graph)
        return values
    if isinstance(graph.exchange, Exchange):
        _refuse_gradient(values)
        return graph.exchange.all_reduce(values)
    return graph.exchange.total(values)


def own_ghosts(graph: ExchangeGraph) -> Tensor | None:
    """Owners of the ghosts in this process, None where there are no ghosts; InputError when they are elsewhere."""
    if graph.n_atoms == graph.n_local:
        return None
    if graph.ghost_owner is None:
        raise InputError(
            f"the graph has {graph.n_atoms - graph.n_local} ghosts but neither ghost_owner nor exchange: their owners are not "
            "in this process; give graph.replace(exchange=Exchange(plan, transport))"
        )
    return graph.ghost_owner


def _refuse_gradient(values: Tensor) -> None:
    if values.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "an exchange has a derivative only inside a call: use a Potential, evaluate_model, or "
            "the graph that carryall.exchange.context.open_exchange returns"
        )
