"""Models written for LAMMPS' ML-IAP interface, unchanged, in every engine and on any number of ranks.

Such a model is given edge vectors and calls `forward_exchange(features, out, width)` on the object it was given, and
`reverse_exchange` in the derivative (MACE, SevenNet, NequIP and MatterSim do). LAMMPS has these calls in its Kokkos build only;
here they go through the exchange of the graph. Two Potentials:

    MACEPotential(model)     a MACE module as it was trained or loaded
    MLIAPPotential(unified)  any object with `element_types`, `rcutfac` and `compute_forces(data)`

Both are once differentiable, as the interface is: for running, not for training. Neither can be packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from carryall.data.elements import SYMBOLS, symbol_of
from carryall.errors import InputError
from carryall.exchange import Exchange
from carryall.exchange.context import open_exchange
from carryall.exchange.handles import find
from carryall.graph.edge_terms import AtomicVirial, reduce_edges
from carryall.graph.neighbor_graph import NeighborGraph, edge_vectors
from carryall.graph.potential import PotentialSpec

LEAST_EDGES = 2  # with fewer, models of this interface return before their exchanges, and other ranks wait for ever


@dataclass(frozen=True, eq=False)
class GhostRows:
    """The two calls that such a model makes: rows are owned atoms, then `n_phantom` that belong to nobody, then ghosts."""

    exchange: Exchange
    n_phantom: int = 0

    @torch.no_grad()
    def forward_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """Fill `out`, like `features` (n_rows, ...): own rows are copied, ghosts' get those of their owners."""
        n_local, n_own = self._sizes(features, width)
        out[:n_own] = features[:n_own]
        out[n_own:] = self.exchange.forward(features[:n_local])

    @torch.no_grad()
    def reverse_exchange(self, gradient: Tensor, out: Tensor, width: int) -> None:
        """Fill `out`, like `gradient` (n_rows, ...), with the adjoint: ghosts' rows are added to their owners'."""
        n_local, n_own = self._sizes(gradient, width)
        out[:n_own] = gradient[:n_own]
        out[:n_local] += self.exchange.reverse(gradient[n_own:])
        out[n_own:] = 0

    def _sizes(self, rows: Tensor, width: int) -> tuple[int, int]:
        plan = self.exchange.plan
        expected = plan.n_local + self.n_phantom + plan.n_ghost
        if rows.shape[0] != expected or rows.shape[-1] != width:
            raise InputError(
                f"an exchange of {tuple(rows.shape)} with width {width}: expected {expected} rows, {plan.n_local} owned, "
                f"{self.n_phantom} phantom and {plan.n_ghost} ghosts, of that width"
            )
        return plan.n_local, plan.n_local + self.n_phantom


@dataclass(frozen=True, eq=False)
class Rows:
    """What a model of this interface is asked about: a graph's rows and edges, with a phantom atom where it needs one."""

    ghost_rows: GhostRows
    types: Tensor
    """(n_rows,) int64."""
    center: Tensor
    """(n_edges,) int64."""
    neighbor: Tensor
    """(n_edges,) int64."""
    vectors: Tensor
    """(n_edges, 3) float64, Å, from centre to neighbour."""
    n_own: int
    """Owned atoms and the phantom."""


def _rows(graph: NeighborGraph, exchange: Exchange, cutoff: float) -> tuple[Rows, Tensor]:
    """The rows of a graph, and which of its edges take part: those within the cutoff, which come first.

    An atom that nobody owns, with two edges to itself, stands where a rank has no atoms or hardly an edge: models of this
    interface cannot evaluate that, and would leave out their exchanges.
    """
    vectors = edge_vectors(graph).detach()
    kept = (graph.edge_mask & (vectors.square().sum(1) <= cutoff**2)).nonzero().squeeze(1)
    center, neighbor = graph.edge_center.index_select(0, kept), graph.edge_neighbor.index_select(0, kept)
    vectors, types, n_local = vectors.index_select(0, kept), graph.atom_types, graph.n_local
    n_phantom = int(n_local == 0 or len(kept) < LEAST_EDGES)
    if n_phantom:
        phantom = center.new_full((2,), n_local)
        away = vectors.new_tensor([[0.5 * cutoff, 0.0, 0.0]])
        center, vectors = torch.cat([center, phantom]), torch.cat([vectors, away, -away])
        neighbor = torch.cat([neighbor + (neighbor >= n_local), phantom])
        types = torch.cat([types[:n_local], types.new_zeros(1), types[n_local:]])
    return Rows(GhostRows(exchange, n_phantom), types, center, neighbor, vectors, n_local + n_phantom), kept


