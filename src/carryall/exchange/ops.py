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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.handles import Exchange, find

# not torch.library.custom_op: its first call imports the whole compiler, seconds on every rank, and each call costs more
_LIBRARY = torch.library.Library("carryall", "FRAGMENT")
_ROWS = "(Tensor rows, Tensor local, Tensor ghost, Tensor handle, Tensor token) -> (Tensor, Tensor)"
_VALUES = "(Tensor values, Tensor handle, Tensor token) -> (Tensor, Tensor)"
Op = Callable[..., tuple[Tensor, Tensor]]
Gradients = Callable[[Any, Tensor, Tensor], tuple[Tensor | None, ...]]


def _forward(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return _run(_checked(local, ghost, handle), "forward", rows), token.clone()


def _reverse(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return _run(_checked(local, ghost, handle), "reverse", rows), token.clone()


def _all_reduce(values: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
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


def _forward_shape(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty((ghost.shape[0], *rows.shape[1:])), torch.empty_like(token)


def _reverse_shape(rows: Tensor, local: Tensor, ghost: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty((local.shape[0], *rows.shape[1:])), torch.empty_like(token)


def _sum_shape(values: Tensor, handle: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), torch.empty_like(token)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.floating = inputs[0].is_floating_point() or inputs[0].is_complex()
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


def _op(name: str, schema: str, kernel: Op, shape: Op, gradients: Gradients) -> Op:
    """Define an op that runs `kernel`, whose outputs have the `shape` of what that function makes."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"carryall::{name}", shape, lib=_LIBRARY)
    torch.library.register_autograd(f"carryall::{name}", gradients, setup_context=_save, lib=_LIBRARY)
    op: Op = getattr(torch.ops.carryall, name).default
    return op


exchange_forward = _op("exchange_forward", _ROWS, _forward, _forward_shape, _forward_backward)
"""(n_local, ...) rows to those of ghosts (n_ghost, ...)."""
exchange_reverse = _op("exchange_reverse", _ROWS, _reverse, _reverse_shape, _reverse_backward)
"""(n_ghost, ...) rows to their sums by owner (n_local, ...)."""
all_reduce = _op("all_reduce", _VALUES, _all_reduce, _sum_shape, _all_reduce_backward)
"""The sum over ranks, of any shape."""
