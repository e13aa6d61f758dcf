"""Pictures of results, as PNG files: each function draws one and writes it under its name when complete."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from carryall.data.atomic_data import AtomicData
from carryall.errors import InputError, MissingDependencyError
from carryall.properties.errors_table import UNITS, Predictions, compared
from carryall.properties.rdf import RadialDistribution
from carryall.properties.timeseries import Speed, energy_drift

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#2563a8", "#d9762b", "#2f8f6b", "#7b5ea7", "#9aa3ad", "#22292f"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE)
DPI = 160
PANEL, SQUARE = (4.8, 3.2), (4.8, 4.4)
"""Inches of one panel: at the width of a phone its text is as large as the page's."""
AXIS_LABELS = {"energy": "energy, eV/atom", "forces": "force component, eV/Å", "stress": "stress component, eV/Å³"}
Series = Mapping[str, np.ndarray]


def new_figure(n_panels: int = 1, panel: tuple[float, float] = PANEL) -> tuple[Figure, list[Axes]]:
    """A figure of its own (no state of pyplot) with panels one above the other, which a phone shows at a readable size."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("plots need matplotlib, which is not installed: pip install 'carryall[plot]'") from None
    figure = Figure(figsize=(panel[0], panel[1] * n_panels), dpi=DPI, layout="constrained", facecolor="white")
    axes = list(np.atleast_1d(figure.subplots(n_panels, 1)).ravel())
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(GREY)
        one.tick_params(colors=INK, labelsize=9, color=GREY)
        one.grid(True, color="#e6e9ec", linewidth=0.7)
        one.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the PNG."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    # the label beside long tick labels of a square panel lies outside what "constrained" sees
    figure.savefig(part, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    part.replace(path)
    return path


def plot_learning_curve(curve: str | Path, path: str | Path, *, reference: str = "labels") -> Path:
    """Errors against steps from a `learning_curve.csv`: names, units, rows."""
    columns = read_columns(Path(curve))
    figure, axes = new_figure(2)
    for one, (quantity, unit) in zip(axes, (("energy", "meV/atom"), ("forces", "meV/Å")), strict=True):
        for part, colour, width in (("train", GREY, 1.2), ("validation", BLUE, 2.0)):
            values = columns[f"{part}_rmse_{quantity}"]
            if np.isfinite(values).any():
                marker = "o" if len(values) < 40 else None
                one.plot(columns["step"], values, color=colour, linewidth=width, label=part, marker=marker, markersize=3)
        finite = [v for part in ("train", "validation") for v in columns[f"{part}_rmse_{quantity}"] if np.isfinite(v) and v > 0]
        if finite:
            one.set_yscale("log")
            _plain_log_ticks(one)
        decorate(one, "step", f"RMSE of {quantity}, {unit}", f"{quantity} against {reference}", legend=True)
    return save_figure(figure, path)


def plot_parity(
    structures: Sequence[AtomicData],
    predictions: Predictions,
    path: str | Path,
    *,
    reference: str = "reference",
    quantities: Sequence[str] = ("energy", "forces"),
) -> Path:
    """Predicted against reference, one panel a quantity that has labels; the RMSE is in the title."""
    found = {name: pair for name, pair in compared(structures, predictions).items() if name in quantities}
    if not found:
        raise InputError(f"the structures have no labels for a parity plot of {', '.join(quantities)}")
    figure, axes = new_figure(len(found), SQUARE)
    for one, colour, (name, (true, predicted)) in zip(axes, CYCLE, found.items(), strict=False):
        unit, factor = UNITS[name]
        low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
        margin = 0.04 * (high - low) or 1e-3
        one.plot([low - margin, high + margin], [low - margin, high + margin], color=INK, linewidth=0.8, zorder=1)
        one.plot(
            true,
            predicted,
            ".",
            color=colour,
            markersize=3 if len(true) > 500 else 6,
            alpha=0.35 if len(true) > 500 else 0.8,
            rasterized=True,
            markeredgewidth=0,
        )
        one.set_xlim(low - margin, high + margin)
        one.set_ylim(low - margin, high + margin)
        one.set_aspect("equal")
        one.ticklabel_format(useOffset=False)
        one.locator_params(nbins=5)
        rmse = float(np.sqrt(np.mean((predicted - true) ** 2))) * factor
        decorate(one, f"{reference} {AXIS_LABELS[name]}", f"potential {AXIS_LABELS[name]}", f"{name}: RMSE {rmse:.3g} {unit}")
    return save_figure(figure, path)


def plot_rdf(
    found: RadialDistribution,
    path: str | Path,
    *,
    reference: RadialDistribution | None = None,
    labels: tuple[str, str] = ("potential", "reference"),
    ceilings: Mapping[tuple[str, str], float] | None = None,
) -> Path:
    """g(r), one panel a pair; `ceilings` cuts the axis where a bonded peak would hide the rest."""
    figure, axes = new_figure(len(found.g))
    for one, (pair, g) in zip(axes, found.g.items(), strict=True):
        if reference is not None and pair in reference.g:
            one.fill_between(reference.r, reference.g[pair], color=GREY, alpha=0.35, linewidth=0)
            one.plot(reference.r, reference.g[pair], color=GREY, linewidth=1.5, label=labels[1])
        one.plot(found.r, g, color=BLUE, linewidth=1.8, label=labels[0])
        one.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
        occupied = np.flatnonzero(g > 0)
        one.set_xlim(max(0.0, float(found.r[occupied[0]]) - 0.4) if len(occupied) else 0.0, float(found.r[-1]))
        one.set_ylim(0.0, (ceilings or {}).get(pair))
        name = "–".join(pair)
        decorate(one, f"{name} distance, Å", f"g(r) of {name}", f"radial distribution {name}", legend=True)
    return save_figure(figure, path)


def plot_energy_drift(runs: Mapping[str, tuple[np.ndarray, np.ndarray, int]], path: str | Path) -> Path:
    """Total energy at constant energy: name -> (time in ps, total energy in eV, atoms)."""
    figure, (one,) = new_figure()
    factor, unit = _time_unit(max((float(time[-1]) for time, _, _ in runs.values()), default=0.0))
    for colour, (name, (time, energy, n_atoms)) in zip(CYCLE * len(runs), runs.items(), strict=False):
        drift = energy_drift(time, energy, n_atoms)
        label = f"{name}: {drift:+.3f} meV/atom/ps"
        one.plot(factor * time, 1e3 * (energy - energy[0]) / n_atoms, color=colour, linewidth=1.3, label=label)
    low, high = one.get_ylim()
    one.set_ylim(low, high + 0.15 * len(runs) * (high - low))  # room for the legend
    decorate(one, f"time, {unit}", "total energy − start, meV/atom", "NVE: conservation of energy", legend=True)
    return save_figure(figure, path)


def plot_thermo(
    time_ps: np.ndarray,
    temperature: np.ndarray,
    energy_per_atom: np.ndarray,
    path: str | Path,
    *,
    target: float | None = None,
    title: str = "NVT",
) -> Path:
    """Temperature (n_times, n_systems) K and potential energy per atom (n_times, n_systems) eV: every system, and the mean."""
    figure, axes = new_figure(2)
    n_systems = temperature.shape[1]
    factor, unit = _time_unit(float(time_ps[-1]))
    mean = f"mean of {n_systems}" if n_systems > 1 else None
    for one, values, name in zip(
        axes, (temperature, energy_per_atom), ("temperature, K", "potential energy, eV/atom"), strict=True
    ):
        if n_systems > 1:
            one.plot(factor * time_ps, values, color=BLUE, linewidth=0.6, alpha=0.25)
        one.plot(factor * time_ps, np.nanmean(values, axis=1), color=BLUE, linewidth=2.0, label=mean)
        one.ticklabel_format(useOffset=False)
        decorate(one, f"time, {unit}", name, f"{title}: {name.split(',')[0]}")
    if target is not None:
        axes[0].axhline(target, color=ORANGE, linewidth=1.2, linestyle="--", label=f"thermostat, {target:g} K")
    if n_systems > 1 or target is not None:
        axes[0].legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def plot_relaxation(curves: np.ndarray, steps: Sequence[int], path: str | Path, *, fmax: float) -> Path:
    """Largest force against steps, and a histogram of the steps that structures took.

    curves: (n_steps, n_structures) eV/Å, one line each, NaN once a structure rests.
    """
    figure, (upper, lower) = new_figure(2)
    upper.plot(np.arange(len(curves)), curves, color=BLUE, linewidth=0.8, alpha=0.6)
    upper.axhline(fmax, color=ORANGE, linewidth=1.2, linestyle="--", label=f"asked for: {fmax:g} eV/Å")
    upper.set_yscale("log")
    _plain_log_ticks(upper)
    decorate(upper, "step", "largest force, eV/Å", "relaxation: forces", legend=True)
    width = max(1, (max(steps) - min(steps)) // 12)
    edges = np.arange(min(steps), max(steps) + 2 * width, width) - 0.5
    lower.hist(list(steps), bins=edges.tolist(), color=BLUE, edgecolor="white")
    lower.set_xlim(0, 1.1 * max(steps) + 1)
    lower.locator_params(integer=True)
    decorate(lower, "steps to the end", "structures", "relaxation: steps")
    return save_figure(figure, path)


def plot_speed(speeds: Sequence[Speed], path: str | Path, *, title: str = "speed") -> Path:
    """Bars: µs for one atom and one step; shorter is faster."""
    figure, (one,) = new_figure(panel=(PANEL[0], 2.4))
    values = [speed.microseconds_per_atom for speed in speeds]
    bars = one.barh(
        [speed.name for speed in speeds], values, color=[CYCLE[i % len(CYCLE)] for i in range(len(speeds))], height=0.6
    )
    one.bar_label(
        bars, labels=[f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=4, fontsize=9, color=INK
    )
    one.invert_yaxis()
    one.grid(False, axis="y")
    one.set_xlim(0, 1.18 * max(values))
    decorate(one, "energy, forces and virial: µs per atom and step", "", title)
    return save_figure(figure, path)


def decorate(axes: Axes, x: str, y: str, title: str, *, legend: bool = False) -> None:
    """Labels with units, a title, and a legend when something has a label."""
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV with a row of names and a row of units."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    if len(rows) < 3:
        raise InputError(f"{path} holds no rows yet: nothing to plot")
    try:
        table = np.array(rows[2:], dtype=float)
    except ValueError as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from None
    return {name: table[:, index] for index, name in enumerate(rows[0])}


def _time_unit(longest_ps: float) -> tuple[float, str]:
    return (1e3, "fs") if longest_ps < 1 else (1.0, "ps")


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    def plain(value: float, _: Any) -> str:
        return f"{value:g}"

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
