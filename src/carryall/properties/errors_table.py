"""Errors of a potential against labels: by quantity, and by structure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.data.units import GPa
from carryall.errors import InputError
from carryall.graph.potential import Potential
from carryall.properties.evaluate import evaluate

Predictions = Sequence[Mapping[str, np.ndarray]]
UNITS = {"energy": ("meV/atom", 1e3), "forces": ("meV/Å", 1e3), "stress": ("GPa", 1 / GPa)}
"""Unit to show and factor from eV and Å."""
_VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))


@dataclass(frozen=True)
class ErrorRow:
    """Errors of one quantity."""

    quantity: str
    unit: str
    count: int
    """Numbers compared: structures (energy), components (forces, stress)."""
    rmse: float
    mae: float
    largest: float


def predict(potential: Potential, structures: Sequence[AtomicData]) -> list[dict[str, np.ndarray]]:
    """energy, forces and virial of each structure."""
    return evaluate(potential, list(structures), ("energy", "forces", "virial"))


def compared(structures: Sequence[AtomicData], predictions: Predictions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(reference, predicted), both (n,), of each quantity that has labels.

    Energy per atom (eV), forces (eV/Å, components of all atoms), stress (eV/Å³, six components, of fully periodic structures).
    """
    pairs: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in UNITS}
    for one, found in zip(structures, predictions, strict=True):
        if one.energy is not None:
            _add(pairs["energy"], np.array([float(one.energy) / one.n_atoms]), np.array([float(found["energy"]) / one.n_atoms]))
        if one.forces is not None:
            _add(pairs["forces"], one.forces.double().numpy().ravel(), found["forces"].ravel())
        if one.stress is not None and one.cell is not None and bool(one.pbc.all()):
            _add(pairs["stress"], one.stress.double().numpy()[_VOIGT], -found["virial"][_VOIGT] / one.volume)
    return {name: (np.concatenate(a), np.concatenate(b)) for name, (a, b) in pairs.items() if a}


def error_table(structures: Sequence[AtomicData], predictions: Predictions) -> list[ErrorRow]:
    """One row for each quantity that has labels; InputError when nothing has."""
    rows = []
    for name, (reference, predicted) in compared(structures, predictions).items():
        unit, factor = UNITS[name]
        error = np.abs(predicted - reference) * factor
        rows.append(
            ErrorRow(name, unit, error.size, float(np.sqrt(np.mean(error**2))), float(error.mean()), float(error.max()))
        )
    if not rows:
        raise InputError("the structures have no labels (energy, forces, stress): give labelled data")
    return rows


def as_text(rows: Sequence[ErrorRow]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a table to read."""
    header = ["quantity", "RMSE", "MAE", "largest", "unit", "compared"]
    return header, [
        [row.quantity, f"{row.rmse:.4g}", f"{row.mae:.4g}", f"{row.largest:.4g}", row.unit, f"{row.count:,}"] for row in rows
    ]


def write_errors(path: Path, rows: Sequence[ErrorRow]) -> None:
    """CSV with a units row (the unit of a row is in the row)."""
    lines = [[row.quantity, row.unit, row.count, f"{row.rmse:.10g}", f"{row.mae:.10g}", f"{row.largest:.10g}"] for row in rows]
    write_csv(
        path,
        ("quantity", "unit", "count", "rmse", "mae", "largest"),
        ("1", "1", "1", "see unit", "see unit", "see unit"),
        lines,
    )


def write_structure_errors(path: Path, structures: Sequence[AtomicData], predictions: Predictions) -> None:
    """CSV with a units row: energies and force error of each structure; empty where there is no label."""
    header = ("structure", "atoms", "reference_energy", "predicted_energy", "force_rmse")
    lines = []
    for index, (one, found) in enumerate(zip(structures, predictions, strict=True)):
        reference = "" if one.energy is None else f"{float(one.energy):.10g}"
        error = (
            "" if one.forces is None else f"{1e3 * np.sqrt(np.mean((found['forces'] - one.forces.double().numpy()) ** 2)):.6g}"
        )
        lines.append([index, one.n_atoms, reference, f"{float(found['energy']):.10g}", error])
    write_csv(path, header, ("1", "1", "eV", "eV", "meV/angstrom"), lines)


def write_csv(path: Path, header: Sequence[str], units: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Names, units, values; the file appears when complete."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, units, *lines])
    part.replace(path)


def _add(pair: tuple[list[np.ndarray], list[np.ndarray]], reference: np.ndarray, predicted: np.ndarray) -> None:
    pair[0].append(reference)
    pair[1].append(predicted)
