"""Segment reductions against loops in numpy, and their first and second derivatives."""

from __future__ import annotations

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


def test_ties_of_the_maximum_share_the_gradient() -> None:
    data = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
    segment_max(data, torch.tensor([0, 0, 0]), 1).sum().backward()
    assert data.grad is not None
    assert data.grad.tolist() == [0.5, 0.5, 0.0]


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
