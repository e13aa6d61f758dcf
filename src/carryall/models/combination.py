"""Weighted sums of models, as DeePMD's `linear_ener`: E_i = sum over models of w_k E_k,i, with type maps of their own.

Each model sees the edges within its own cutoff, atoms typed by its own type map, and adds its own biases, as in deepmd.pt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, center_slots
from carryall.graph.potential import PotentialSpec
from carryall.models.derivatives import EnergyModel
from carryall.models.dpa1.model import DPA1
from carryall.models.pair_table import PairTable
from carryall.models.type_rules import TypeRules, check_dict

Source = dict[str, Any]


class Parts(nn.Module):
    """Models of one combination, and how each sees a graph whose atoms are typed by `type_map`."""

    def __init__(self, models: Sequence[nn.Module], type_map: Sequence[str]) -> None:
        super().__init__()
        if not models:
            raise InputError("a combination of models needs one at least")
        self.models, self.type_map = nn.ModuleList(models), tuple(type_map)
        self.cutoffs = tuple(model.spec.cutoff for model in self.as_list())
        for index, model in enumerate(self.as_list()):
            known = model.spec.type_map
            if missing := [symbol for symbol in type_map if symbol not in known]:
                raise InputError(
                    f"model {index} of the combination ({type(model).__name__}) knows {', '.join(known)}, not "
                    f"{', '.join(missing)}: leave that out of type_map, or take a model that knows it"
                )
            places = torch.tensor([known.index(symbol) for symbol in type_map])
            self.register_buffer(f"types_{index}", places, persistent=False)
        for name in ("fparam", "aparam"):
            widths = {getattr(model.spec, f"dim_{name}") for model in self.as_list()} - {0}
            if len(widths) > 1:
                raise InputError(
                    f"the models of a combination share {name}, but take {' and '.join(map(str, sorted(widths)))} numbers"
                )

    def as_list(self) -> list[EnergyModel]:
        """The models."""
        return [cast(EnergyModel, model) for model in self.models]

    @property
    def spec(self) -> PotentialSpec:
        """Facts that hold for all: the longest cutoff, the lowest precision, what any of them takes."""
        specs = [model.spec for model in self.as_list()]
        blocks = [spec.block_edges for spec in specs]
        defaults = {spec.default_fparam for spec in specs if spec.dim_fparam}
        charges = {spec.default_chg_spin for spec in specs if spec.dim_chg_spin}
        return PotentialSpec(
            cutoff=max(self.cutoffs),
            type_map=self.type_map,
            message_passing=any(spec.message_passing for spec in specs),
            dtype="float32" if any(spec.dtype == "float32" for spec in specs) else "float64",
            block_edges=None if None in blocks else min(cast(list[int], blocks)),
            dim_fparam=max(spec.dim_fparam for spec in specs),
            default_fparam=defaults.pop() if len(defaults) == 1 else None,
            dim_aparam=max(spec.dim_aparam for spec in specs),
            spin=any(spec.spin for spec in specs),
            dim_chg_spin=max(spec.dim_chg_spin for spec in specs),
            default_chg_spin=charges.pop() if len(charges) == 1 else None,
            long_range=any(spec.long_range for spec in specs),
            k_cutoff=max(spec.k_cutoff for spec in specs),
        )

    @property
    def neighbor_graph_method(self) -> str:
        """ "legacy" where a model has DeePMD's padded semantics."""
        return "legacy" if any(getattr(m, "neighbor_graph_method", "graph") == "legacy" for m in self.models) else "graph"

    def views(self, graph: NeighborGraph, edge_vec: Tensor, rules: TypeRules) -> list[NeighborGraph]:
        """The graph as each model sees it, without the pairs that `rules` excludes.

        Padded lists are cut off at `sel` before pairs are excluded, as in deepmd.pt.
        """
        squared = torch.where(graph.edge_mask, edge_vec.detach().square().sum(1), torch.inf)
        allowed = rules.without_excluded(graph).edge_mask
        legacy = self.neighbor_graph_method == "legacy"
        found = []
        for index, model in enumerate(self.as_list()):
            mask = squared <= self.cutoffs[index] ** 2
            if legacy and (sel := sel_of(model)) is not None:
                mask = mask & among_nearest(graph, torch.where(mask, squared, torch.inf), sel)
            types = self.get_buffer(f"types_{index}").index_select(0, graph.atom_types)
            found.append(graph.replace(atom_types=types, edge_mask=mask & allowed))
        return found


