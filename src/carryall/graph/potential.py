"""What a potential is, for everyone who runs one: a call on a graph, and facts about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from carryall.data.extra_inputs import complete_input
from carryall.errors import InputError
from carryall.graph.edge_terms import AtomicVirial
from carryall.graph.neighbor_graph import NeighborGraph
from carryall.graph.reciprocal import with_reciprocal

if TYPE_CHECKING:
    from carryall.graph.skin import SkinNeighborList
    from carryall.graph.systems import Systems

DTYPES = ("float32", "float64")
MAGNETIC = "magnetic_forces"


@dataclass(frozen=True)
class PotentialSpec:
    """Facts that an engine needs before it calls a potential."""

    cutoff: float
    """Å; the graph must hold every neighbour within it."""
    type_map: tuple[str, ...]
    """Chemical symbols in the order of the atom types."""
    outputs: tuple[str, ...] = ("energy", "atomic_energy", "forces", "virial", "atomic_virial")
    """What a call can return; atomic_virial on request only, magnetic_forces where it takes spins."""
    message_passing: bool = False
    """Whether features of ghosts, or sums over all atoms, must be exchanged between ranks."""
    dtype: str = "float64"
    """Floating-point type inside the model; inputs and outputs are float64."""
    block_edges: int | None = None
    """Edge slots that a CPU evaluates together, so that intermediate results stay in cache; None: all at once."""
    length_unit: str = "angstrom"
    energy_unit: str = "eV"
    dim_fparam: int = 0
    """Parameters of a whole system that it takes, `graph.fparam`."""
    default_fparam: tuple[float, ...] | None = None
    """What `graph.fparam` is where a graph has none; None: it has to have them."""
    dim_aparam: int = 0
    """Parameters of each atom that it takes, `graph.aparam`."""
    spin: bool = False
    """Whether it takes the magnetic moments of the atoms, `graph.spin`."""
    dim_chg_spin: int = 0
    """Numbers for charge and spin of a whole system that it takes, `graph.charge_spin`; commonly 2."""
    default_chg_spin: tuple[float, ...] | None = None
    """What `graph.charge_spin` is where a graph has none; None: it has to have them."""
    long_range: bool = False
    """Whether energies depend on positions and cell beyond the edge vectors, as those of electrostatics; 3-D periodic only."""
    k_cutoff: float = 0.0
    """1/Å; `graph.k_index` has to hold every reciprocal vector up to it, where long_range."""

    def __post_init__(self) -> None:
        if not self.cutoff > 0:
            raise InputError(f"cutoff must be positive, got {self.cutoff}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if len(set(self.type_map)) != len(self.type_map) or not self.type_map:
            raise InputError(f"type_map must name each element once, got {self.type_map}")
        if self.default_chg_spin is not None and len(self.default_chg_spin) != self.dim_chg_spin:
            raise InputError(f"default_chg_spin has {len(self.default_chg_spin)} values, dim_chg_spin is {self.dim_chg_spin}")
        if self.message_passing and self.block_edges is not None:
            raise InputError(
                f"block_edges = {self.block_edges} with message_passing: centres that exchange features are evaluated "
                "together; leave block_edges out"
            )
        if self.long_range and not self.message_passing:
            raise InputError(
                "long_range without message_passing: what depends on all atoms is summed over ranks, by all_reduce; set both"
            )
        if not 0 <= self.k_cutoff < float("inf"):
            raise InputError(f"k_cutoff must be 0 or a positive number (1/Å), got {self.k_cutoff}")
        if self.spin and MAGNETIC not in self.outputs:
            object.__setattr__(self, "outputs", (*self.outputs, MAGNETIC))

    @property
    def extra_inputs(self) -> tuple[str, ...]:
        """Names of what it takes beyond geometry and types."""
        widths = {"fparam": self.dim_fparam, "aparam": self.dim_aparam, "spin": 3 * self.spin, "charge_spin": self.dim_chg_spin}
        return tuple(name for name, width in widths.items() if width)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PotentialSpec:
        """The inverse of `to_dict`; keys that a later version added are left aside."""
        known = {field.name for field in fields(cls)}
        kept: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in known}
        return cls(**kept)


def with_defaults(graph: NeighborGraph, spec: PotentialSpec) -> NeighborGraph:
    """The graph with the parameters that the potential takes; InputError names what is missing or of another width."""
    if spec.dim_fparam:
        fparam = complete_input("fparam", graph.fparam, graph.n_systems, spec.dim_fparam, spec.default_fparam)
        graph = graph.replace(fparam=fparam.to(graph.device))
    if spec.dim_aparam:
        aparam = complete_input("aparam", graph.aparam, graph.n_atoms, spec.dim_aparam)
        graph = graph.replace(aparam=aparam.to(graph.device))
    if spec.spin:
        graph = graph.replace(spin=complete_input("spin", graph.spin, graph.n_atoms, 3).to(graph.device))
    if spec.dim_chg_spin:
        state = complete_input("charge_spin", graph.charge_spin, graph.n_systems, spec.dim_chg_spin, spec.default_chg_spin)
        graph = graph.replace(charge_spin=state.to(graph.device))
    if spec.long_range and graph.k_index is None:
        graph = with_reciprocal(graph, spec.k_cutoff)
    return graph


class Potential(Protocol):
    """A call on a graph.

    The result holds `energy` (n_systems,), `atomic_energy` (n_local,), `forces` (n_atoms, 3), `virial` (n_systems, 3, 3) and,
    on request, `atomic_virial` (n_atoms, 3, 3), all float64, in eV and Å. virial is -dE/dstrain (= -volume * stress, ASE's
    stress); atomic_virial sums to it: an edge's whole term goes to its neighbour, as DeePMD does, or ("half") half to each end.
    A potential that takes spins adds `magnetic_forces` (n_atoms, 3), -dE/dspin in eV per unit of spin; its other derivatives
    are at fixed spins.
    """

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the potential."""
        ...

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, Tensor]:
        """Evaluate the graph; nothing of the input is changed."""
        ...


@runtime_checkable
class DirectPotential(Potential, Protocol):
    """A potential that may also evaluate systems straight from kept neighbour lists, without a graph."""

    def evaluate_systems(self, neighbors: SkinNeighborList, systems: Systems) -> dict[str, Tensor] | None:
        """What a call on `neighbors.graph(systems)` returns, to rounding; None where only that call can do it.

        Raises UnsearchableError as `neighbors.graph` does.
        """
        ...
