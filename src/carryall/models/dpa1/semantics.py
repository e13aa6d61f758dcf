"""Graph or padded semantics: the switch, and how much it matters for a model that DeePMD made."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.neighbor_search import build_graph
from carryall.models.dpa1.model import DPA1, METHODS
from carryall.models.eager import EagerPotential

SPACING = 2.6  # Å between neighbours of the probe, about that of metals and of heavy atoms in molecules
NEGLIGIBLE = 1e-10  # eV per atom


def with_method(model: nn.Module, method: str) -> nn.Module:
    """The model with `neighbor_graph_method` set in each DPA-1 inside it; InputError when there is none. Changes the model."""
    if method not in METHODS:
        raise InputError(f"neighbor_graph_method must be one of {', '.join(METHODS)}, got {method!r}")
    parts = [part for part in model.modules() if isinstance(part, DPA1)]
    if not parts:
        raise InputError(
            f"a model of class {type(model).__name__} has no neighbor_graph_method (only DPA-1 has it): leave it out"
        )
    for part in parts:
        part.neighbor_graph_method = "legacy" if method == "legacy" else "graph"
    return model


def semantics_note(model: DPA1) -> str | None:
    """One line for a model whose numbers depend on `neighbor_graph_method`, with the size of the effect; None for others.

    The effect is measured, on a probe crystal of 32 atoms.
    """
    graph = probe(model)
    chosen = model.neighbor_graph_method
    try:
        model.neighbor_graph_method = "graph"
        energy = EagerPotential(model)(graph)["energy"]
        model.neighbor_graph_method = "legacy"
        effect = float((EagerPotential(model)(graph)["energy"] - energy).abs()) / graph.n_local
    finally:
        model.neighbor_graph_method = chosen
    if effect < NEGLIGIBLE:
        return None
    every = "every neighbour and no padding" if chosen == "graph" else "DeePMD's padded neighbour lists"
    other = "legacy" if chosen == "graph" else "graph"
    what = "DeePMD's padded routes" if chosen == "graph" else "carryall's default, and DeePMD's graph route,"
    return (
        f"evaluated with {every} (neighbor_graph_method={chosen!r}); {what} differ by {effect:.1e} eV/atom on a probe crystal "
        f"({', '.join(reasons(model, graph))}): neighbor_graph_method={other!r} gives their numbers"
    )


def reasons(model: DPA1, graph: NeighborGraph) -> list[str]:
    """Why padded lists give other numbers."""
    config = model.descriptor.config
    found = []
    if bool(model.descriptor.davg.any()):
        found.append("davg is not zero, so empty slots count and energies depend on the order of atoms")
    if config.attn_layer and config.smooth_type_embedding:
        found.append("empty slots stay in the softmax of smooth attention")
    largest = int(graph.ptr.diff().max())
    if largest > sum(config.sel):
        found.append(f"sel = {sum(config.sel)} cuts {largest} neighbours")
    return found


def probe(model: DPA1) -> NeighborGraph:
    """A jittered fcc crystal of 32 atoms with the model's types in turn."""
    corners = torch.tensor(list(itertools.product((0, 1), repeat=3)), dtype=torch.float64)
    basis = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
    edge = SPACING * 2**0.5
    places = (corners[:, None] + basis).reshape(-1, 3) * edge
    generator = torch.Generator().manual_seed(0)
    places = places + 0.1 * torch.rand(places.shape, generator=generator, dtype=torch.float64)
    n, n_types = len(places), len(model.type_map)
    cell: Tensor = 2 * edge * torch.eye(3, dtype=torch.float64)[None]
    graph = build_graph(
        places, torch.arange(n) % n_types, torch.zeros(n).long(), cell, torch.ones(1, 3).bool(), model.spec.cutoff
    )
    mean = {"fparam": model.fitting.fparam_avg, "aparam": model.fitting.aparam_avg}
    rows = {"fparam": 1, "aparam": n}
    return graph.replace(**{name: value.expand(rows[name], -1) for name, value in mean.items() if value is not None})
