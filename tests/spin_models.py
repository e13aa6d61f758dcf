"""Small spin models, spins for structures, and a model that takes charge and spin of a whole system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from carryall.data import AtomicData
from carryall.graph import NeighborGraph, PotentialSpec
from carryall.graph.neighbor_graph import local_index
from carryall.models import DPA1, DescriptorConfig, FittingConfig
from carryall.models.registry import register
from carryall.models.spin import SpinModel, virtual_type_map
from structures import CUTOFF

TYPES = ("O", "H")
SCALE = 0.3


def small_spin(
    use_spin: Sequence[bool] = (True, True),
    *,
    virtual_scale: float | Sequence[float] = (SCALE, 0.8 * SCALE),
    margin: float = 0.0,
    method: Literal["graph", "legacy"] = "graph",
    davg: float = 0.0,
    sel: int = 60,
    seed: int = 7,
    fitting: dict[str, Any] | None = None,
    **descriptor: Any,
) -> SpinModel:
    """A random spin model; cutoff CUTOFF without the margin."""
    n = len(TYPES)
    config = DescriptorConfig(
        **{  # type: ignore[arg-type]
            "rcut": CUTOFF, "rcut_smth": 1.0, "sel": (sel,), "neuron": (4, 8), "axis_neuron": 3, "tebd_dim": 3, "attn": 6,
            "attn_layer": 1, "env_protection": 0.01, **descriptor,
        }
    )  # fmt: skip
    backbone = DPA1(
        virtual_type_map(TYPES),
        config,
        FittingConfig(neuron=(8, 8), **(fitting or {})),
        pair_exclude_types=[(n + k, other) for k in range(n) if not use_spin[k] for other in range(2 * n)],
        atom_exclude_types=range(n, 2 * n),
        neighbor_graph_method=method,
        seed=seed,
    )
    backbone.descriptor.dstd.fill_(0.3)
    backbone.descriptor.davg[:, 0] = davg
    return SpinModel(backbone, use_spin, virtual_scale, margin).eval()


def with_spins(data: AtomicData, seed: int = 0, length: float = 1.2) -> AtomicData:
    """The structure with random spins."""
    return data.replace(spins=length * np.random.default_rng(seed).normal(size=(data.n_atoms, 3)))


class ChargedSprings(nn.Module):
    """E_i = sum over edges of k r^2 / 2, with k = charge + multiplicity^2 of the system, and |spin_i|^2 of the atom."""

    def __init__(self, default: tuple[float, ...] | None = None, spin: bool = False) -> None:
        super().__init__()
        self.default, self.spin = default, spin

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        return PotentialSpec(CUTOFF, TYPES, dim_chg_spin=2, default_chg_spin=self.default, spin=self.spin, block_edges=40)

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) energies."""
        assert graph.charge_spin is not None
        local = graph.system.index_select(0, local_index(graph))
        strength = graph.charge_spin[:, 0] + graph.charge_spin[:, 1].square()
        terms = torch.where(graph.edge_mask, edge_vec.square().sum(1), 0.0)
        energy = edge_vec.new_zeros(graph.n_local).index_add(0, graph.edge_center, 0.5 * terms)
        energy = energy * strength.index_select(0, local)
        if graph.spin is not None and self.spin:
            energy = energy + graph.spin.square().sum(1).index_select(0, local_index(graph))
        return energy

    def to_dict(self) -> dict[str, Any]:
        """Its source dict."""
        return {"type": "charged_springs", "default": None if self.default is None else list(self.default), "spin": self.spin}

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> ChargedSprings:
        """The model of a source dict."""
        default = source["default"]
        return cls(None if default is None else tuple(default), source["spin"])


register("charged_springs", ChargedSprings)
