"""`carryall eval`: errors of a potential against the labels of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_data, show_files, show_settings, show_table
from carryall.cli.inputs import check_against, load_potential, notify, read_files
from carryall.errors import InputError, MissingDependencyError

FILES = {
    "errors.csv": "RMSE, MAE and largest error of each label",
    "structures.csv": "reference and predicted energy, and force error, of each structure",
    "parity.png": "predicted against reference, energies and forces",
}


@dataclass(frozen=True)
class EvalConfig:
    """Compare a potential with labelled structures."""

    model: Positional[str]
    """A packed file, checkpoint, source file or built-in name."""
    data: Positional[tuple[Path, ...]]
    """Labelled structures: extended XYZ, a DeePMD folder, or what ASE reads."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("eval")
    """Folder for tables and picture."""
    device: str = "cpu"
    """Where to run."""
    rebuild: bool = False
    """Compile a .pt2 that does not fit this machine from its source, once, into the cache."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(EvalConfig, "eval", argv)
    if not config.data:
        raise InputError("no data: give at least one file with labelled structures")
    structures = read_files(config.data)
    potential = load_potential(config.model, config.device, config.rebuild)
    check_against(potential, structures, str(config.data[0]) if len(config.data) == 1 else "data")
    from carryall.properties.errors_table import as_text, error_table, predict, write_errors, write_structure_errors

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    show_settings({**settings, "dtype": potential.spec.dtype, "cutoff": f"{potential.spec.cutoff:g} Å"})
    show_data({"data": structures})
    show_files(config.out, FILES)
    predictions = predict(potential, structures)
    rows = error_table(structures, predictions)
    config.out.mkdir(parents=True, exist_ok=True)
    write_errors(config.out / "errors.csv", rows)
    write_structure_errors(config.out / "structures.csv", structures, predictions)
    show_table(*as_text(rows))
    try:
        from carryall.properties.plots import plot_parity

        plot_parity(structures, predictions, config.out / "parity.png")
    except MissingDependencyError as missing:
        notify(f"no parity.png: {missing}")
    console().print(f"written to {config.out}/")
    return 0
