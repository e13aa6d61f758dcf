"""The ways that one process has from a potential to numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryall.data import AtomicData, Batch
from carryall.data.extra_inputs import missing_inputs
from carryall.dynamics.forces import ForceEvaluator
from carryall.dynamics.status import ensure_keys
from carryall.errors import CarryallError
from carryall.graph.potential import MAGNETIC, Potential
from carryall.package.verify_report import Results
from carryall.properties.evaluate import evaluate

SKIN = 0.5  # Å
MOVED = 0.1  # Å: less than half the skin, so that lists stay


def one_by_one(potential: Potential, structures: Sequence[AtomicData]) -> Results:
    """The plain call, each structure alone."""
    return [evaluate(potential, one, _properties(potential))[0] for one in structures]


def all_at_once(potential: Potential, structures: Sequence[AtomicData]) -> Results:
    """The plain call on all structures together."""
    return evaluate(potential, list(structures), _properties(potential), max_atoms=sum(one.n_atoms for one in structures))


def by_ase(potential: Potential, structures: Sequence[AtomicData]) -> Results:
    """Each through an ASE calculator, which has a virial where there is a volume. MissingDependencyError without ASE."""
    from carryall.engines.ase import Calculator

    found = []
    for one in structures:
        atoms = one.to_ase()
        atoms.calc = Calculator(potential, SKIN)
        values = {
            "energy": np.array(atoms.get_potential_energy()),
            "forces": atoms.get_forces(apply_constraint=False),
            "atomic_energy": atoms.get_potential_energies(),
        }
        if one.volume > 0:
            values["virial"] = -atoms.get_stress(voigt=False) * atoms.get_volume()
        if MAGNETIC in atoms.calc.results:
            values[MAGNETIC] = atoms.calc.results[MAGNETIC]
        found.append(values)
    return found


def by_dynamics(potential: Potential, structures: Sequence[AtomicData], device: str = "cpu") -> Results:
    """All in one batch as dynamics evaluates it: neighbour lists are made for moved atoms first and then used again."""
    batch = Batch.from_data_list(list(structures), fill=missing_inputs(structures)).to(device)
    ensure_keys(batch)
    evaluator = ForceEvaluator(potential, ("energy", "forces", "virial"), "verify", SKIN)
    there = batch.positions.clone()
    sign = torch.where(torch.arange(batch.n_atoms, device=there.device) % 2 == 0, 1.0, -1.0).to(there.dtype)
    # neighbours move against each other, so that some enter and some leave the cutoff
    for positions in (there + MOVED / 3**0.5 * sign[:, None], there):
        batch.positions = positions
        for system, reason in evaluator.evaluate(batch, None).items():
            raise CarryallError(f"structure {system}: {reason}")
    ptr = batch.ptr.tolist()
    return [_rows_of(batch, system, slice(ptr[system], ptr[system + 1])) for system in range(batch.n_systems)]


def by_dynamics_alone(potential: Potential, structures: Sequence[AtomicData], device: str = "cpu") -> Results:
    """The same, each structure in a batch of its own."""
    return [by_dynamics(potential, [one], device)[0] for one in structures]


def unpacked(stored: Mapping[str, np.ndarray], structures: Sequence[AtomicData]) -> Results:
    """Results of a process of its own, from its arrays: energy and virial by structure, forces and atomic_energy by atom.

    CarryallError for arrays of other sizes.
    """
    n, counts = len(structures), [one.n_atoms for one in structures]
    wanted = {"energy": (n,), "virial": (n, 3, 3), "forces": (sum(counts), 3), "atomic_energy": (sum(counts),)}
    for name, shape in wanted.items():
        if name in stored and stored[name].shape != shape:
            raise CarryallError(f"it gave {name} of shape {stored[name].shape}, expected {shape}")
    if missing := {"energy", "forces", "virial"} - set(stored):
        raise CarryallError(f"it gave no {' and no '.join(sorted(missing))}")
    ends = np.cumsum([0, *counts])
    found = []
    for index in range(n):
        rows = slice(ends[index], ends[index + 1])
        by_row: dict[str, Any] = {"energy": index, "virial": index, "forces": rows, "atomic_energy": rows}
        found.append({name: np.array(stored[name][row]) for name, row in by_row.items() if name in stored})
    return found


def _properties(potential: Potential) -> tuple[str, ...]:
    magnetic = (MAGNETIC,) if potential.spec.spin else ()
    return ("energy", "forces", "virial", "atomic_energy", *magnetic)


def _rows_of(batch: Batch, system: int, atoms: slice) -> dict[str, np.ndarray]:
    keys: dict[str, Any] = {"energy": system, "virial": system, "forces": atoms, MAGNETIC: atoms}
    return {name: _array(batch.get(name)[rows]) for name, rows in keys.items() if name in batch}


def _array(value: Tensor) -> np.ndarray:
    found: np.ndarray = value.detach().to("cpu", torch.float64).numpy().copy()
    return found
