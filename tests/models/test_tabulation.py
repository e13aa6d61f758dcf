"""What the tables of compressed models are made from: derivatives of nets, scales of errors, the choice of the grid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from carryall.models.dpa1.tabulation import SCALES, Functions, argument_range, best_scale, derivatives, is_bounded, scale_of
from carryall.models.networks import ACTIVATIONS, embedding_net
from carryall.models.quintic_table import Grid
from structures import small_dpa1


def test_errors_are_relative_to_outputs_from_the_cutoff_to_1_angstrom_or_closer() -> None:
    x, values = torch.arange(5.0).double(), torch.tensor([[1.0, 0], [-4, 2], [0, 3], [5, 1], [0, 0]], dtype=torch.float64)
    assert scale_of(values, x, 2.0).tolist() == [4, 4, 4, 5, 5]
    assert scale_of(values, x, 99.0).tolist() == [5] * 5
    assert scale_of(values, x, -1.0).tolist() == [1, 4, 4, 5, 5]
    assert (scale_of(0 * values, x, 2.0) > 0).all()


@pytest.mark.parametrize("name", [*ACTIVATIONS, "silut:1.5"])
def test_derivatives_of_nets(name: str) -> None:
    net = embedding_net(
        3, (4, 8, 8), activation_function=name, resnet_dt=True, generator=torch.Generator().manual_seed(3)
    ).requires_grad_(False)
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    value, first, second = derivatives(net, rows)
    assert torch.allclose(value, net(rows), rtol=0, atol=1e-14)
    leaf = rows.clone().requires_grad_()
    for output in range(8):
        (slope,) = torch.autograd.grad(net(leaf)[:, output].sum(), leaf, create_graph=True)
        assert torch.allclose(first[:, output], slope[:, 0], rtol=0, atol=1e-13)
        if slope.requires_grad and name not in ("linear", "none", "relu", "relu6"):
            (curvature,) = torch.autograd.grad(slope[:, 0].sum(), leaf, retain_graph=True)
            assert float(curvature[:, 0].abs().max()) > 1e-4
            assert torch.allclose(second[:, output], curvature[:, 0], rtol=0, atol=1e-12)


def test_outputs_with_a_limit() -> None:
    def net(n_in: int, name: str = "tanh") -> nn.Sequential:
        return embedding_net(n_in, (4, 8), activation_function=name)

    assert is_bounded(net(3))
    assert is_bounded(net(3, "silut:2.0"))
    assert not is_bounded(net(3, "gelu"))
    assert not is_bounded(net(2))  # widths 2, 4: the first layer hands its input on
    assert not is_bounded(net(4))


def test_the_scale_with_the_smallest_error_is_taken() -> None:
    descriptor = small_dpa1(attn_layer=0).descriptor
    functions, (low, ordinary, high) = Functions.of(descriptor), argument_range(descriptor, 0.1)
    chosen = best_scale(functions, low, ordinary, high, 65)
    errors = {scale: functions.errors(functions.table(Grid(low, high, scale, 65)), ordinary).worst for scale in SCALES}
    assert errors[chosen] == min(errors.values()) < 0.1 * max(errors.values())
