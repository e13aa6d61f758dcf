"""Random numbers per system: distributions against scipy's, and independence of everything but the counter."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from carryall.dynamics import system_noise
from carryall.dynamics.noise import Stream
from carryall.dynamics.system_noise import FIRST_TRIAL, normal_and_chi_squared, normal_rows

STREAM = Stream.VELOCITY_RESCALING
THREE_SIGMA = 0.0027
"""Probability of what lies beyond three standard errors."""


def draws(n, degrees, seed=1, first=0, step=0):
    system = torch.arange(first, first + n)
    degrees = torch.full((n,), float(degrees), dtype=torch.float64)
    return normal_and_chi_squared(seed, STREAM, system, torch.full((n,), step), degrees)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 95, 30000])
def test_sums_of_squares_are_chi_squared(degrees):
    normal, total = draws(20000, degrees)
    assert stats.kstest(total.numpy(), stats.chi2(degrees).cdf).pvalue > THREE_SIGMA
    assert stats.kstest(normal.numpy(), stats.norm.cdf).pvalue > THREE_SIGMA
    assert abs(np.corrcoef(normal, total)[0, 1]) < 3 / 20000**0.5
    assert abs(np.corrcoef(normal.square(), total)[0, 1]) < 3 / 20000**0.5


def test_no_square_sums_to_nothing():
    assert not draws(10, 0)[1].any()


def test_rows_are_independent_normals():
    rows = normal_rows(3, STREAM, torch.arange(20000), torch.zeros(20000, dtype=torch.int64), 7)
    assert rows.shape == (20000, 7)
    assert stats.kstest(rows.flatten().numpy(), stats.norm.cdf).pvalue > THREE_SIGMA
    correlation = np.corrcoef(rows.T) - np.eye(7)
    # 21 pairs: the largest of them, at the same probability
    assert np.abs(correlation).max() < stats.norm.isf(THREE_SIGMA / 42) / 20000**0.5


def test_a_number_depends_on_its_own_counter_only():
    degrees = torch.arange(40, dtype=torch.float64)
    system, step = torch.arange(40) * 7, torch.arange(40) + 2**33
    whole = normal_and_chi_squared(5, STREAM, system, step, degrees)
    rows = normal_rows(5, STREAM, system, step, 4)
    for size in (1, 2, 3, 5, 9):
        for start in range(0, 40 - size, size):
            part = slice(start, start + size)
            found = normal_and_chi_squared(5, STREAM, system[part], step[part], degrees[part])
            assert all(torch.equal(one, every[part]) for one, every in zip(found, whole, strict=True))
            assert torch.equal(normal_rows(5, STREAM, system[part], step[part], 4), rows[part])


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 1}, {"step": 2**32}, {"first": 10**6}, {"seed": 2**40 + 1}])
def test_every_part_of_the_counter_gives_independent_numbers(change):
    for one, other in zip(draws(20000, 5), draws(20000, 5, **change), strict=True):
        assert not (one == other).any()
        assert abs(np.corrcoef(one, other)[0, 1]) < 3 / 20000**0.5


def test_both_functions_can_share_a_stream():
    count = 3 * FIRST_TRIAL - 3
    rows = normal_rows(1, STREAM, torch.tensor([4]), torch.tensor([9]), count)[0]
    single = normal_and_chi_squared(1, STREAM, torch.tensor([4]), torch.tensor([9]), torch.ones(1, dtype=torch.float64))
    assert not torch.isin(torch.cat([single[0], single[1].sqrt()]), rows.abs()).any()


def test_no_number_repeats_over_steps_and_systems():
    found = [draws(50, 6, first=first, step=step)[1] for first, step in itertools.product((0, 50), range(4))]
    assert len(torch.cat(found).unique()) == 400


def test_tensors_take_the_same_way_as_arrays(monkeypatch):
    # what a device other than the CPU does
    arrays = system_noise._trial_words
    expected = draws(5000, 6)
    monkeypatch.setattr(system_noise, "_trial_words", lambda *counter: torch.from_numpy(arrays(*counter)))
    for one, other in zip(draws(5000, 6), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
