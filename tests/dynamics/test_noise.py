"""The random numbers: known answers, moments, and independence of everything but the counter."""

import numpy as np
import pytest
import torch

from carryall.dynamics import noise
from carryall.dynamics.noise import Stream, check_seed, normal_vectors, normals, philox
from carryall.errors import InputError
from carryall.native import library

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    column = np.array(counter, dtype=np.int64)[:, None]
    assert philox(column, key)[:, 0].tolist() == list(expected)
    assert philox(torch.from_numpy(column), key)[:, 0].tolist() == list(expected)


def vectors(n, seed=1, stream=Stream.THERMOSTAT, system=0, step=0):
    one = torch.ones(n, dtype=torch.int64)
    return normal_vectors(seed, stream, one * system, torch.arange(n), one * step)


def test_normals_have_the_moments_of_normals():
    x = vectors(40000).flatten()
    n = len(x)
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    y = vectors(40000)
    assert abs((y[:, 0] * y[:, 1]).mean()) < 4 / 40000**0.5
    assert abs((y[:-1, 0] * y[1:, 0]).mean()) < 4 / 40000**0.5


def test_torch_and_numpy_agree_to_rounding():
    words = torch.randint(0, 2**32, (4, 1000), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(normals(words).numpy(), normals(words.numpy()), atol=1e-14)


def test_extreme_words_give_finite_numbers():
    words = np.array([[0], [0], [ONES], [ONES]], dtype=np.int64)
    assert np.isfinite(normals(words)).all()


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"stream": Stream.INITIAL_VELOCITIES}, {"system": 1}, {"step": 1}, {"step": 2**32}, {"seed": 2**40 + 1}],
)
def test_every_part_of_the_counter_gives_another_stream(change):
    a, b = vectors(5000), vectors(5000, **change)
    assert not (a == b).any()
    assert abs((a * b).mean()) < 4 / 15000**0.5


def test_streams_of_neighbouring_seeds_are_not_shifted_copies():
    a = torch.cat([vectors(50, seed=1, step=s) for s in range(10)])
    b = torch.cat([vectors(50, seed=2, step=s) for s in range(10)])
    assert not torch.isin(a.flatten(), b.flatten()).any()


def test_a_number_depends_on_its_own_counter_only():
    whole = vectors(1001)
    for start, stop in ((0, 1), (3, 10), (500, 1001), (999, 1000)):
        atom = torch.arange(start, stop)
        zero = torch.zeros_like(atom)
        assert torch.equal(normal_vectors(1, Stream.THERMOSTAT, zero, atom, zero), whole[start:stop])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "1"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(InputError, match="seed must be an integer"):
        check_seed(seed)


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 20001])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, 2**64 - 1])
def test_machine_code_gives_the_bits_of_numpy(n, seed, monkeypatch):
    generator = torch.Generator().manual_seed(n)
    system, step = (torch.randint(0, 2**62, (n,), generator=generator) for _ in range(2))
    atom = torch.randint(0, 2**31, (2 * n,), generator=generator)[::2]  # not contiguous
    found = normal_vectors(seed, Stream.CELL_RESCALING, system, atom, step)
    monkeypatch.setattr(noise, "library", lambda: None)
    expected = normal_vectors(seed, Stream.CELL_RESCALING, system, atom, step)
    assert torch.equal(found, expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
def test_machine_code_takes_counters_as_they_come():
    one = torch.ones(1, dtype=torch.int32).expand(5)
    found = normal_vectors(7, Stream.THERMOSTAT, one, torch.arange(5), one)
    assert torch.equal(found, vectors(5, seed=7, system=1, step=1))
    with pytest.raises(ValueError, match="expected as many of each"):
        normal_vectors(7, Stream.THERMOSTAT, one[:3], torch.arange(5), one)