class LinearEnergyModel(nn.Module):
    """The sum of models with constant weights: "mean" (1 / their number), "sum" (1), or one for each."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        type_map: Sequence[str] | None = None,
        weights: str | Sequence[float] = "mean",
        *,
        pair_exclude_types: Sequence[Sequence[int]] = (),
        atom_exclude_types: Sequence[int] = (),
    ) -> None:
        super().__init__()
        type_map = first_type_map(models) if type_map is None else type_map
        self.parts = Parts(models, type_map)
        self.rules = TypeRules(type_map, pair_exclude_types, atom_exclude_types)
        self.weights = weights if isinstance(weights, str) else tuple(float(one) for one in weights)
        if isinstance(weights, str) and weights not in ("mean", "sum"):
            raise InputError(f"weights must be 'mean', 'sum' or one number for each model, got {weights!r}")
        if not isinstance(weights, str) and len(weights) != len(models):
            raise InputError(f"weights has {len(weights)} numbers for {len(models)} models: give one for each")

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return self.parts.spec

    @property
    def neighbor_graph_method(self) -> str:
        """That of the models within."""
        return self.parts.neighbor_graph_method

    @property
    def factors(self) -> tuple[float, ...]:
        """The weights as numbers."""
        if isinstance(self.weights, str):
            return (1 / len(self.parts.models) if self.weights == "mean" else 1.0,) * len(self.parts.models)
        return self.weights

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        views = self.parts.views(graph, edge_vec, self.rules)
        energies = [w * model(view, edge_vec) for w, model, view in zip(self.factors, self.parts.as_list(), views, strict=True)]
        return self.rules.finish(graph, torch.stack(energies).sum(0))


def among_nearest(graph: NeighborGraph, squared: Tensor, sel: int) -> Tensor:
    """(n_edges,) bool, the `sel` edges of each centre with the smallest finite `squared`; ties keep the order of the edges."""
    edge, real = center_slots(graph)
    flat = edge.reshape(-1)
    laid_out = torch.where(real, squared.index_select(0, flat).view(edge.shape), torch.inf)
    rank = laid_out.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    chosen = (real & (rank < sel)).reshape(-1)
    # every edge has one slot, and an empty slot adds nothing to edge 0
    taken = torch.zeros_like(graph.edge_center).index_add(0, flat, chosen.to(torch.int64))
    return (taken > 0) & torch.isfinite(squared)


def sel_of(model: object) -> int | None:
    """How many neighbours DeePMD's padded list of the model holds; None for models that DeePMD does not have."""
    if isinstance(model, DPA1):
        return sum(model.descriptor.config.sel)
    if isinstance(model, PairTable):
        return model.sel
    parts = getattr(model, "parts", None)
    sels = [sel_of(one) for one in parts.as_list()] if isinstance(parts, Parts) else [None]
    return None if None in sels else max(cast(list[int], sels))


def first_type_map(models: Sequence[nn.Module]) -> tuple[str, ...]:
    """The type map of the first model."""
    return cast(EnergyModel, models[0]).spec.type_map if models else ()


def linear_to_source(model: LinearEnergyModel, write: Callable[[nn.Module], Source]) -> Source:
    """DeePMD's model dict of type `linear`; `write` gives that of each model."""
    weights = model.weights if isinstance(model.weights, str) else list(model.weights)
    head = {"@class": "Model", "type": "linear", "@version": 3, **model.rules.to_source()}
    return {**head, "models": [write(one) for one in model.parts.models], "weights": weights}


def linear_from_source(source: Source, read: Callable[[Source], nn.Module]) -> LinearEnergyModel:
    """The model of DeePMD's dict of type `linear` or `linear_ener`."""
    check_dict(source, {"models", "weights"}, (1, 3))
    model = LinearEnergyModel(
        [read(one) for one in source["models"]],
        source["type_map"],
        source.get("weights", "mean"),
        pair_exclude_types=source.get("pair_exclude_types", []),
        atom_exclude_types=source.get("atom_exclude_types", []),
    )
    model.rules.load_bias(source)
    return model
