"""Everything that evaluates structures, by registration: what is added to ENGINES goes through the whole suite."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from carryall import evaluate, load
from carryall.data import AtomicData
from carryall.graph import Potential
from carryall.models import EagerPotential, LinearEnergyModel
from carryall.models.dpa1.source import set_weight_dtype
from carryall.models.ewald import Ewald
from carryall.models.ewald_charges import LearnedEwald
from carryall.package.pack import pack
from combined_models import small_bridged, small_sum, small_table, small_zbl
from message_passing import small_message_passing
from structures import CUTOFF, geometries, small_alloy, small_dpa1, small_lj, structure

Results = list[dict[str, np.ndarray]]
PROPERTIES = ("energy", "forces", "virial", "atomic_energy")


@dataclass(frozen=True)
class Engine:
    """One way from structures to energies, forces and virials."""

    symbols: tuple[str, ...]
    run: Callable[[Sequence[AtomicData]], Results]
    potential: Potential | None
    """None for an engine that is not called on graphs."""
    model: str
    """Engines of the same model must agree."""
    exact: bool = True
    """Whether it computes in float64."""
    step: float = 1e-11
    """Energies (eV) and forces (eV/Å) may jump by this where a neighbour enters the cutoff."""
    has_virial: Callable[[AtomicData], bool] = lambda _: True
    long_range: bool = False
    """Whether atoms far apart feel each other; such potentials are for periodic systems, so all get a box."""

    @property
    def tolerance(self) -> float:
        """What is equal, relative to the largest value."""
        return 1e-12 if self.exact else 2e-5

    def structure(self, name: str) -> AtomicData:
        """One of the suite's, as this engine takes it."""
        data = structure(name, self.symbols)
        return in_periodic_box(data) if self.long_range else data

    def structures(self) -> list[AtomicData]:
        """All of them."""
        return [self.structure(name) for name in geometries()]


def in_periodic_box(data: AtomicData) -> AtomicData:
    """Periodic along all axes; cell vectors that it does not have leave 9 Å around the atoms."""
    extent = data.positions.amax(0) - data.positions.amin(0) + 9.0
    cell = torch.zeros(3, 3, dtype=torch.float64) if data.cell is None else data.cell
    missing = ~cell.any(1)
    return data.replace(cell=torch.where(missing[:, None], torch.diag(extent), cell), pbc=torch.ones(3, dtype=torch.bool))


# A neighbour at the cutoff has the attention logit 0, and so a weight exp(-20 s_i s_j) of the others' where an absent one has
# none: on a graph, without padding, smooth attention is smooth up to that (measured here: 6e-6 eV, 2.5e-5 eV/Å).
ATTENTION_STEP = 3e-5
# A neighbour at the cutoff has a share exp((2.2 - 4) / 0.1) of the smooth minimum (measured here: 1e-8 eV, 1e-7 eV/Å).
BRIDGING_STEP = 2e-7


def of_potential(potential: Potential, model: str, symbols: tuple[str, ...], exact: bool = True, step: float = 1e-11) -> Engine:
    return Engine(symbols, lambda structures: evaluate(potential, list(structures), PROPERTIES), potential, model, exact, step)


def lennard_jones(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_lj()), "lj", ("O", "H"))


def sutton_chen(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_alloy()), "sutton-chen", ("Cu", "Au"))


def pair_table(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_table()), "pair table", ("O", "H"))


def zbl(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_zbl()), "zbl", ("Cu", "Au"))


def linear(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_sum()), "linear", ("O", "H"))


def bridged(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_bridged()), "bridged", ("O", "H"), step=BRIDGING_STEP)


def bridged_pte(request: pytest.FixtureRequest) -> Engine:
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp("bridged")
    potential = load(pack(small_bridged(), folder / "bridged.pte"))
    return of_potential(potential, "bridged", ("O", "H"), step=BRIDGING_STEP)


def message_passing(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_message_passing()), "message passing", ("Cu", "Au"))


def message_passing_pte(request: pytest.FixtureRequest) -> Engine:
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp("message_passing")
    potential = load(pack(small_message_passing(), folder / "message_passing.pte"))
    return of_potential(potential, "message passing", ("Cu", "Au"))


