"""What a pipeline has made of its inputs: a table with a row for each, the radial distribution of all, and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.dynamics.pipeline.outcome import HISTORY
from carryall.dynamics.results import RelaxResult, complete_file
from carryall.dynamics.thermo import standard_masses
from carryall.errors import InputError
from carryall.graph.neighbor_graph import edge_vectors
from carryall.graph.neighbor_search import graph_from_structures
from carryall.properties.plots import BLUE, CYCLE, GREY, INK, decorate, new_figure, save_figure
from carryall.properties.rdf import one_of_each

TABLE, DISTRIBUTION, PICTURE = "analysis.csv", "rdf.csv", "analysis.png"
HEAD = {"index": "1", "input": "1", "frame": "1", "outcome": "1", "n_atoms": "1"}
OF_STAGE = {"steps": "1", "energy": "eV/atom", "volume": "angstrom^3/atom", "displacement": "angstrom"}
OF_MD = {
    "temperature_mean": "K",
    "temperature_std": "K",
    "potential_energy_mean": "eV/atom",
    "potential_energy_std": "eV/atom",
    "pressure_mean": "GPa",
    "pressure_std": "GPa",
}
TAIL = {"density": "g/cm^3", "nearest_neighbor": "angstrom"}
"""Of the structure as it left the last stage."""
PER_ATOM = ("eV/atom", "angstrom^3/atom")
AMU_PER_CUBIC_ANGSTROM = 1.66053904
"""g/cm^3"""


@dataclass(eq=False)
class Analysis:
    """What was found; one number an input and column, so that it stays small for many inputs."""

    stages: Mapping[str, bool]
    """Name of each stage, and whether it is molecular dynamics."""
    r: np.ndarray
    """(n_bins,) Å, middles of the shells."""
    columns: dict[str, list[float]]
    """A number for each input that finished, NaN where there is none."""
    counts: np.ndarray
    """(n_bins,) pairs found in all structures that are periodic along all axes."""
    ideal: float = 0.0
    """Pairs a volume that ideal gases of their densities have, 1/Å^3."""
    n_periodic: int = 0
    n_finished: int = 0
    index: list[int] = field(default_factory=list)

    @property
    def g(self) -> np.ndarray | None:
        """(n_bins,) radial distribution of all pairs of atoms, images too, of all structures; None where none is periodic."""
        if not self.ideal:
            return None
        width = self.r[1] - self.r[0] if len(self.r) > 1 else 2 * self.r[0]
        edges = np.append(self.r - width / 2, self.r[-1] + width / 2)
        return np.asarray(self.counts / (self.ideal * 4 / 3 * np.pi * np.diff(edges**3)))


def columns_of(stages: Mapping[str, bool]) -> dict[str, str]:
    """Columns of analysis.csv and their units."""
    found = dict(HEAD)
    for name, moves in stages.items():
        found |= {f"{name}_{quantity}": unit for quantity, unit in (OF_STAGE | (OF_MD if moves else {})).items()}
    return found | TAIL


def analyse(
    results: Iterable[RelaxResult], stages: Mapping[str, bool], folder: str | Path, *, r_max: float = 6.0, n_bins: int = 120
) -> Analysis:
    """Write analysis.csv and rdf.csv of a pipeline's results, taken one by one; each appears when complete.

    stages: name of each stage, and whether it is molecular dynamics; their numbers are those of `StageStatistics`, in `info`.
    r_max: Å, reach of the radial distribution and of the search for the nearest neighbour.
    """
    if not r_max > 0 or n_bins < 1:
        raise InputError(f"r_max must be positive and n_bins at least 1, got {r_max} and {n_bins}")
    folder = Path(folder)
    units = columns_of(stages)
    shells = np.linspace(0.0, r_max, n_bins + 1)
    numbers: dict[str, list[float]] = {name: [] for name in units if name not in HEAD or name == "n_atoms"}
    found = Analysis(stages, 0.5 * (shells[1:] + shells[:-1]), numbers, np.zeros(n_bins))
    with complete_file(folder / TABLE) as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerows([list(units), list(units.values())])
        for one in results:
            row = _row(one, units, stages, found, shells)
            table.writerow([_text(row.get(name)) for name in units])
    g = found.g
    if g is not None:
        with complete_file(folder / DISTRIBUTION) as stream:
            rows = zip(found.r.tolist(), g.tolist(), strict=True)
            csv.writer(stream, lineterminator="\n").writerows(
                [["r", "g"], ["angstrom", "1"], *([_text(x), _text(y)] for x, y in rows)]
            )
    return found


def plot_analysis(found: Analysis, path: str | Path, *, targets: Mapping[str, float] | None = None) -> Path | None:
    """Energy after each stage, temperature of each system, displacements and g(r); None where nothing finished.

    targets: K, of the thermostat of stages that hold one temperature.
    """
    if not found.n_finished:
        return None
    moving = [
        name for name, moves in found.stages.items() if moves and np.isfinite(found.columns[f"{name}_temperature_mean"]).any()
    ]
    g = found.g
    figure, axes = new_figure(2 + bool(moving) + (g is not None))
    rest = iter(axes)
    colours = dict(zip(found.stages, CYCLE * len(found.stages), strict=False))
    _plot_energies(next(rest), found, colours)
    if moving:
        _plot_temperatures(next(rest), found, moving, targets or {}, colours)
    _plot_displacements(next(rest), found, colours)
    if g is not None:
        one = next(rest)
        one.plot(found.r, g, color=BLUE, linewidth=1.8)
        one.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
        occupied = np.flatnonzero(g > 0)
        one.set_xlim(max(0.0, float(found.r[occupied[0]]) - 0.4) if len(occupied) else 0.0, float(found.r[-1]))
        one.set_ylim(0.0, None)
        decorate(one, "distance, Å", "g(r), all pairs", f"radial distribution of {found.n_periodic} final structures")
    return save_figure(figure, path)


# -- inside


def _row(
    one: RelaxResult, units: Mapping[str, str], stages: Mapping[str, bool], found: Analysis, shells: np.ndarray
) -> dict[str, Any]:
    """What is written of an input; what finished is added to `found`."""
    data = one.structure
    row: dict[str, Any] = {"index": one.index, "input": one.source or "", "frame": one.frame, "outcome": one.outcome}
    if data is None:
        return row
    row["n_atoms"] = data.n_atoms
    for said in data.info.get(HISTORY, []):
        row[f"{said['stage']}_steps"] = said["steps"]
    for name, unit in units.items():
        if name not in row and name in data.info:
            value = data.info[name]
            row[name] = value / data.n_atoms if unit in PER_ATOM else value
    if one.outcome == "failed":
        return row
    row |= _geometry(data, found, shells)
    found.n_finished += 1
    found.index.append(one.index)
    for name, values in found.columns.items():
        value = row.get(name)
        values.append(math.nan if value is None else float(value))
    return row


def _geometry(data: AtomicData, found: Analysis, shells: np.ndarray) -> dict[str, float]:
    """Density and distance of the nearest pair; pairs are counted into `found`."""
    graph = graph_from_structures([data], float(shells[-1]), one_of_each(data))
    distance = edge_vectors(graph).norm(dim=1).numpy()
    numbers: dict[str, float] = {}
    if len(distance):
        numbers["nearest_neighbor"] = float(distance.min())
    if data.cell is not None and bool(data.pbc.all()):
        numbers["density"] = _mass(data) / data.volume * AMU_PER_CUBIC_ANGSTROM
        found.counts += np.histogram(distance, bins=shells)[0]
        # an atom's own images are pairs too, so that cells of one atom have a distribution
        found.ideal += data.n_atoms**2 / data.volume
        found.n_periodic += 1
    return numbers


def _mass(data: AtomicData) -> float:
    """amu"""
    return float((standard_masses(data.atomic_numbers) if data.masses is None else data.masses).sum())


def _plot_energies(axes: Any, found: Analysis, colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        axes.plot(found.index, found.columns[f"{name}_energy"], ".", color=colour, markersize=5, label=f"after {name}")
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(axis="x", integer=True)
    decorate(axes, "input", "energy, eV/atom", f"energy of {found.n_finished} systems", legend=True)


def _plot_temperatures(
    axes: Any, found: Analysis, moving: Sequence[str], targets: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    for name in moving:
        mean, spread = (np.array(found.columns[f"{name}_temperature_{kind}"]) for kind in ("mean", "std"))
        axes.errorbar(
            found.index, mean, spread, fmt=".", color=colours[name], ecolor=GREY, elinewidth=0.8, markersize=5, label=name
        )
        if name in targets:
            label = f"thermostat, {targets[name]:g} K"
            axes.axhline(targets[name], color=colours[name], linewidth=1.0, linestyle="--", label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (1 + 2 * len(moving)) * (high - low))  # room for the legend
    axes.locator_params(axis="x", integer=True)
    decorate(axes, "input", "temperature, K", "temperature: mean ± standard deviation in time", legend=True)


def _plot_displacements(axes: Any, found: Analysis, colours: Mapping[str, str]) -> None:
    values = {name: np.array(found.columns[f"{name}_displacement"]) for name in colours}
    largest = max((float(np.nanmax(one)) for one in values.values() if np.isfinite(one).any()), default=0.0)
    edges = np.linspace(0.0, largest or 1.0, 25)
    for name, one in values.items():
        axes.hist(one[np.isfinite(one)], bins=edges.tolist(), color=colours[name], alpha=0.7, edgecolor="white", label=name)
    axes.set_xlim(0.0, float(edges[-1]))
    axes.set_ylim(0.0, axes.get_ylim()[1] * (1.0 + 0.12 * len(values)))  # room for the legend
    axes.locator_params(axis="y", integer=True)
    decorate(axes, "root-mean-square displacement in the stage, Å", "systems", "how far atoms moved", legend=True)


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
