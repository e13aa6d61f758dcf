"""DPA-1: the attention descriptor and an energy fitting net, as one model of per-atom energies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_types
from carryall.graph.potential import PotentialSpec
from carryall.models.dpa1.config import DescriptorConfig, FittingConfig
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.dpa1.econf import electron_configurations
from carryall.models.dpa1.environment import center_blocks, exclude
from carryall.models.dpa1.fitting import STATISTICS, EnergyFitting
from carryall.models.dpa1.legacy import empty_slots, nearest
from carryall.models.dpa1.precision import resolved, set_precision
from carryall.models.dpa1.type_embedding import TypeEmbedding

METHODS = ("graph", "legacy")
ROW_STATISTICS = ("davg", "dstd")
Config = TypeVar("Config", DescriptorConfig, FittingConfig)


class DPA1(nn.Module):
    """Per-atom energies of a graph.

    `pair_exclude_types` removes edges, `atom_exclude_types` sets energies to zero; both by type index. `bias_atom_e` (of the
    fitting net) and `out_bias` (of the model) both add; training writes `out_bias`. `neighbor_graph_method` "graph" sees every
    neighbour and nothing else; "legacy" has the empty slots of DeePMD's padded neighbour lists too.
    """

    out_bias: Tensor

    def __init__(
        self,
        type_map: Sequence[str],
        descriptor: DescriptorConfig | None = None,
        fitting: FittingConfig | None = None,
        *,
        pair_exclude_types: Sequence[tuple[int, int]] = (),
        atom_exclude_types: Sequence[int] = (),
        neighbor_graph_method: Literal["graph", "legacy"] = "graph",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if neighbor_graph_method not in METHODS:
            raise InputError(f"neighbor_graph_method must be one of {', '.join(METHODS)}, got {neighbor_graph_method!r}")
        generator = torch.Generator().manual_seed(seed)
        self.type_map, self.neighbor_graph_method = tuple(type_map), neighbor_graph_method
        n_types = len(self.type_map)
        config, fitting = with_precision(descriptor or DescriptorConfig()), with_precision(fitting or FittingConfig())
        excluded = tuple(sorted({*map(int, atom_exclude_types), *fitting.exclude_types}))
        fitting = fitting.model_copy(update={"exclude_types": excluded})
        check_types("atom_exclude_types", excluded, n_types)
        check_types("pair_exclude_types", [kind for pair in pair_exclude_types for kind in pair], n_types)
        check_types("descriptor.exclude_types", [kind for pair in config.exclude_types for kind in pair], n_types)
        self.descriptor = Descriptor(config, n_types, generator)
        if config.use_econf_tebd:
            features = electron_configurations(self.type_map)
            self.descriptor.type_embedding = TypeEmbedding(
                n_types, config.tebd_dim, config.use_tebd_bias, generator, features=features
            )
        if not config.trainable:
            self.descriptor.requires_grad_(False)
        self.fitting = EnergyFitting(fitting, n_types, config.dim_out, generator)
        set_precision(self.descriptor, config.precision, ROW_STATISTICS)
        set_precision(self.fitting, fitting.precision, STATISTICS)
        self.register_buffer("out_bias", torch.zeros(n_types, dtype=torch.float64))
        self.pair_exclude_types = tuple((int(a), int(b)) for a, b in pair_exclude_types)
        self.atom_exclude_types = excluded
        allowed = torch.ones(n_types, n_types, dtype=torch.bool)
        for a, b in self.pair_exclude_types:
            allowed[a, b] = allowed[b, a] = False
        self.register_buffer("allowed", allowed, persistent=False)
        counted = torch.ones(n_types, dtype=torch.float64)
        counted[list(self.atom_exclude_types)] = 0
        self.register_buffer("counted", counted, persistent=False)

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model; dtype is that of its weights, the lower of the two when descriptor and fitting net differ."""
        dtypes = {self.descriptor.type_embedding.layer.w.dtype, self.fitting.dtype}
        return PotentialSpec(
            cutoff=self.descriptor.config.rcut,
            type_map=self.type_map,
            dtype="float32" if torch.float32 in dtypes else "float64",
            block_edges=self._block_edges(),
            dim_fparam=self.fitting.config.numb_fparam,
            default_fparam=self.fitting.config.default_fparam,
            dim_aparam=self.fitting.config.aparam_inputs,
        )

    def _block_edges(self) -> int | None:
        if self.neighbor_graph_method == "legacy" and bool(self.descriptor.davg.any()):
            return None  # the energy of a centre depends on the first atom of its system, too
        config, itemsize = self.descriptor.config, self.descriptor.type_embedding.layer.w.itemsize
        # measured: attention wants its queries, keys and values, 3 * attn numbers an edge, in a core's own cache
        return min(5000, 2_000_000 // (3 * config.attn * itemsize)) if config.attn_layer else 5000

    @property
    def fitting_config(self) -> FittingConfig:
        """Options of the fitting net."""
        return self.fitting.config

    @property
    def bias_atom_e(self) -> Tensor:
        """(n_types,) eV, of the fitting net."""
        return self.fitting.bias_atom_e

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) float64 energies, eV, of `edge_vec` (n_edges, 3), Å."""
        types, config = local_types(graph), self.descriptor.config
        blocks = center_blocks(graph, edge_vec, types, config.rcut)
        legacy = self.neighbor_graph_method == "legacy"
        if legacy:
            blocks = nearest(blocks, sum(config.sel))
        if self.pair_exclude_types:
            blocks = exclude(blocks, self.get_buffer("allowed"))
        empty = empty_slots(blocks, graph, sum(config.sel)) if legacy else None
        energy = self.fitting(self.descriptor(blocks, empty), graph) + self.out_bias.index_select(0, types)
        return energy * self.get_buffer("counted").index_select(0, types) if self.atom_exclude_types else energy


def check_types(name: str, types: Sequence[int], n_types: int) -> None:
    """InputError for a type that does not exist."""
    for kind in types:
        if not 0 <= kind < n_types:
            raise InputError(f"{name} names type {kind}, there are types 0 to {n_types - 1}")


def with_precision(config: Config, precision: str | None = None) -> Config:
    """The configuration with its precision, or another, in full: no "default"."""
    return config.model_copy(update={"precision": precision or resolved(config.precision)})


def set_weight_dtype(model: DPA1, dtype: torch.dtype) -> DPA1:
    """Weights and statistics in `dtype` (float64 or float32); energy biases stay float64. Changes and returns the model."""
    precision = str(dtype).removeprefix("torch.")
    set_precision(model.descriptor, precision, ROW_STATISTICS)
    set_precision(model.fitting, precision, STATISTICS)
    model.descriptor.config = with_precision(model.descriptor.config, precision)
    model.fitting.config = with_precision(model.fitting.config, precision)
    return model
