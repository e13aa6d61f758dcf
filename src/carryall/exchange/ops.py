"""Exchanges as ops of a program, each the derivative of the other to any order.

    carryall::exchange_forward(rows, local, ghost, handle, token) -> (ghost rows, token')      (n_local, ...) to (n_ghost, ...)
    carryall::exchange_reverse(rows, local, ghost, handle, token) -> (local rows, token')      (n_ghost, ...) to (n_local, ...)
    carryall::all_reduce(values, handle, token) -> (sum, token')                               its own derivative

`local` (n_local,) and `ghost` (n_ghost,) carry sizes, so that no size depends on data; `handle` (1,) int64 says which exchange;
`token` (1,) float64 is handed from each op to the next, in the derivative too, so that no compiler can reorder or drop one:
ranks would wait for each other for ever. The derivative of an exchange of floating-point rows is an exchange whether or not it
is used, for the same reason. What is differentiated is the sum over ranks, each of which seeds its own part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.handles import Exchange, find


@torch.library.custom_op("carryall::exchange_forward", mutates_args=())
def exchange_forward(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """(n_local, ...) rows to those of ghosts (n_ghost, ...)."""
    return _run(_checked(local, ghost, handle), "forward", rows), token.clone()


@torch.library.custom_op("carryall::exchange_reverse", mutates_args=())
def exchange_reverse(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """(n_ghost, ...) rows to their sums by owner (n_local, ...)."""
    return _run(_checked(local, ghost, handle), "reverse", rows), token.clone()


@torch.library.custom_op("carryall::all_reduce", mutates_args=())
def all_reduce(values: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over ranks, of any shape."""
    return _run(find(handle), "all_reduce", values), token.clone()


def _run(exchange: Exchange, method: str, rows: Tensor) -> Tensor:
    try:
        found: Tensor = getattr(exchange, method)(rows)
    except Exception as error:
        exchange.failure = error
        raise
    return found


def _checked(local: Tensor, ghost: Tensor, handle: Tensor) -> Exchange:
    exchange = find(handle)
    if problem := exchange.plan.misfit(local.shape[0], ghost.shape[0]):
        raise InputError(f"rank {exchange.transport.rank}: {problem}")
    return exchange


@exchange_forward.register_fake
def _(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty((ghost.shape[0], *rows.shape[1:])), torch.empty_like(token)


@exchange_reverse.register_fake
def _(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty((local.shape[0], *rows.shape[1:])), torch.empty_like(token)


@all_reduce.register_fake
def _(values: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), torch.empty_like(token)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.floating = inputs[0].is_floating_point()
    ctx.save_for_backward(*inputs[1:-1])


def _forward_backward(ctx: Any, gradient: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
    rows, token = exchange_reverse(gradient, *ctx.saved_tensors, token) if ctx.floating else (None, token)
    return rows, None, None, None, token


def _reverse_backward(ctx: Any, gradient: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
    rows, token = exchange_forward(gradient, *ctx.saved_tensors, token) if ctx.floating else (None, token)
    return rows, None, None, None, token


def _all_reduce_backward(ctx: Any, gradient: Tensor, token: Tensor) -> tuple[Tensor | None, ...]:
    values, token = all_reduce(gradient, *ctx.saved_tensors, token) if ctx.floating else (None, token)
    return values, None, token


exchange_forward.register_autograd(_forward_backward, setup_context=_save)
exchange_reverse.register_autograd(_reverse_backward, setup_context=_save)
all_reduce.register_autograd(_all_reduce_backward, setup_context=_save)
