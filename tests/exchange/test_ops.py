"""The ops: adjoint to each other, to any order and for any rows; errors that name what is wrong; nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carryall.errors import InputError
from carryall.exchange import Exchange, handles, ops, serial_exchange

OWNER = [2, 0, 2, 1, 2]
N_LOCAL, N_GHOST = 4, len(OWNER)


@pytest.fixture
def exchange() -> Exchange:
    return serial_exchange(N_LOCAL, torch.tensor(OWNER))


def inputs(op: Any, exchange: Exchange, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    token = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    if op is ops.all_reduce:
        return rows, exchange.handle(), token
    return rows, torch.arange(N_LOCAL), torch.arange(N_GHOST), exchange.handle(), token


def rows_of(op: Any) -> int:
    return N_GHOST if op is ops.exchange_reverse else N_LOCAL


OPS = pytest.mark.parametrize("op", [ops.exchange_forward, ops.exchange_reverse, ops.all_reduce], ids=str)


@OPS
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 1, 3)], ids=str)
def test_opcheck(op: Any, exchange: Exchange, shape: tuple[int, ...]) -> None:
    rows = torch.randn(rows_of(op), *shape, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, inputs(op, exchange, rows))


@OPS
def test_derivatives_of_any_order(op: Any, exchange: Exchange) -> None:
    rows = torch.randn(rows_of(op), 2, dtype=torch.float64, requires_grad=True)
    first, *rest, token = inputs(op, exchange, rows)

    def function(rows: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return op(rows**3, *rest, token)

    assert torch.autograd.gradcheck(function, (first, token))
    assert torch.autograd.gradgradcheck(function, (first, token))
    value, _ = function(first, token)
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), first, create_graph=True)
    counts = torch.tensor([1, 1, 3, 0])
    weights = {ops.exchange_forward: counts, ops.exchange_reverse: torch.ones(N_GHOST), ops.all_reduce: torch.ones(N_LOCAL)}
    assert torch.equal(value, 6.0 * weights[op][:, None].expand_as(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 1, 3)], ids=str)
def test_any_dtype_and_trailing_shape(exchange: Exchange, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.randint(0, 5, (N_LOCAL, *shape)).to(dtype)
    # a view with an offset, as compiled code hands over
    view = torch.cat([rows[:1], rows])[1:]
    found, token = ops.exchange_forward(*inputs(ops.exchange_forward, exchange, view))
    assert torch.equal(found, rows[OWNER])
    assert found.dtype == dtype
    assert token.tolist() == [0.0]
    if dtype == torch.bool:
        return
    back, _ = ops.exchange_reverse(*inputs(ops.exchange_reverse, exchange, found))
    assert torch.equal(
        back, rows * torch.bincount(torch.tensor(OWNER), minlength=N_LOCAL).to(dtype).reshape(-1, *[1] * len(shape))
    )


def test_integer_rows_pass_the_token_on_in_the_derivative(exchange: Exchange) -> None:
    *rest, token = inputs(ops.exchange_forward, exchange, torch.arange(N_LOCAL))
    _, after = ops.exchange_forward(*rest, token)
    (gradient,) = torch.autograd.grad(after.sum(), token)
    assert gradient.tolist() == [1.0]


def test_no_atoms_and_no_ghosts() -> None:
    for n_local, owner in ((0, []), (3, [])):
        exchange = serial_exchange(n_local, torch.tensor(owner, dtype=torch.int64))
        assert exchange.forward(torch.zeros(n_local, 2)).shape == (0, 2)
        assert exchange.reverse(torch.zeros(0, 2)).tolist() == [[0.0, 0.0]] * n_local


def test_a_derivative_is_an_exchange_whether_or_not_it_is_used(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks whose results do not depend on a ghost still take part in the reverse."""
    calls = []
    monkeypatch.setattr(exchange, "reverse", lambda rows: calls.append(rows.clone()) or torch.zeros(N_LOCAL, 2))
    first, *rest, token = inputs(ops.exchange_forward, exchange, torch.randn(N_LOCAL, 2))
    _, after = ops.exchange_forward(first, *rest, token)
    after.sum().backward()
    assert [call.tolist() for call in calls] == [[[0.0, 0.0]] * N_GHOST]


# -- errors


def test_errors_name_what_is_wrong(exchange: Exchange) -> None:
    first, local, ghost, handle, token = inputs(ops.exchange_forward, exchange, torch.zeros(N_LOCAL, 2))
    with pytest.raises(InputError, match="rank 0: 3 rows to exchange, but the plan is for 4 local atoms"):
        ops.exchange_forward(first[:3], local, ghost, handle, token)
    with pytest.raises(InputError, match="rank 0: 4 rows to exchange, but the plan is for 5 ghost atoms"):
        ops.exchange_reverse(first, local, ghost, handle, token)
    with pytest.raises(InputError, match="plan is for 4 local and 5 ghost atoms, but the graph has 4 and 6"):
        ops.exchange_forward(first, local, torch.arange(6), handle, token)
    with pytest.raises(InputError, match="there is no exchange with handle 123456789"):
        ops.exchange_forward(first, local, ghost, torch.tensor([123456789]), token)
    with pytest.raises(InputError, match=r"ghost_owner\[1\] is 4, expected 0 to 3"):
        serial_exchange(4, torch.tensor([0, 4]))


def test_nothing_is_left_behind() -> None:
    exchange = serial_exchange(N_LOCAL, torch.tensor(OWNER))
    handle, number = exchange.handle(), exchange.number
    assert handles.find(handle) is exchange
    del exchange
    assert handles.find(handle).number == number, "its handle keeps it"
    del handle
    assert number not in handles._exchanges
    with pytest.raises(InputError, match=f"there is no exchange with handle {number}: it was freed"):
        handles.find(torch.tensor([number]))


def test_a_result_keeps_its_exchange() -> None:
    """Training differentiates long after the call."""

    def loss(rows: torch.Tensor) -> torch.Tensor:
        first, *rest = inputs(ops.exchange_forward, serial_exchange(N_LOCAL, torch.tensor(OWNER)), rows)
        return ops.exchange_forward(first, *rest)[0].sum()

    rows = torch.randn(N_LOCAL, dtype=torch.float64, requires_grad=True)
    value = loss(rows)
    value.backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [1.0, 1.0, 3.0, 0.0]