def small_ewald() -> LinearEnergyModel:
    """Fixed charges, which leave a cell charged, and a network's."""
    symbols = ("O", "H")
    parts = [Ewald(symbols, (-0.8, 0.5), CUTOFF, 1e-3), LearnedEwald(symbols, CUTOFF, (-0.4, 0.3), accuracy=1e-3, layers=2)]
    return LinearEnergyModel(parts, weights="sum")


def of_ewald(potential: Potential) -> Engine:
    return dataclasses.replace(of_potential(potential, "ewald", ("O", "H")), long_range=True)


def ewald(_: pytest.FixtureRequest) -> Engine:
    return of_ewald(EagerPotential(small_ewald()))


def ewald_pte(request: pytest.FixtureRequest) -> Engine:
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp("ewald")
    return of_ewald(load(pack(small_ewald(), folder / "ewald.pte")))


def dpa1_eager(request: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(request.getfixturevalue("dpa1")), "dpa1", ("O", "H"), step=ATTENTION_STEP)


def dpa1_without_attention(_: pytest.FixtureRequest) -> Engine:
    return of_potential(EagerPotential(small_dpa1(attn_layer=0)), "dpa1 without attention", ("O", "H"))


def dpa1_legacy(_: pytest.FixtureRequest) -> Engine:
    # empty slots stand where a neighbour at the cutoff will: with them, smooth attention is smooth there
    return of_potential(EagerPotential(small_dpa1(sel=120, method="legacy")), "dpa1 legacy", ("O", "H"))


def dpa1_with_parameters(_: pytest.FixtureRequest) -> Engine:
    model = small_dpa1(attn_layer=1, numb_fparam=2, default_fparam=(0.4, -1.2))
    return of_potential(EagerPotential(model), "dpa1 with parameters", ("O", "H"), step=ATTENTION_STEP)


def dpa1_float32(_: pytest.FixtureRequest) -> Engine:
    model = set_weight_dtype(small_dpa1(), torch.float32)
    return of_potential(EagerPotential(model), "dpa1 float32", ("O", "H"), exact=False, step=3 * ATTENTION_STEP)


def packed(fixture: str) -> Callable[[pytest.FixtureRequest], Engine]:
    def build(request: pytest.FixtureRequest) -> Engine:
        path: Path = request.getfixturevalue(fixture)
        return of_potential(load(path), "dpa1", ("O", "H"), step=ATTENTION_STEP)

    return build


def ase_calculator(request: pytest.FixtureRequest) -> Engine:
    pytest.importorskip("ase")
    from carryall.engines.ase import Calculator

    potential = EagerPotential(request.getfixturevalue("dpa1"))

    def one(structure: AtomicData) -> dict[str, np.ndarray]:
        atoms = structure.to_ase()
        atoms.calc = Calculator(potential)
        found = {
            "energy": np.array(atoms.get_potential_energy()),
            "forces": atoms.get_forces(),
            "atomic_energy": atoms.get_potential_energies(),
        }
        if in_a_box(structure):
            found["virial"] = -atoms.get_stress(voigt=False) * atoms.get_volume()
        return found

    return Engine(
        ("O", "H"), lambda structures: [one(s) for s in structures], None, "dpa1", step=ATTENTION_STEP, has_virial=in_a_box
    )


def in_a_box(structure: AtomicData) -> bool:
    """Whether ASE knows a volume, which its stress needs."""
    return structure.cell is not None and structure.volume > 0


ENGINES: dict[str, Callable[[pytest.FixtureRequest], Engine]] = {
    "lennard_jones": lennard_jones,
    "sutton_chen": sutton_chen,
    "pair_table": pair_table,
    "zbl": zbl,
    "linear": linear,
    "bridged": bridged,
    "bridged_pte": bridged_pte,
    "message_passing": message_passing,
    "message_passing_pte": message_passing_pte,
    "ewald": ewald,
    "ewald_pte": ewald_pte,
    "dpa1": dpa1_eager,
    "dpa1_without_attention": dpa1_without_attention,
    "dpa1_legacy": dpa1_legacy,
    "dpa1_with_parameters": dpa1_with_parameters,
    "dpa1_float32": dpa1_float32,
    "dpa1_pte": packed("dpa1_pte"),
    "dpa1_pt2": packed("dpa1_pt2"),
}
if importlib.util.find_spec("ase"):
    ENGINES["ase"] = ase_calculator
COMPILED = {"dpa1_pt2"}
PARAMS = [pytest.param(name, marks=pytest.mark.compile if name in COMPILED else ()) for name in ENGINES]
