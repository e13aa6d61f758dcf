"""Segment reductions against loops in numpy, and their first and second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from carryall.graph import segment_max, segment_softmax, segment_sum

REDUCTIONS = {"sum": segment_sum, "max": segment_max, "softmax": segment_softmax}


def loop(name: str, data: np.ndarray, segment: np.ndarray, n_segments: int, mask: np.ndarray) -> np.ndarray:
    out = np.zeros_like(data) if name == "softmax" else np.zeros((n_segments, *data.shape[1:]), dtype=data.dtype)
    for s in range(n_segments):
        rows = np.flatnonzero((segment == s) & mask)
        if not len(rows):
            continue
        if name == "sum":
            out[s] = data[rows].sum(0)
        elif name == "max":
            out[s] = data[rows].max(0)
        else:
            weight = np.exp(data[rows] - data[rows].max(0))
            out[rows] = weight / weight.sum(0)
    return out


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(REDUCTIONS)),
    seed=st.integers(0, 2**31),
    n=st.integers(0, 30),
    n_segments=st.integers(1, 6),
    trailing=st.sampled_from([(), (1,), (3,), (2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_equals_a_loop_whatever_masked_rows_hold(
    name: str, seed: int, n: int, n_segments: int, trailing: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    clean = (rng.normal(size=(n, *trailing)) * scale).astype(torch.zeros(0, dtype=dtype).numpy().dtype)
    segment, mask = rng.integers(0, n_segments, n), rng.random(n) < 0.7
    dirty = clean.copy()
    dirty[~mask] = rng.choice([np.nan, np.inf, -np.inf], size=dirty[~mask].shape)
    data = torch.from_numpy(dirty).requires_grad_()
    out = REDUCTIONS[name](data, torch.from_numpy(segment), n_segments, torch.from_numpy(mask))
    expected = loop(name, clean, segment, n_segments, mask)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert np.allclose(out.detach().numpy(), expected, rtol=tolerance, atol=tolerance * scale)
    if n:
        (gradient,) = torch.autograd.grad(out.square().sum(), data)
        assert bool(torch.isfinite(gradient).all())
        assert bool((gradient[~torch.from_numpy(mask)] == 0).all())


def closed_form(
    name: str, data: np.ndarray, segment: np.ndarray, mask: np.ndarray, weight: np.ndarray, along: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of sum(weight * result) and its derivative along `along`, by hand; zero where masked."""
    first, second = np.zeros_like(data), np.zeros_like(data)
    for s in np.unique(segment[mask]):
        rows = np.flatnonzero((segment == s) & mask)
        if name == "sum":
            first[rows] = weight[s]
        elif name == "max":
            ties = data[rows] == data[rows].max(0)
            first[rows] = ties / ties.sum(0) * weight[s]
        else:
            w = np.exp(data[rows] - data[rows].max(0))
            w /= w.sum(0)
            c = weight[rows] - (w * weight[rows]).sum(0)
            first[rows] = w * c
            # d/dt of w_j c_j with w' = w (v - <v>), c' = -<w' weight>
            slope = w * (along[rows] - (w * along[rows]).sum(0))
            second[rows] = slope * c - w * (slope * weight[rows]).sum(0)
    return first, second


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(REDUCTIONS)),
    seed=st.integers(0, 2**31),
    degrees=st.lists(st.sampled_from([0, 1, 2, 7]), max_size=6),
    trailing=st.sampled_from([(), (3,)]),
    ties=st.booleans(),
    kept=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_first_and_second_derivatives_equal_the_closed_form(
    name: str, seed: int, degrees: list[int], trailing: tuple[int, ...], ties: bool, kept: float
) -> None:
    rng = np.random.default_rng(seed)
    segment = rng.permutation(np.repeat(np.arange(len(degrees)), degrees)).astype(np.int64)
    n = len(segment)
    clean = rng.integers(0, 2, (n, *trailing)).astype(float) if ties else rng.normal(size=(n, *trailing)) * 3
    mask = rng.random(n) < kept
    weight = rng.normal(size=(n if name == "softmax" else len(degrees), *trailing))
    along = rng.normal(size=(n, *trailing))
    dirty = clean.copy()
    dirty[~mask] = rng.choice([np.nan, np.inf, -np.inf], size=dirty[~mask].shape)
    data = torch.from_numpy(dirty).requires_grad_()
    out = REDUCTIONS[name](data, torch.from_numpy(segment), len(degrees), torch.from_numpy(mask))
    (first,) = torch.autograd.grad((out * torch.from_numpy(weight)).sum(), data, create_graph=True)
    (second,) = (
        torch.autograd.grad((first * torch.from_numpy(along)).sum(), data, allow_unused=True, materialize_grads=True)
        if first.requires_grad
        else (torch.zeros_like(data),)
    )
    expected = closed_form(name, clean, segment, mask, weight, along)
    assert np.allclose(first.detach().numpy(), expected[0], rtol=0, atol=1e-13)
    assert np.allclose(second.numpy(), expected[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("degree", [1, 500])
def test_one_and_five_hundred_rows_in_a_segment(name: str, degree: int) -> None:
    rng = np.random.default_rng(degree)
    segment = np.repeat([0, 2], degree)
    data, mask = rng.normal(size=(2 * degree, 2)) * 5, np.ones(2 * degree, dtype=bool)
    out = REDUCTIONS[name](torch.from_numpy(data), torch.from_numpy(segment), 4, torch.from_numpy(mask))
    assert np.allclose(out.numpy(), loop(name, data, segment, 4, mask), rtol=0, atol=1e-12)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(11, 2, generator=generator, dtype=torch.float64)
    segment = torch.tensor([4, 0, 0, 2, 2, 2, 0, 4, 4, 2, 3])
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0]).bool()  # segment 1 is empty, segment 3 fully masked
    return data, segment, mask


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf"), -float("inf")])
def test_derivatives_to_second_order(name: str, poison: float) -> None:
    data, segment, mask = rows()

    def function(values: Tensor) -> Tensor:
        # the poison enters as a constant: what is masked must not reach the derivative
        full = torch.where(mask[:, None], values, torch.full_like(values, poison))
        return REDUCTIONS[name](full, segment, 5, mask)

    data.requires_grad_()
    assert torch.autograd.gradcheck(function, (data,))
    assert torch.autograd.gradgradcheck(function, (data,))


