"""Activation functions against closed forms, and what names are understood."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.models.networks import ACTIVATIONS, activation

POINTS = torch.tensor([-45.0, -21.0, -5.0, -0.7, -1e-3, 1e-3, 0.4, 2.9, 3.1, 6.5, 19.0, 21.0, 39.0, 45.0], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silut(x: float, threshold: float) -> float:
    if x < threshold:
        return x * sigmoid(x)
    slope = sigmoid(threshold) + threshold * sigmoid(threshold) * (1 - sigmoid(threshold))
    return math.tanh(slope * (x - threshold)) + threshold * sigmoid(threshold)


CLOSED: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "gelu": gelu,
    "gelu_tf": gelu,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "softplus": lambda x: x if x > 20 else max(x, 0.0) + math.log1p(math.exp(-abs(x))),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "silut": lambda x: silut(x, 3.0),
    "silut:0.5": lambda x: silut(x, 0.5),
    "custom_silu:20": lambda x: silut(x, 20.0),
    "linear": lambda x: x,
    "none": lambda x: x,
    "Tanh": math.tanh,
    "SiLUT:0.5": lambda x: silut(x, 0.5),
}


def test_every_name_is_tested() -> None:
    assert set(ACTIVATIONS) <= set(CLOSED)


@pytest.mark.parametrize("name", CLOSED)
def test_values_and_derivatives(name: str) -> None:
    """Derivatives by central differences of the closed form."""
    function, closed = activation(name), CLOSED[name]
    x = POINTS.clone().requires_grad_()
    y = function(x)
    expected = torch.tensor([closed(value) for value in POINTS.tolist()], dtype=torch.float64)
    assert torch.allclose(y.detach(), expected, rtol=1e-15, atol=1e-14)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    h = 1e-5
    differences = [(closed(value + h) - closed(value - h)) / (2 * h) for value in POINTS.tolist()]
    assert torch.allclose(slope.detach(), torch.tensor(differences, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert bool(torch.isfinite(curvature).all())


@pytest.mark.parametrize("name", ["silut", "silut:-1", "custom_silu:10.0"])
def test_silut_is_smooth_at_its_threshold_and_bounded(name: str) -> None:
    threshold = float(name.partition(":")[2] or 3.0)
    function = activation(name)

    def value_and_slope(x: float) -> tuple[Tensor, Tensor]:
        at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        y = function(at)
        return y.detach(), torch.autograd.grad(y, at)[0]

    below, above = value_and_slope(threshold - 1e-9), value_and_slope(threshold + 1e-9)
    assert abs(below[0] - above[0]) < 1e-8
    assert abs(below[1] - above[1]) < 1e-8
    assert float(function(torch.tensor(1e4, dtype=torch.float64))) <= threshold * sigmoid(threshold) + 1


@pytest.mark.parametrize("name", ["silut:wide", "silut:", "custom_silu:3,0"])
def test_a_threshold_that_is_no_number(name: str) -> None:
    with pytest.raises(InputError, match="needs a number after the colon"):
        activation(name)


@pytest.mark.parametrize(("name", "hint"), [("silu6", "silu"), ("selu", "silu"), ("silutt", "silut")])
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"unknown activation_function '{name}', perhaps you meant '{hint}'"):
        activation(name)
