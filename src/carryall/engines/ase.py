"""Any potential as an ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.data.extra_inputs import ase_extras
from carryall.errors import InputError, MissingDependencyError
from carryall.graph.potential import Potential
from carryall.graph.skin import SkinNeighborList

try:
    from ase.calculators.calculator import Calculator as AseCalculator
    from ase.calculators.calculator import all_changes
    from ase.stress import full_3x3_to_voigt_6_stress
except ImportError:
    raise MissingDependencyError("the ASE calculator needs ASE, which is not installed: pip install 'carryall[ase]'") from None

if TYPE_CHECKING:
    import ase

GEOMETRY = {"positions", "numbers", "cell", "pbc", "parameters"}
"""Changes that a potential can feel."""


class Calculator(AseCalculator):
    """`atoms.calc = Calculator(potential)`: energy and energies (eV), forces (eV/Å), stress (eV/Å³, Voigt, ASE's sign).

    A potential that takes spins has those of `atoms.get_initial_magnetic_moments()`, three numbers for each atom (or of
    `atoms.arrays["spin"]`), and adds `results["magnetic_forces"]` (n, 3), eV per unit of spin.

    Everything comes from one model call, made only when positions, elements, cell, periodicity or what else the potential takes
    changed; neighbours are searched again only when an atom may have moved further than `skin` (Å) allows. free_energy is the
    energy: a potential knows no electronic temperature. Stress is there for structures with a cell of three vectors. Raises
    InputError for an element that the potential does not know, positions that are not finite, coincident atoms, or a cell
    without volume.
    """

    implemented_properties = [  # noqa: RUF012, as ASE declares it
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
    ]
    discard_results_on_any_change = False
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(self, potential: Potential, skin: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.potential = potential
        if potential.spec.spin:
            self.implemented_properties = [*self.implemented_properties, "magnetic_forces"]
        self.neighbors = SkinNeighborList(potential.spec.cutoff, potential.spec.type_map, skin)
        self.n_calls = 0
        """Model calls made."""

    def check_state(self, atoms: ase.Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; "parameters" are spins, fparam and so on, where the potential takes any."""
        changes = list(super().check_state(atoms, tol))
        if self.potential.spec.extra_inputs and self.atoms is not None:
            old, new = (_inputs(one) for one in (self.atoms, atoms))
            if old.keys() != new.keys() or any(not np.array_equal(old[name], new[name]) for name in old):
                changes.append("parameters")
        return changes

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill `results` with all properties, unless nothing changed that a potential can feel."""
        super().calculate(atoms, properties, system_changes)
        if self.results and not GEOMETRY & set(system_changes):
            return
        structure: Any = self.atoms
        if len(structure) == 0:
            raise InputError("the structure has no atoms")
        cell = structure.cell.array
        extras = ase_extras(structure.info, structure.arrays) if self.potential.spec.extra_inputs else {}
        data = AtomicData(structure.positions, structure.numbers, cell if cell.any() else None, structure.pbc, **extras)
        output = self.potential(self.neighbors.graph(Batch.from_data_list([data])))
        self.n_calls += 1
        energy = float(output["energy"][0])
        self.results = {"energy": energy, "free_energy": energy}
        for key, name in (("atomic_energy", "energies"), ("forces", "forces"), ("magnetic_forces", "magnetic_forces")):
            if key in output:
                self.results[name] = output[key].detach().to("cpu", torch.float64).numpy().copy()
        volume = abs(structure.cell.volume)
        if "virial" in output and volume > 0:
            virial = output["virial"][0].detach().to("cpu", torch.float64).numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(-virial / volume)


def _inputs(atoms: ase.Atoms) -> dict[str, np.ndarray]:
    """What potentials take beside the geometry, by name."""
    found = ase_extras(atoms.info, atoms.arrays)
    spins = {"spins": found["spins"]} if "spins" in found else {}
    return {**found["system_extras"], **found["atom_extras"], **spins}
