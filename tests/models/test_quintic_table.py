"""Tables of quintics: order, smoothness, what lies beyond the last node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carryall.models.quintic_table import Grid, QuinticTable

GRID = Grid(-1.3, 40.0, 8.0, 24)


def bumps(x: Tensor) -> Tensor:
    """(..., 3) smooth functions that saturate, grow and oscillate."""
    return torch.stack(
        [torch.tanh(0.7 * x - 1), torch.logaddexp(x - 2, torch.zeros_like(x)), torch.sin(x / 3) * (1 + x / 10)], dim=-1
    )


def derivatives(x: Tensor, function=bumps) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative by autograd."""
    x = x.clone().requires_grad_()
    value = function(x)
    slopes = [torch.autograd.grad(one.sum(), x, create_graph=True)[0] for one in value.unbind(-1)]
    curvatures = [torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in slopes]
    return value.detach(), torch.stack(slopes, -1).detach(), torch.stack(curvatures, -1)


def table(grid: Grid = GRID, dtype: torch.dtype = torch.float64, bounded: bool = False) -> QuinticTable:
    """Two functions: bumps, and bumps of the mirrored argument."""
    both = [derivatives(grid.nodes()), derivatives(grid.nodes(), lambda x: bumps(-x))]
    return QuinticTable(grid, *(torch.stack(one) for one in zip(*both, strict=True)), dtype=dtype, bounded=bounded)


