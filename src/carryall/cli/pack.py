"""`carryall pack`: from a checkpoint or source file to the portable file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_settings
from carryall.errors import InputError


@dataclass(frozen=True)
class PackConfig:
    """Write one portable file from anything that holds a potential."""

    model: Positional[str]
    """Checkpoint (.pt), source (.json, .json.gz, .yaml, .dp), packed file (.pt2, .pte) or built-in name."""
    path: Positional[Path]
    """File to write: .pt2 (compiled for this kind of CPU, fast) or .pte (portable, no compiler needed)."""
    dtype: Literal["float64", "float32"] = "float64"
    """Weights inside the program; inputs and outputs are float64 either way."""
    device: str = "cpu"
    """Where the program will run."""
    cpu_level: str | None = None
    """Lowest CPU that a .pt2 shall run on: x86-64-v2, x86-64-v3 (AVX2) or x86-64-v4 (AVX-512); left out: this one's."""
    compress: bool = False
    """Tables in place of DPA-1's embedding nets: faster without attention, errors measured and written into the file."""
    compression_tolerance: float | None = None
    """Bound of the tables' relative errors; left out: 1e-8, in float32 2e-5."""
    neighbor_graph_method: Literal["graph", "legacy"] | None = None
    """Every neighbour and no padding, or DeePMD's padded neighbour lists; left out: the model's own."""
    target: Literal["carryall", "deepmd"] = "carryall"
    """Whose engines run the file: carryall's, or deepmd-kit's (DeepPot and LAMMPS' pair_style deepmd; .pt2 only)."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(PackConfig, "pack", argv)
    if config.path.suffix not in (".pt2", ".pte"):
        raise InputError(
            f"{config.path}: the suffix says what to write: give a name that ends in .pt2 (compiled) or .pte (portable)"
        )
    from carryall.package.pack import pack

    show_settings(vars(config))
    with console().status("tracing, compiling and checking against the model"):
        path = pack(
            config.model,
            config.path,
            dtype=config.dtype,
            device=config.device,
            cpu_level=config.cpu_level,
            compress=config.compress,
            compression_tolerance=config.compression_tolerance,
            neighbor_graph_method=config.neighbor_graph_method,
            target=config.target,
            notify=console().print,
        )
    show_packed(path)
    return 0


def show_packed(path: Path) -> None:
    """One line about a file that was just written."""
    from carryall.package.inspect import inspect

    facts = inspect(path)
    metadata = facts["metadata"]
    fit = f", {metadata['device']} {metadata['cpu_level']}" if metadata["kind"] == "pt2" else ""
    console().print(
        f"{path}: {facts['bytes'] / 1e6:.2f} MB, {metadata['model_type']}, {' '.join(metadata['type_map'])}, "
        f"cutoff {metadata['cutoff']:g} Å, {metadata['dtype']}{fit}; same numbers as the model on all check graphs"
    )
