"""Labelled graphs: each structure's neighbours are searched once, then batches are concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData
from carryall.data.extra_inputs import complete_input, structure_inputs
from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, concatenate, max_degree
from carryall.graph.neighbor_search import graph_from_structures
from carryall.models.dpa1.config import FittingConfig


@dataclass(frozen=True, eq=False)
class Sample:
    """One or many structures with labels."""

    graph: NeighborGraph
    n_atoms: Tensor
    """(n_systems,) float64."""
    energy: Tensor
    """(n_systems,) eV."""
    forces: Tensor
    """(n_atoms, 3) eV/Å; zeros where there is no label."""
    has_forces: Tensor
    """(n_atoms,) bool."""
    virial: Tensor
    """(n_systems, 3, 3) eV; zeros where there is no label."""
    has_virial: Tensor
    """(n_systems,) bool."""


def make_sample(
    structure: AtomicData, index: int, cutoff: float, type_map: Sequence[str], fitting: FittingConfig | None = None
) -> Sample:
    """Graph, with what else `fitting` needs, and labels of one structure; InputError names it by index."""
    if structure.energy is None:
        raise InputError(f"structure {index} has no energy label: give energy_key, or remove it")
    try:
        graph = graph_from_structures([structure], cutoff, type_map)
        graph = graph.replace(**needed_inputs(structure, fitting or FittingConfig()))
    except InputError as error:
        raise InputError(f"structure {index}: {str(error).removeprefix('system 0: ')}") from None
    n_atoms = structure.n_atoms
    forces, stress, cell = structure.forces, structure.stress, structure.cell
    virial = torch.zeros(3, 3, dtype=torch.float64)
    if stress is not None and cell is not None:
        virial = -stress.double() * cell.double().det().abs()
    return Sample(
        graph=graph.to(dtype=torch.float64),
        n_atoms=torch.tensor([float(n_atoms)], dtype=torch.float64),
        energy=structure.energy.double().reshape(1),
        forces=torch.zeros(n_atoms, 3, dtype=torch.float64) if forces is None else forces.double(),
        has_forces=torch.full((n_atoms,), forces is not None),
        virial=virial[None],
        has_virial=torch.tensor([stress is not None and cell is not None]),
    )


def needed_inputs(structure: AtomicData, fitting: FittingConfig) -> dict[str, Tensor | None]:
    """fparam (1, numb_fparam) and aparam (n_atoms, numb_aparam), float64, as far as the fitting net takes them."""
    given = structure_inputs(structure)
    needed: dict[str, Tensor | None] = {"fparam": None, "aparam": None}
    if fitting.numb_fparam:
        needed["fparam"] = complete_input("fparam", given.get("fparam"), 1, fitting.numb_fparam, fitting.default_fparam)
    if fitting.aparam_inputs:
        needed["aparam"] = complete_input("aparam", given.get("aparam"), structure.n_atoms, fitting.aparam_inputs)
    return needed


def make_samples(
    structures: Sequence[AtomicData], cutoff: float, type_map: Sequence[str], fitting: FittingConfig | None = None
) -> list[Sample]:
    """One sample for each structure."""
    return [make_sample(one, index, cutoff, type_map, fitting) for index, one in enumerate(structures)]


def collate(samples: Sequence[Sample], device: str = "cpu") -> Sample:
    """One sample of many."""
    parts = {name: torch.cat([getattr(one, name) for one in samples]).to(device) for name in _LABELS}
    return Sample(graph=concatenate([one.graph for one in samples]).to(device), **parts)


_LABELS = ("n_atoms", "energy", "forces", "has_forces", "virial", "has_virial")


def largest_degree(samples: Sequence[Sample]) -> int:
    """The largest number of neighbours of any atom."""
    return max((max_degree(one.graph) for one in samples), default=0)


def batch_indices(n_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which samples step `step` uses: each epoch is a permutation of its own, so that a resumed run goes on exactly."""
    batch_size = min(batch_size, n_samples)
    wanted = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, list[int]] = {}
    for position in wanted:
        epoch = position // n_samples
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(n_samples, generator=generator).tolist()
    return [orders[position // n_samples][position % n_samples] for position in wanted]