def found(tables: QuinticTable, function: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, slope and curvature of a table."""
    x = x.clone().requires_grad_()
    value, slope = tables.value_and_slope(torch.full(x.shape, function), x)
    curvatures = [torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in slope.unbind(-1)]
    return value.detach(), slope.detach(), torch.stack(curvatures, -1)


def inside(n: int = 1000) -> Tensor:
    """Arguments between the first and the last node."""
    return GRID.at((GRID.n_nodes - 1) * torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_nodes_are_even_at_first_and_ever_wider() -> None:
    nodes = Grid(-1.0, 1e4, 50.0, 2001).nodes()
    assert float(nodes[0]) == -1.0
    assert float(nodes[-1]) == pytest.approx(1e4, rel=1e-12)
    steps = nodes.diff()
    assert float(steps[10] / steps[0]) == pytest.approx(1.0, abs=2e-2)
    assert (steps.diff() > 0).all()
    assert float(nodes[1000]) == pytest.approx(50.0, rel=0.05)  # half of all x up to infinity is as far as the scale


def test_nodes_hold_value_slope_and_curvature() -> None:
    nodes = GRID.nodes()[1:-1]
    for function, true in ((0, bumps), (1, lambda x: bumps(-x))):
        for one, expected in zip(found(table(), function, nodes), derivatives(nodes, true), strict=True):
            assert torch.allclose(one, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", range(6))
def test_polynomials_of_degree_five_in_u_are_exact(order: int) -> None:
    def power(x: Tensor) -> Tensor:
        distance = x - GRID.lowest
        return ((2 * distance / (GRID.scale + distance) - 1) ** order)[..., None]

    tables = QuinticTable(GRID, *(one[None] for one in derivatives(GRID.nodes(), power)), dtype=torch.float64)
    for one, expected in zip(found(tables, 0, inside()), derivatives(inside(), power), strict=True):
        assert torch.allclose(one, expected, rtol=0, atol=1e-11)


def test_half_the_spacing_has_a_64th_of_the_error() -> None:
    x, (value, slope, _) = inside(), derivatives(inside())
    errors = []
    for n in (161, 321, 641):
        tables = table(Grid(GRID.lowest, GRID.highest, GRID.scale, n))
        off = [one - true for one, true in zip(found(tables, 0, x), (value, slope), strict=False)]
        errors.append([float(one.abs().max()) for one in off])
    for coarse, fine in ((0, 1), (1, 2)):
        assert errors[coarse][0] / errors[fine][0] == pytest.approx(64, rel=0.25)
        assert errors[coarse][1] / errors[fine][1] == pytest.approx(32, rel=0.25)
    assert errors[2][0] > 1e-12  # rounding plays no part


@pytest.mark.parametrize("bounded", [False, True])
def test_slope_is_the_derivative_of_the_value(bounded: bool) -> None:
    tables = table(bounded=bounded)
    x = torch.cat([inside(), torch.tensor([41.0, 100.0, GRID.highest], dtype=torch.float64)])
    function, step = torch.arange(len(x)) % 2, 1e-5
    slope = tables.value_and_slope(function, x)[1]
    by_hand = (tables(function, x + step) - tables(function, x - step)) / (2 * step)
    assert torch.allclose(slope, by_hand, rtol=0, atol=1e-8)
    leaf = x.clone().requires_grad_()
    for output in range(3):
        automatic = [
            torch.autograd.grad(value[:, output].sum(), leaf)[0]
            for value in (tables(function, leaf), tables.value_and_slope(function, leaf)[0])
        ]
        assert torch.equal(automatic[0], slope[:, output])
        assert torch.allclose(automatic[1], slope[:, output], rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    x = inside().requires_grad_()
    (slope,) = torch.autograd.grad(table()(torch.zeros(x.shape).long(), x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        slope.sum().backward()


@pytest.mark.parametrize("bounded", [False, True])
def test_twice_continuously_differentiable_across_nodes_and_at_the_end(bounded: bool) -> None:
    nodes, tables = GRID.nodes()[1:], table(bounded=bounded)
    below, above = nodes - 1e-9 * (1 + nodes.abs()), nodes + 1e-9 * (1 + nodes.abs())
    for left, right in zip(found(tables, 0, below), found(tables, 0, above), strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-6)


def test_beyond_the_last_node_straight_functions_stay_straight() -> None:
    def straight(x: Tensor) -> Tensor:
        return torch.stack([2 - 0.3 * x, torch.full_like(x, 0.7)], -1)

    tables = QuinticTable(GRID, *(one[None] for one in derivatives_of_straight(straight)), dtype=torch.float64)
    far = torch.tensor([GRID.highest, 50.0, 4e3, 1e6], dtype=torch.float64)
    assert torch.allclose(tables(torch.zeros(4, dtype=torch.int64), far), straight(far), rtol=1e-10, atol=0)


def derivatives_of_straight(function) -> tuple[Tensor, Tensor, Tensor]:
    """Autograd has no second derivative of these."""
    nodes = GRID.nodes()
    slope = torch.tensor([-0.3, 0.0], dtype=torch.float64).expand(len(nodes), 2)
    return function(nodes), slope, torch.zeros_like(slope)


def test_beyond_the_last_node_nothing_blows_up() -> None:
    far = torch.tensor([1e2, 1e4, 1e8], dtype=torch.float64)
    values = table()(torch.zeros(3, dtype=torch.int64), far)
    assert torch.isfinite(values).all()
    assert float((values[:, 0] - 1).abs().max()) < 1e-10  # tanh has saturated
    assert torch.allclose(values[:, 1], far - 2, rtol=1e-9)  # softplus is straight


def test_beyond_the_last_node_bounded_functions_stay_bounded() -> None:
    grid = Grid(-1.0, 8.0, 8.0, 60)  # where tanh(0.7 x - 1) still rises a little
    far = torch.tensor([8.5, 9.0, 12.0, 1e2, 1e4, 1e8], dtype=torch.float64)
    values = table(grid, bounded=True)(torch.zeros(6, dtype=torch.int64), far)[:, 0]
    assert 1e-5 < float((values - torch.tanh(0.7 * far - 1)).abs().max()) < 0.05
    assert float(values[-1] - values[-2]) == pytest.approx(0, abs=1e-3)


def test_single_precision_is_as_good_as_its_digits() -> None:
    x = inside()
    fine = Grid(GRID.lowest, GRID.highest, GRID.scale, 200)
    function = torch.zeros(x.shape, dtype=torch.int64)
    single, double = table(fine, torch.float32), table(fine)
    assert single(function, x).dtype == torch.float32
    scale = float(double(function, x).abs().max())
    assert float((single(function, x) - double(function, x)).abs().max()) < 4 * torch.finfo(torch.float32).eps * scale
    assert single.nbytes == double.nbytes / 2 == 2 * 200 * 3 * 3 * 4
    assert single.n_functions == 2


def test_no_arguments() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    assert table()(none.long(), none).shape == (0, 3)
