"""Plans from global ids: every ghost gets its owner's row, whoever owns what; errors are raised on every rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, plan_from_ids
from ranks import ThreadTransport, run_ranks

SIZES = st.tuples(st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**32 - 1))


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_every_ghost_gets_its_owners_row_and_the_adjoint_returns_it(sizes: tuple[int, int, int]) -> None:
    size, n_atoms, seed = sizes
    rng = np.random.default_rng(seed)
    owner, names = rng.integers(0, size, n_atoms), torch.from_numpy(rng.choice(1000, n_atoms, replace=False))
    local = [names[owner == rank] for rank in range(size)]
    ghosts = [names[rng.integers(0, n_atoms, rng.integers(0, 9))] if n_atoms else names for _ in range(size)]
    weights = [torch.from_numpy(rng.normal(size=(len(part), 2))) for part in ghosts]

    def rank(transport: Transport) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine, foreign = local[transport.rank], ghosts[transport.rank]
        exchange = Exchange(plan_from_ids(mine, foreign, transport), transport)
        found = exchange.forward(torch.stack([mine, -mine], 1))
        assert torch.equal(found, torch.stack([foreign, -foreign], 1))
        sums = exchange.reverse(weights[transport.rank])
        assert torch.equal(exchange.all_reduce(ids(len(mine))), ids(n_atoms))
        return mine, sums, found

    total = torch.zeros(1000, 2, dtype=torch.float64)
    for part, weight in zip(ghosts, weights, strict=True):
        total.index_add_(0, part, weight)
    for mine, sums, _ in run_ranks(size, rank):
        assert torch.allclose(sums, total[mine], rtol=0, atol=1e-14)


def test_a_row_is_sent_once_and_own_images_not_at_all() -> None:
    def rank(transport: ThreadTransport) -> list[tuple[int, int]]:
        local, ghosts = [(ids(5, 7), ids(9, 9, 5, 9)), (ids(9), ids(9, 9)), (ids(), ids())][transport.rank]
        exchange = Exchange(plan_from_ids(local, ghosts, transport), transport)
        rows = torch.rand(len(local), 3, dtype=torch.float32)
        assert exchange.forward(rows).shape == (len(ghosts), 3)
        exchange.reverse(exchange.forward(rows))
        return transport.messages

    # rank 1 sends 9 to rank 0 twice over, which once returns the sum of its three; rank 2 has no part in it
    assert run_ranks(3, rank) == [[(1, 12)], [(0, 12), (0, 12)], []]


@pytest.mark.parametrize(
    ("local", "ghosts", "message"),
    [
        ([ids(1, 2), ids(3)], [ids(3), ids(4)], "rank 1: atom id 4 is a ghost here but no rank owns it"),
        ([ids(1, 2), ids(3, 2)], [ids(), ids()], "rank 0: atom id 2 is owned twice"),
        ([ids(1, 1), ids(3)], [ids(), ids()], "rank 0: atom id 1 is owned twice"),
        ([ids(1), ids(-3)], [ids(), ids()], r"rank 1: local_ids\[0\] is -3: ids are not negative"),
        ([ids(1), ids(3)], [ids(), ids(1).float()], "rank 1: ghost_ids has shape .* expected .n,. int64 on cpu"),
    ],
)
def test_errors_are_raised_on_every_rank(local: list[torch.Tensor], ghosts: list[torch.Tensor], message: str) -> None:
    def rank(transport: Transport) -> None:
        with pytest.raises(InputError, match=message):
            plan_from_ids(local[transport.rank], ghosts[transport.rank], transport)

    run_ranks(2, rank)


def on_two_ranks(problem: Callable[[int], Exception | None]) -> list[str]:
    def rank(transport: Transport) -> str:
        exchange = Exchange(plan_from_ids(ids(transport.rank), ids(), transport), transport)
        with pytest.raises(InputError) as caught, exchange.together():  # noqa: PT012
            if (error := problem(transport.rank)) is not None:
                raise error
        return str(caught.value)

    return run_ranks(2, rank)


def test_what_fails_on_one_rank_fails_on_all() -> None:
    assert on_two_ranks(lambda rank: ValueError("no such type") if rank else None) == ["rank 1: no such type"] * 2
    assert on_two_ranks(lambda rank: KeyError()) == ["rank 0: KeyError; rank 1: KeyError"] * 2