def test_empty_and_masked_segments_give_zero() -> None:
    data, segment, mask = rows()
    for name in ("sum", "max"):
        out = REDUCTIONS[name](data, segment, 5, mask)
        assert (out[[1, 3]] == 0).all()
        assert (out[[0, 2, 4]] != 0).all()
    weights = segment_softmax(data, segment, 5, mask)
    assert (weights[~mask] == 0).all()
    assert torch.allclose(
        segment_sum(weights, segment, 5)[[0, 2, 4]], torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_softmax_of_large_and_equal_logits() -> None:
    data = torch.tensor([1e4, 1e4, -1e4, 700.0, 710.0], dtype=torch.float64)
    out = segment_softmax(data, torch.tensor([0, 0, 0, 1, 1]), 2)
    assert out[:3].tolist() == [0.5, 0.5, 0.0]
    assert float(out[4]) == pytest.approx(1 / (1 + np.exp(-10)), abs=1e-14)


def test_softmax_of_an_infinite_logit_that_is_not_masked_is_zero() -> None:
    out = segment_softmax(torch.tensor([-torch.inf, 0.0, -torch.inf]), torch.tensor([0, 0, 1]), 2)
    assert out.tolist() == [0.0, 1.0, 0.0]


def test_ties_of_the_maximum_share_the_gradient_and_have_no_second_derivative() -> None:
    data = torch.tensor([2.0, 2.0, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    out = segment_max(data, torch.tensor([0, 0, 0, 1]), 2)
    assert out.tolist() == [2.0, 5.0]
    (first,) = torch.autograd.grad(out.square().sum(), data, create_graph=True)
    assert first.tolist() == [2.0, 2.0, 0.0, 10.0]
    (second,) = torch.autograd.grad(first[0], data)  # only the square has one: 2 m' m' = 2 * 1/2 * 1/2
    assert second.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_the_maximum_is_an_entry_to_the_last_bit() -> None:
    third = torch.full((3,), 0.1, dtype=torch.float64)
    assert segment_max(third, torch.zeros(3, dtype=torch.int64), 1).item() == 0.1
    assert segment_max(torch.tensor([-5.0, -7.0]), torch.tensor([1, 1]), 2).tolist() == [0.0, -5.0]


def test_what_is_not_finite_stays_in_its_segment() -> None:
    inf, nan = torch.inf, torch.nan
    data = torch.tensor([nan, 1.0, inf, 2.0, -inf, -inf, 4.0, 3.0], dtype=torch.float64, requires_grad=True)
    segment = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    highest = segment_max(data, segment, 4)
    assert torch.equal(highest.detach().isnan(), torch.tensor([True, False, False, False]))
    assert highest.tolist()[1:] == [inf, -inf, 4.0]
    weights = segment_softmax(data, segment, 4)
    assert bool(weights[:2].isnan().all())
    assert weights[4:6].tolist() == [0.0, 0.0]
    for out in (highest[3], weights[6]):
        (gradient,) = torch.autograd.grad(out, data)
        assert bool(torch.isfinite(gradient[6:]).all())
        assert bool(gradient[6:].any())


def test_order_of_rows_does_not_matter() -> None:
    data, segment, mask = rows()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    for name, function in REDUCTIONS.items():
        straight, shuffled = function(data, segment, 5, mask), function(data[order], segment[order], 5, mask[order])
        assert torch.allclose(straight[order] if name == "softmax" else straight, shuffled, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_traces_with_free_sizes(name: str, masked: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, data: Tensor, segment: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
            return REDUCTIONS[name](data, segment, counts.shape[0], mask if masked else None)

    data, segment, mask = rows()
    n, s = Dim("n", min=0, max=2**30), Dim("s", min=0, max=2**30)
    sample = (data, segment, mask, torch.zeros(5))
    shapes = ({0: n}, {0: n}, {0: n}, {0: s})
    program = torch.export.export(Module(), sample, dynamic_shapes=shapes, strict=False).module()
    flat = make_fx(Module(), tracing_mode="symbolic")(*sample)
    for size, segments in ((11, 5), (4, 2), (1, 1), (0, 3), (0, 0)):
        inputs = (data[:size], segment[:size].clamp_max(max(segments - 1, 0)), mask[:size], torch.zeros(segments))
        expected = Module()(*inputs)
        assert torch.equal(program(*inputs), expected)
        assert torch.equal(flat(*inputs), expected)


def with_derivatives(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The value, the gradient of the sum of its squares, and that gradient's own derivative."""

    def everything(data: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        data = data.detach().requires_grad_()
        out = function(data, *rest)
        (first,) = torch.autograd.grad([out.square().sum()], [data], create_graph=True)
        (second,) = torch.autograd.grad([(first * torch.cos(data.detach().nan_to_num(0, 0, 0))).sum()], [data])
        return out.detach(), first.detach(), second

    return everything


@pytest.mark.parametrize("name", REDUCTIONS)
def test_derivatives_trace_with_free_sizes(name: str) -> None:
    def function(data: Tensor, segment: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        return REDUCTIONS[name](data, segment, counts.shape[0], mask)

    data, segment, mask = rows()
    program = make_fx(with_derivatives(function), tracing_mode="symbolic")(data, segment, mask, torch.zeros(5))
    for size, segments in ((11, 5), (7, 5), (1, 1), (0, 3), (0, 0)):
        inputs = (data[:size], segment[:size].clamp_max(max(segments - 1, 0)), mask[:size], torch.zeros(segments))
        for found, expected in zip(program(*inputs), with_derivatives(function)(*inputs), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_compiles_once_for_all_sizes(name: str) -> None:
    def function(data: Tensor, segment: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        return REDUCTIONS[name](data, segment, counts.shape[0], mask)

    data, segment, mask = rows()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it imports itself
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        compiled(data, segment, mask, torch.zeros(5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (11, 7, 4):
            inputs = (data[:size], segment[:size], mask[:size], torch.zeros(6))
            assert torch.equal(compiled(*inputs), function(*inputs))


@pytest.fixture
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("shape", [(60_000,), (60_000, 3)])
@pytest.mark.usefixtures("several_threads")
def test_bit_identical_between_runs_and_numbers_of_threads(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    segment = torch.randint(700, (shape[0],), generator=generator)  # unsorted, as neighbours are
    mask = torch.rand(shape[0], generator=generator) < 0.9
    function = with_derivatives(lambda values: REDUCTIONS[name](values, segment, 700, mask))
    reference = function(data)
    for threads in (4, 4, 3, 1):
        torch.set_num_threads(threads)
        for found, expected in zip(function(data), reference, strict=True):
            assert torch.equal(found, expected), threads


@pytest.mark.parametrize("name", REDUCTIONS)
def test_runs_where_torch_allows_deterministic_algorithms_only(name: str) -> None:
    data, segment, mask = rows()
    torch.use_deterministic_algorithms(True)
    try:
        with_derivatives(lambda values: REDUCTIONS[name](values, segment, 5, mask))(data)
    finally:
        torch.use_deterministic_algorithms(False)