Answer = tuple[Tensor, Tensor]
"""Energies of the first rows, eV, and dE/d(edge vector) (n_edges, 3), eV/Å, of any dtype."""


def _evaluate(
    graph: NeighborGraph, spec: PotentialSpec, device: torch.device, answer: Callable[[Rows], Answer], virial: AtomicVirial
) -> dict[str, Tensor]:
    """What a Potential returns, of a model that gives `answer`."""

    def prepare(graph: NeighborGraph) -> NeighborGraph:
        return graph.to(device, torch.float64)

    with torch.inference_mode(False), torch.enable_grad():
        own = graph.map(torch.clone) if graph.positions.is_inference() else graph
        opened = open_exchange(own, prepare)
        rows, kept = _rows(opened, find(opened.exchange.handle), spec.cutoff)
        energies, gradients = answer(rows)
        n_local, vectors = opened.n_local, edge_vectors(opened).detach()
        gradient = torch.zeros_like(vectors).index_copy(0, kept, gradients[: len(kept)].detach().to(vectors))
        out = reduce_edges(opened, energies[:n_local].detach().to(vectors), vectors, gradient, atomic_virial=virial)
    return {name: value.to(graph.device) for name, value in out.items()}


@dataclass(frozen=True, eq=False)
class MACEPotential:
    """A MACE module, unchanged, as a Potential; on the device and in the dtype that its weights have.

        potential = MACEPotential(torch.load("MACE.model", weights_only=False))

    Edge vectors are handed over with the sign that MACE is trained with (receiver - sender). Once differentiable: results
    carry no gradient. A model of several heads needs the name of one. InputError for a scripted module, an unknown head, and
    a module that takes a charge or spin of the whole system.
    """

    model: nn.Module
    head: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, torch.jit.ScriptModule):
            raise InputError("a scripted MACE module leaves out its exchanges: give the module itself, not a compiled one")
        for name in ("r_max", "atomic_numbers", "num_interactions"):
            if not hasattr(self.model, name):
                raise InputError(f"the module is no MACE model: a {type(self.model).__name__} without {name}")
        if hasattr(self.model, "joint_embedding"):
            specs: Any = self.model.embedding_specs
            raise InputError(
                f"the MACE model takes {', '.join(specs)} of a whole system, which its ML-IAP form does not give to ghosts: "
                "use a model without such inputs"
            )
        self._head_index()

    @cached_property
    def spec(self) -> PotentialSpec:
        """Cutoff, elements and dtype, as the module has them."""
        model: Any = self.model
        return PotentialSpec(
            cutoff=float(model.r_max),
            type_map=tuple(symbol_of(int(number)) for number in model.atomic_numbers),
            message_passing=int(model.num_interactions) > 1,
            dtype=str(model.r_max.dtype).removeprefix("torch."),
        )

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """Evaluate the graph."""
        model: Any = self.model
        return _evaluate(_own(graph, self.spec), self.spec, model.r_max.device, self._answer, atomic_virial)

    def _answer(self, rows: Rows) -> Answer:
        model: Any = self.model
        dtype, n_ghost = model.r_max.dtype, len(rows.types) - rows.n_own
        vectors = (-rows.vectors).to(dtype).requires_grad_()
        batch = {
            "vectors": vectors,
            "node_attrs": nn.functional.one_hot(rows.types, len(model.atomic_numbers)).to(dtype),
            "edge_index": torch.stack([rows.neighbor, rows.center]),
            "batch": rows.types.new_zeros(rows.n_own),
            "head": rows.types.new_tensor([self._head_index()]),
            "natoms": (rows.n_own, n_ghost),
            "lammps_class": rows.ghost_rows,
        }
        energies = model(batch, compute_force=False, lammps_mliap=True)["node_energy"]
        (gradient,) = torch.autograd.grad(energies.sum(), vectors)
        return energies, -gradient

    def _head_index(self) -> int:
        heads = list(getattr(self.model, "heads", None) or ["Default"])
        if self.head is None and len(heads) == 1:
            return 0
        if self.head not in heads:
            raise InputError(f"the MACE model has the heads {', '.join(heads)}, not {self.head!r}: give head= one of them")
        return heads.index(self.head)


class UnifiedModel(Protocol):
    """What LAMMPS' `pair_style mliap unified` runs."""

    element_types: list[str]
    rcutfac: float

    def compute_forces(self, data: Any) -> None:
        """Fill data.eatoms and call data.update_pair_forces."""
        ...


