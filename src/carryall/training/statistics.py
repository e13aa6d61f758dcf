"""What is set before the first step: scales of environment rows and of parameters, and the energy of each element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carryall.graph.neighbor_graph import edge_vectors, local_types
from carryall.models.dpa1.environment import environment_rows, switch
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.precision import rounded
from carryall.training.samples import Sample

SMALLEST_STD = 1e-2
UNSEEN_STD = 0.1


def set_statistics(model: DPA1, samples: Sequence[Sample]) -> None:
    """Set `davg`, `dstd`, those of fparam and aparam, and `out_bias` from the training samples."""
    davg, dstd = environment_statistics(model, samples)
    fitting, precision = model.fitting, model.descriptor.config.precision
    with torch.no_grad():
        if not model.descriptor.config.set_davg_zero:
            model.descriptor.davg.copy_(rounded(davg, precision))
        model.descriptor.dstd.copy_(rounded(dstd, precision))
        for name in ("fparam", "aparam"):
            values = [value for one in samples if (value := getattr(one.graph, name)) is not None]
            if values and getattr(fitting, f"{name}_avg") is not None:
                mean, std = parameter_statistics(torch.cat(values))
                getattr(fitting, f"{name}_avg").copy_(rounded(mean, fitting.config.precision))
                getattr(fitting, f"{name}_inv_std").copy_(rounded(1 / std, fitting.config.precision))
        config = fitting.config
        model.out_bias.copy_(energy_bias(samples, len(model.type_map), config.atom_ener, config.rcond))


def parameter_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column of values (n, width), at least SMALLEST_STD."""
    return values.mean(0), values.std(0, correction=0).clamp_min(SMALLEST_STD)


def environment_statistics(model: DPA1, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """(n_types, 4) mean and standard deviation of the environment rows by centre type.

    As DeePMD does: over sum(sel) slots for each centre, absent neighbours counting as zero rows; x, y and z are pooled.
    """
    config, n_types = model.descriptor.config, len(model.type_map)
    total = torch.zeros(n_types, 2, dtype=torch.float64)
    squares = torch.zeros(n_types, 2, dtype=torch.float64)
    centers = torch.zeros(n_types, dtype=torch.float64)
    for sample in samples:
        graph = sample.graph
        vectors = edge_vectors(graph)
        distance = vectors.norm(dim=1)
        rows = environment_rows(vectors, switch(distance, config.rcut_smth, config.rcut), distance, config.env_protection)
        if config.exclude_types:
            allowed = model.descriptor.get_buffer("allowed")
            rows = rows * allowed[graph.atom_types[graph.edge_center], graph.atom_types[graph.edge_neighbor]][:, None]
        types = local_types(graph)
        of_edge = types[graph.edge_center]
        angular = rows[:, 1:]
        total.index_add_(0, of_edge, torch.stack([rows[:, 0], angular.mean(1)], dim=1))
        squares.index_add_(0, of_edge, torch.stack([rows[:, 0] ** 2, angular.square().mean(1)], dim=1))
        centers.index_add_(0, types, torch.ones(len(types), dtype=torch.float64))
    slots = (centers * sum(config.sel)).clamp_min(1)[:, None]
    mean, mean_square = total / slots, squares / slots
    std = (mean_square - mean**2).clamp_min(0).sqrt().clamp_min(SMALLEST_STD)
    std[centers == 0] = UNSEEN_STD
    davg = torch.cat([mean[:, :1], torch.zeros(n_types, 3, dtype=torch.float64)], dim=1)
    return davg, torch.cat([std[:, :1], std[:, 1:].expand(-1, 3)], dim=1)


def energy_bias(
    samples: Sequence[Sample], n_types: int, known: Sequence[float | None] | None = None, rcond: float | None = None
) -> Tensor:
    """(n_types,) eV: least squares of the energies on the numbers of atoms of each type, the shortest solution if many fit.

    Energies of types that are `known` (not None) are kept; singular values below `rcond` of the largest count as zero.
    """
    given = torch.tensor([torch.nan if one is None else one for one in known or [None] * n_types], dtype=torch.float64)
    free, fixed = given.isnan(), given.nan_to_num(0.0)
    counts = torch.stack([torch.bincount(one.graph.atom_types, minlength=n_types).double() for one in samples])
    energies = torch.cat([one.energy for one in samples]) - counts @ fixed
    fitted = torch.linalg.lstsq(counts * free, energies[:, None], rcond=rcond, driver="gelsd").solution[:, 0]
    return torch.where(free, fitted, fixed)
