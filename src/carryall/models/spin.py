"""Spin models by virtual atoms (DeepSPIN), as DeePMD's `spin_ener`: T. Yang et al., Phys. Rev. B 110, 064427 (2024).

Each atom i has a virtual one at r_i + virtual_scale * spin_i, of a type of its own; the model of the energy, the backbone, is a
DPA-1 for both. Virtual atoms have no energy: they are what real atoms see of each other's spins, and of their own. So each
edge of the graph becomes two, to the neighbour and to its virtual atom, and each centre sees its own virtual atom. Types
without spins have virtual atoms in DeePMD's layout too, which nobody sees: here they have no edges.

Derivatives are at fixed spins: a virtual atom moves with its atom, and strain does not turn or stretch spins. Forces are those
on both, the virial is the sum over edges between atoms, which is DeePMD's with its correction for virtual atoms; the magnetic
force is virtual_scale times the force on the virtual atom.

What an atom sees are the virtual atoms of the neighbours that the graph holds, as far as they are within the backbone's cutoff
themselves. An atom just outside the cutoff may have its virtual atom inside, and there deepmd-kit's own routes differ. Packed
programs look at the virtual atoms of neighbours only, as is done here with `neighbor_margin` 0: energies step where such a
neighbour enters or leaves. Training and `.pth` models search among virtual atoms, and are smooth; with a `neighbor_margin` of
twice the largest virtual_scale * |spin|, or more, the model here is theirs, and asks for neighbours that much farther.

A zero spin puts both atoms in one place, where DeePMD's `env_protection` keeps the energy finite. It is no smooth point: the
distance has a cusp there, and attention sees the direction of a virtual atom however near it is. Magnetic forces at zero are
the slope of what is linear in the spin, as in deepmd-kit, but for that direction, whose slope (1e12 there) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.potential import PotentialSpec
from carryall.models.dpa1.model import DPA1

Source = dict[str, Any]
SUFFIX = "_spin"
"""What DeePMD puts behind the symbol of an atom for the type of its virtual atom."""
KEYS = {"type", "backbone_model", "spin", "neighbor_margin"}


class SpinModel(nn.Module):
    """Energies of atoms with spins, by a `backbone` for 2 n types: n real ones, then their virtual atoms.

    use_spin: for each real type, whether its spins count. virtual_scale: Å per unit of spin, one number or one for each real
    type. neighbor_margin: Å beyond the backbone's cutoff where neighbours may have virtual atoms inside it.
    """

    takes_spin = True
    scale: Tensor
    magnetic: Tensor

    def __init__(
        self,
        backbone: DPA1,
        use_spin: Sequence[bool],
        virtual_scale: float | Sequence[float],
        neighbor_margin: float = 0.0,
    ) -> None:
        super().__init__()
        if neighbor_margin < 0:
            raise InputError(f"neighbor_margin must not be negative, got {neighbor_margin}")
        self.backbone, self.neighbor_margin = backbone, float(neighbor_margin)
        self.use_spin = tuple(bool(one) for one in use_spin)
        check_backbone(backbone, self.use_spin)
        self.virtual_scale = full_scale(virtual_scale, self.use_spin)
        self.type_map = backbone.type_map[: len(self.use_spin)]
        # per type: Å from an atom to its virtual one for a unit of spin, and whether anybody sees that
        self.register_buffer("scale", torch.tensor(self.virtual_scale, dtype=torch.float64), persistent=False)
        self.register_buffer("magnetic", torch.tensor(self.use_spin), persistent=False)

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the model."""
        inner = self.backbone.spec
        return PotentialSpec(
            cutoff=inner.cutoff + self.neighbor_margin,
            type_map=self.type_map,
            dtype=inner.dtype,
            # an edge takes two slots of the backbone's blocks
            block_edges=None if inner.block_edges is None else max(1, inner.block_edges // 2),
            dim_fparam=inner.dim_fparam,
            default_fparam=inner.default_fparam,
            dim_aparam=inner.dim_aparam,
            spin=True,
        )

    @property
    def neighbor_graph_method(self) -> str:
        """That of the backbone; DeePMD runs spin models by padded lists only, "legacy"."""
        return self.backbone.neighbor_graph_method

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        """(n_local,) float64 energies, eV, of `edge_vec` (n_edges, 3), Å, and graph.spin."""
        if graph.spin is None:
            raise InputError("this potential needs spin, three numbers for each atom: the graph has none")
        visible = self.magnetic.index_select(0, graph.atom_types)
        offset = graph.spin.to(edge_vec.dtype) * (self.scale * self.magnetic).index_select(0, graph.atom_types)[:, None]
        wide, vectors = with_virtual_atoms(graph, edge_vec, offset, visible, len(self.type_map))
        inside = vectors.detach().square().sum(1) <= self.backbone.descriptor.config.rcut**2
        return self.backbone(wide.replace(edge_mask=wide.edge_mask & inside), vectors)


def with_virtual_atoms(
    graph: NeighborGraph, edge_vec: Tensor, offset: Tensor, visible: Tensor, n_types: int
) -> tuple[NeighborGraph, Tensor]:
    """The graph with a virtual atom behind each atom, and its edge vectors (2 n_edges + n_local, 3).

    offset (n_atoms, 3), Å, leads from an atom to its virtual one; only those `visible` (n_atoms,) bool have edges. Virtual
    atoms are rows n_atoms, n_atoms + 1, ..., of types from n_types on, and no centres. Of a centre's edges the first goes to
    its own virtual atom; then each edge goes to the neighbour, and again to the neighbour's virtual atom.
    """
    n_atoms, local = graph.positions.shape[0], local_index(graph)
    center, neighbor = graph.edge_center, graph.edge_neighbor
    row = 2 * count(center) + center + 1
    own = 2 * graph.ptr.index_select(0, local) + local
    place = torch.cat([own, row, row + 1])

    def laid_out(own: Tensor, real: Tensor, virtual: Tensor) -> Tensor:
        values = torch.cat([own, real, virtual])
        return torch.zeros_like(values).index_copy(0, place, values)

    shift = graph.edge_shift
    wide = graph.replace(
        positions=torch.cat([graph.positions, graph.positions + offset.detach().to(graph.positions.dtype)]),
        atom_types=torch.cat([graph.atom_types, graph.atom_types + n_types]),
        system=torch.cat([graph.system, graph.system]),
        edge_center=laid_out(local, center, center),
        edge_neighbor=laid_out(local + n_atoms, neighbor, neighbor + n_atoms),
        edge_shift=laid_out(torch.zeros_like(local)[:, None].expand(-1, 3).to(shift.dtype), shift, shift),
        edge_mask=laid_out(
            visible.index_select(0, local), graph.edge_mask, graph.edge_mask & visible.index_select(0, neighbor)
        ),
        ptr=2 * graph.ptr + count(graph.ptr),
        rank=None if graph.rank is None else count(torch.cat([graph.rank, graph.rank, graph.ptr.new_zeros(1)])),
        ghost_owner=None,
        aparam=None if graph.aparam is None else torch.cat([graph.aparam, torch.zeros_like(graph.aparam)]),
        spin=None,
    )
    vectors = laid_out(offset.index_select(0, local), edge_vec, edge_vec + offset.index_select(0, neighbor))
    return wide, vectors


def count(like: Tensor) -> Tensor:
    """0, 1, 2, ... along the first axis of `like` (n,), int64."""
    return torch.cumsum(torch.ones_like(like), 0) - 1


def full_scale(virtual_scale: float | Sequence[float], use_spin: Sequence[bool]) -> tuple[float, ...]:
    """One number for each real type, of one for all, one for each type, or one for each type with spins."""
    if isinstance(virtual_scale, int | float):
        return (float(virtual_scale),) * len(use_spin)
    given = [float(one) for one in virtual_scale]
    if len(given) == len(use_spin):
        return tuple(given)
    if len(given) != sum(use_spin):
        raise InputError(
            f"virtual_scale has {len(given)} numbers, expected one, {len(use_spin)} (for each type) or {sum(use_spin)} "
            "(for each type with spins)"
        )
    left = iter(given)
    return tuple(next(left) if one else 0.0 for one in use_spin)


def check_backbone(backbone: nn.Module, use_spin: Sequence[bool]) -> None:
    """InputError unless the backbone has types for virtual atoms, which have no energy, and are not seen without spins."""
    if not isinstance(backbone, DPA1):
        raise InputError(f"the backbone of a spin model is a {type(backbone).__name__}: only DPA-1 can be one")
    n_types = len(use_spin)
    if len(backbone.type_map) != 2 * n_types:
        raise InputError(f"use_spin is for {n_types} types, so the backbone needs {2 * n_types}: it has {backbone.type_map}")
    if missing := set(range(n_types, 2 * n_types)) - set(backbone.atom_exclude_types):
        raise InputError(
            f"virtual atoms of type {min(missing)}, {backbone.type_map[min(missing)]}, have an energy of their own: carryall "
            f"reads models whose atom_exclude_types hold all virtual types, {n_types} to {2 * n_types - 1}"
        )


def virtual_type_map(type_map: Sequence[str]) -> tuple[str, ...]:
    """The backbone's type map: real types, then those of their virtual atoms."""
    return (*type_map, *(symbol + SUFFIX for symbol in type_map))


def spin_to_source(model: SpinModel, write: Callable[[nn.Module], Source]) -> Source:
    """DeePMD's model dict of type `spin_ener`; `write` gives the backbone's."""
    source: Source = {
        "type": "spin_ener",
        "backbone_model": write(model.backbone),
        "spin": {"use_spin": list(model.use_spin), "virtual_scale": list(model.virtual_scale)},
    }
    return {**source, "neighbor_margin": model.neighbor_margin} if model.neighbor_margin else source


def spin_from_source(source: Source, read: Callable[[Source], nn.Module]) -> SpinModel:
    """The model of DeePMD's dict of type `spin_ener`."""
    spin = source["spin"]
    for found, known, where in ((source, KEYS, "model dict"), (spin, {"use_spin", "virtual_scale"}, "spin of the model dict")):
        if unknown := sorted(found.keys() - known):
            raise InputError(f"the {where} has {unknown[0]!r}, which carryall does not know")
    if spin["virtual_scale"] is None:
        raise InputError("the model dict has no spin.virtual_scale: carryall knows spins by virtual atoms only")
    backbone = read(source["backbone_model"])
    check_backbone(backbone, spin["use_spin"])
    assert isinstance(backbone, DPA1)
    return SpinModel(backbone, spin["use_spin"], spin["virtual_scale"], source.get("neighbor_margin", 0.0))
