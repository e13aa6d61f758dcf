"""What a potential is, for everyone who runs one: a call on a graph, and facts about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class PotentialSpec:
    """Facts that an engine needs before it calls a potential."""

    cutoff: float
    """Å; the graph must hold every neighbour within it."""
    type_map: tuple[str, ...]
    """Chemical symbols in the order of the atom types."""
    outputs: tuple[str, ...] = ("energy", "atomic_energy", "forces", "virial", "atomic_virial")
    """What a call can return; atomic_virial on request only."""
    message_passing: bool = False
    """Whether features of ghosts must be exchanged between ranks."""
    dtype: str = "float64"
    """Floating-point type inside the model; inputs and outputs are float64."""
    block_size: int | None = None
    """Centres that a CPU evaluates together, so that intermediate results stay in cache; None: all at once."""
    length_unit: str = "angstrom"
    energy_unit: str = "eV"
    extra_inputs: tuple[str, ...] = ()
    """Names of inputs beyond the graph (none yet)."""

    def __post_init__(self) -> None:
        if not self.cutoff > 0:
            raise InputError(f"cutoff must be positive, got {self.cutoff}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if len(set(self.type_map)) != len(self.type_map) or not self.type_map:
            raise InputError(f"type_map must name each element once, got {self.type_map}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PotentialSpec:
        """The inverse of `to_dict`; keys that a later version added are left aside."""
        known = {field.name for field in fields(cls)}
        kept: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in known}
        return cls(**kept)


class Potential(Protocol):
    """A call on a graph.

    The result holds `energy` (n_systems,), `atomic_energy` (n_local,), `forces` (n_atoms, 3), `virial` (n_systems, 3, 3) and,
    on request, `atomic_virial` (n_atoms, 3, 3), all float64, in eV and Å. virial is -dE/dstrain (= -volume * stress, ASE's
    stress); atomic_virial gives an edge's whole term to its neighbour, as DeePMD does, and sums to the virial.
    """

    @property
    def spec(self) -> PotentialSpec:
        """Facts about the potential."""
        ...

    def __call__(self, graph: NeighborGraph, *, atomic_virial: bool = False) -> dict[str, Tensor]:
        """Evaluate the graph; nothing of the input is changed."""
        ...
