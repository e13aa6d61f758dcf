"""Exchange in one process: identity without ghosts, a gather with them, its derivative, and its adjoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from carryall.errors import InputError
from carryall.exchange import all_reduce, communicate, serial_exchange, sum_to_owners
from carryall.graph import graph_from_structures
from structures import CUTOFF, add_ghosts, structure


def graph(owner: list[int] | None, n_local: int = 3) -> SimpleNamespace:
    ghosts = 4 if owner is None else len(owner)
    ghost_owner = None if owner is None else torch.tensor(owner)
    return SimpleNamespace(n_atoms=n_local + ghosts, n_local=n_local, ghost_owner=ghost_owner, exchange=None)


def test_without_ghosts_nothing_happens() -> None:
    features = torch.randn(3, 5)
    alone = SimpleNamespace(n_atoms=3, n_local=3, ghost_owner=None, exchange=None)
    for function in (communicate, all_reduce, sum_to_owners):
        assert function(features, alone) is features


def test_ghosts_get_their_owners_rows() -> None:
    features = torch.arange(6.0).reshape(3, 2)
    assert communicate(features, graph([2, 0, 2])).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [0, 1], [4, 5]]
    assert torch.equal(all_reduce(features, graph([2, 0, 2])), features)


def test_rows_of_ghosts_are_added_to_their_owners() -> None:
    assert sum_to_owners(torch.tensor([1, 2, 3, 10, 20, 40]), graph([2, 0, 2])).tolist() == [21, 2, 53]


def test_positions_communicate_to_images() -> None:
    local = graph_from_structures([structure("tilted", ["O"])], CUTOFF, ["O"])
    ghosted = add_ghosts(local)
    images = communicate(local.positions, ghosted)
    offsets = torch.linalg.solve(local.cell[0].T, (ghosted.positions - images).T).T
    assert torch.allclose(offsets, offsets.round(), rtol=0, atol=1e-12)
    assert not offsets[: local.n_atoms].any()
    assert offsets[local.n_atoms :].round().any(1).all()


def test_gradient_sums_into_the_owners_to_any_order() -> None:
    features = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    there = graph([2, 0, 2])

    def function(values: torch.Tensor) -> torch.Tensor:
        return communicate(values, there) ** 3

    assert torch.autograd.gradcheck(function, (features,))
    assert torch.autograd.gradgradcheck(function, (features,))
    communicate(features, there).sum().backward()
    assert features.grad is not None
    assert features.grad[:, 0].tolist() == [2.0, 1.0, 3.0]


def test_wrong_rows_and_foreign_ghosts_are_errors() -> None:
    with pytest.raises(InputError, match="features have 6 rows, expected one for each of the 3 local atoms"):
        communicate(torch.zeros(6, 1), graph([2, 0, 2]))
    with pytest.raises(InputError, match="values have 3 rows, expected one for each of the 6 atoms"):
        sum_to_owners(torch.zeros(3, 1), graph([2, 0, 2]))
    for function, rows in ((communicate, 3), (all_reduce, 3), (sum_to_owners, 7)):
        with pytest.raises(InputError, match="their owners are not in this process"):
            function(torch.zeros(rows, 1), graph(None))


def test_an_exchange_outside_a_call_moves_values_without_derivative() -> None:
    there = graph([2, 0, 2])
    there.exchange = serial_exchange(3, there.ghost_owner)
    values, every = torch.arange(6.0).reshape(3, 2, 1), torch.arange(12.0).reshape(6, 2)
    owners = SimpleNamespace(**{**vars(there), "exchange": None})
    assert torch.equal(communicate(values, there), communicate(values, owners))
    assert torch.equal(sum_to_owners(every, there), sum_to_owners(every, owners))
    assert torch.equal(all_reduce(values, there), values)
    for function, rows in ((communicate, values), (all_reduce, values), (sum_to_owners, every)):
        with pytest.raises(InputError, match="has a derivative only inside a call"):
            function(rows.clone().requires_grad_(), there)
