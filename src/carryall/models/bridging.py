"""A learned model that hands over to a short-range repulsion where atoms come close, as DeePMD's `zbl` models (`use_srtab`):

    E_i = (1 - w_i) E_model,i + w_i E_short,i,   w_i = 1 below sw_rmin, 0 above sw_rmax, 1 - 10 u^3 + 15 u^4 - 6 u^5 between
    u = (sigma_i - sw_rmin) / (sw_rmax - sw_rmin),   sigma_i = sum_j r_ij exp(-r_ij / alpha) / sum_j exp(-r_ij / alpha)

H. Wang et al., Appl. Phys. Lett. 114, 244101 (2019), arXiv:1904.00360. sigma_i is a smooth minimum of the distances to the
neighbours; an atom without neighbours has w_i = 0. It is computed as a softmax, so that no distance underflows; deepmd-kit's
pt_expt and numpy routes have the same value, since padding is not in their sums. Its pt route replaces denominators below
1e-20, so that sigma_i comes out too small, w_i = 1 and the learned energy is lost, where the nearest neighbour is farther than
46 alpha (4.6 Å by default). A neighbour at the cutoff has a share exp((sigma_i - cutoff) / alpha) of sigma_i, which is the
step of w_i there: 1e-13 for 3 Å between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.potential import PotentialSpec
from carryall.graph.segments import segment_softmax, segment_sum
from carryall.models.combination import Parts, Source, first_type_map, sel_of
from carryall.models.pair import smooth_cutoff
from carryall.models.type_rules import TypeRules, check_dict


class Bridged(nn.Module):
    """`model` where no neighbour is near, `short_range` (a PairTable, a ZBL, or any other) where one is, by sigma in Å.

    `smin_alpha` (Å) is the decay of the smooth minimum. sigma is taken over the neighbours that the one of the two models with
    the larger `sel` sees, as in DeePMD (its larger list); where one has none, over those of the longer cutoff.
    """

    def __init__(
        self,
        model: nn.Module,
        short_range: nn.Module,
        sw_rmin: float,
        sw_rmax: float,
        smin_alpha: float = 0.1,
        type_map: Sequence[str] | None = None,
        *,
        pair_exclude_types: Sequence[Sequence[int]] = (),
        atom_exclude_types: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not 0 <= sw_rmin < sw_rmax:
            raise InputError(f"sw_rmin and sw_rmax must satisfy 0 <= sw_rmin < sw_rmax (Å), got {sw_rmin} and {sw_rmax}")
        if not smin_alpha > 0:
            raise InputError(f"smin_alpha must be positive (Å), got {smin_alpha}")
        type_map = first_type_map([model]) if type_map is None else type_map
        self.parts = Parts([model, short_range], type_map)
        if sw_rmax > max(self.parts.cutoffs):
            raise InputError(f"sw_rmax, {sw_rmax:g} Å, is beyond the cutoff, {max(self.parts.cutoffs):g} Å: make it smaller")
        self.rules = TypeRules(type_map, pair_exclude_types, atom_exclude_types)
        self._wider = wider(self.parts)
        self.sw_rmin, self.sw_rmax, self.smin_alpha = float(sw_rmin), float(sw_rmax), float(smin_alpha)

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return self.parts.spec

    @property
    def neighbor_graph_method(self) -> str:
        """That of the models within."""
        return self.parts.neighbor_graph_method

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies, eV."""
        views = self.parts.views(graph, edge_vec, self.rules)
        weight = self.short_range_weight(views[self._wider], edge_vec)
        learned, repulsion = (model(view, edge_vec) for model, view in zip(self.parts.as_list(), views, strict=True))
        return self.rules.finish(graph, (1 - weight) * learned + weight * repulsion)

    def short_range_weight(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) w of the edges that the graph does not mask."""
        mask, center, n_local = graph.edge_mask, graph.edge_center, graph.n_local
        distance = torch.where(mask, edge_vec.square().sum(1), 1.0).sqrt()
        share = segment_softmax(-distance / self.smin_alpha, center, n_local, mask)
        sigma = segment_sum(share * distance, center, n_local, mask)
        has_neighbors = segment_sum(torch.ones_like(distance), center, n_local, mask) > 0
        return torch.where(has_neighbors, smooth_cutoff(sigma, self.sw_rmin, self.sw_rmax), 0.0)


def wider(parts: Parts) -> int:
    """Which of the two models has the larger `sel`, the second if both are the same; else which has the longer cutoff."""
    learned, short_range = (sel_of(model) for model in parts.models)
    if learned is None or short_range is None:
        return int(parts.cutoffs[1] > parts.cutoffs[0])
    return int(short_range >= learned)


def bridged_to_source(model: Bridged, write: Callable[[nn.Module], Source]) -> Source:
    """DeePMD's model dict of type `zbl`; `write` gives that of each of the two."""
    return {
        "@class": "Model",
        "type": "zbl",
        "@version": 2,
        **model.rules.to_source(),
        "models": [write(one) for one in model.parts.models],
        "weights": "mean",
        "sw_rmin": model.sw_rmin,
        "sw_rmax": model.sw_rmax,
        "smin_alpha": model.smin_alpha,
    }


def bridged_from_source(source: Source, read: Callable[[Source], nn.Module]) -> Bridged:
    """The model of DeePMD's dict of type `zbl`."""
    check_dict(source, {"models", "weights", "sw_rmin", "sw_rmax", "smin_alpha"}, (1, 2))
    if len(source["models"]) != 2:
        raise InputError(f"the model dict of type 'zbl' has {len(source['models'])} models, expected two: learned and table")
    learned, short_range = (read(one) for one in source["models"])
    model = Bridged(
        learned,
        short_range,
        source["sw_rmin"],
        source["sw_rmax"],
        source.get("smin_alpha", 0.1),
        source["type_map"],
        pair_exclude_types=source.get("pair_exclude_types", []),
        atom_exclude_types=source.get("atom_exclude_types", []),
    )
    model.rules.load_bias(source)
    return model