@dataclass(eq=False)
class MLIAPData:
    """The object that LAMMPS gives to `compute_forces`, in names, shapes (numpy) and meaning."""

    ghost_rows: GhostRows
    elems: np.ndarray
    """(ntotal,) element of each atom, index into element_types."""
    pair_i: np.ndarray
    """(npairs,) centre of each edge."""
    pair_j: np.ndarray
    """(npairs,) neighbour."""
    rij: np.ndarray
    """(npairs, 3) Å, from i to j."""
    eatoms: np.ndarray
    """(nlocal,) eV, to be filled."""
    energy: Any = 0.0
    """Their sum, to be set; not used."""
    pair_forces: Tensor | None = field(default=None, init=False)

    @property
    def nlocal(self) -> int:
        """Owned atoms, a phantom among them."""
        return len(self.eatoms)

    nlistatoms = nlocal

    @property
    def ntotal(self) -> int:
        """Owned atoms and ghosts."""
        return len(self.elems)

    @property
    def npairs(self) -> int:
        """Edges."""
        return len(self.pair_i)

    @property
    def jatoms(self) -> np.ndarray:
        """Another name of pair_j."""
        return self.pair_j

    def forward_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """Features of ghosts from their owners."""
        self.ghost_rows.forward_exchange(features, out, width)

    def reverse_exchange(self, gradient: Tensor, out: Tensor, width: int) -> None:
        """Gradients of ghosts to their owners."""
        self.ghost_rows.reverse_exchange(gradient, out, width)

    def update_pair_energy(self, eij: Any) -> None:
        """Energies of edges, half of each to its centre, for a model that has no other energies."""
        values = 0.5 * torch.as_tensor(eij).detach().to("cpu", torch.float64).reshape(self.npairs)
        center = torch.from_numpy(self.pair_i).long()
        self.eatoms[:] = values.new_zeros(self.nlocal).index_add(0, center, values).numpy()

    def update_pair_forces(self, fij: Any) -> None:
        """dE/d(rij) of each edge."""
        self.pair_forces = torch.as_tensor(fij).detach().to("cpu", torch.float64).reshape(self.npairs, 3)

    update_pair_forces_cpu = update_pair_forces_gpu = update_pair_forces
    update_pair_energy_cpu = update_pair_energy_gpu = update_pair_energy


class MLIAPPotential:
    """An object written for `pair_style mliap unified` (a wrapper of MACE, SevenNet, NequIP, ...) as a Potential.

    Its cutoff is 2 * rcutfac, as in LAMMPS; entries of element_types that name no element are left out. `dtype` is what it
    computes in, by default what its own `dtype` says; `message_passing=False` for one that makes no exchange. Atoms of several
    systems come as one list of atoms, so energies must be sums over atoms. InputError when it gives no pair forces.
    """

    def __init__(self, unified: UnifiedModel, dtype: str | None = None, message_passing: bool = True) -> None:
        self.unified = unified
        own = str(getattr(unified, "dtype", torch.float64)).removeprefix("torch.")
        places = [index for index, symbol in enumerate(unified.element_types) if symbol in SYMBOLS[1:]]
        self._elements = torch.tensor(places, dtype=torch.int64)
        self.spec = PotentialSpec(
            cutoff=2.0 * float(unified.rcutfac),
            type_map=tuple(unified.element_types[index] for index in places),
            message_passing=message_passing,
            dtype=own if dtype is None else dtype,
        )

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """Evaluate the graph."""
        return _evaluate(_own(graph, self.spec), self.spec, torch.device("cpu"), self._answer, atomic_virial)

    def _answer(self, rows: Rows) -> Answer:
        data = MLIAPData(
            rows.ghost_rows,
            elems=self._elements[rows.types].int().numpy(),
            pair_i=rows.center.int().numpy(),
            pair_j=rows.neighbor.int().numpy(),
            rij=rows.vectors.numpy(),
            eatoms=np.zeros(rows.n_own),
        )
        self.unified.compute_forces(data)
        if data.pair_forces is None:
            raise InputError(
                f"{type(self.unified).__name__}.compute_forces returned without update_pair_forces: it has to call that with "
                "dE/d(rij) of each pair"
            )
        return torch.from_numpy(data.eatoms), data.pair_forces


def _own(graph: NeighborGraph, spec: PotentialSpec) -> NeighborGraph:
    """The graph as it is; without exchange for a model that makes none, whose ghosts may then belong to anyone."""
    if spec.message_passing:
        return graph
    nobody = None if graph.n_atoms == graph.n_local else graph.edge_center.new_zeros(graph.n_atoms - graph.n_local)
    return graph.replace(exchange=None, ghost_owner=nobody)
