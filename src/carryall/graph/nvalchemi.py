"""Neighbour search by nvalchemi-toolkit-ops: all systems of a batch at once, on their own device."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from carryall.errors import MissingDependencyError


@cache
def is_installed() -> bool:
    """Whether the optional package is there."""
    return find_spec("nvalchemiops") is not None


def neighbor_edges(
    positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, cutoff: float, method: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs within `cutoff` (Å): `(center, neighbor, shift)` (n_edges,), (n_edges,), (n_edges, 3), unsorted.

    positions (n_atoms, 3) float64, finite; system (n_atoms,) ascending; cell (n_systems, 3, 3) without missing vectors; pbc
    (n_systems, 3) bool. `method` is the package's own choice where None. MissingDependencyError where it is not installed.
    """
    try:
        package = import_module("nvalchemiops.torch.neighbors")
    except ImportError as error:
        raise MissingDependencyError(f"{error}: pip install 'carryall[gpu]'") from error
    if not len(positions):
        none = torch.zeros(0, dtype=torch.int64, device=positions.device)
        return none, none, torch.zeros(0, 3, dtype=torch.int32, device=positions.device)
    positions, cell = _boxed(positions, system, cell, pbc)
    counts = torch.bincount(system, minlength=len(cell))
    options: dict[str, Any] = {
        "cell": cell.contiguous(),
        "pbc": pbc.to(positions.device).contiguous(),
        "batch_idx": system.to(torch.int32),
        "batch_ptr": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        "return_neighbor_list": True,
        "method": method,
    }
    while True:
        try:
            pairs, _, shift = package.neighbor_list(positions.contiguous(), cutoff, **options)
            return pairs[0].long(), pairs[1].long(), shift.to(torch.int32)
        except package.NeighborOverflowError as overflow:  # it says how many there are
            options["max_neighbors"] = max(int(overflow.num_neighbors), 2 * int(overflow.max_neighbors))


def _boxed(positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor) -> tuple[Tensor, Tensor]:
    """Move and stretch the cell along open axes so that it holds all atoms: bins are sized by it, and no edge knows of it."""
    free = ~pbc.to(positions.device)
    fractional = torch.einsum("ni,nij->nj", positions, torch.linalg.inv(cell).index_select(0, system))
    index = system[:, None].expand(-1, 3)
    low, high = (
        torch.zeros_like(cell[:, 0]).scatter_reduce(0, index, fractional, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    origin = torch.einsum("si,sij->sj", torch.where(free, low, 0.0), cell)
    # an Å more than needed on every open axis, so that an atom alone has a cell too
    stretch = torch.where(free, high - low + 1 / torch.linalg.vector_norm(cell, dim=2), 1.0)
    return positions - origin.index_select(0, system), cell * stretch[:, :, None]
