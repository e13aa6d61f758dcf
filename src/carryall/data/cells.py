"""Facts of cells."""

from __future__ import annotations

from torch import Tensor


def volumes(cell: Tensor) -> Tensor:
    """(n,) volumes of cells (n, 3, 3) whose rows are vectors; term by term, so that none depends on the others."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(1) for row in cell.unbind(1))
    return (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)).abs()
