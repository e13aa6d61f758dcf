"""`carryall convert`: a model from one file to another, and to what deepmd-kit reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console


@dataclass(frozen=True)
class ConvertConfig:
    """Write the model of any file in the form that another name says."""

    source: Positional[str]
    """Source (.json, .json.gz, .yaml, .dp), packed file of carryall or DeePMD (.pt2, .pte), checkpoint (.pt), built-in name."""
    path: Positional[Path]
    """File to write: .json, .json.gz, .dp, .yaml, .yml (the model's dict), .pt2 or .pte (a program)."""
    target: Annotated[Literal["deepmd", "carryall"] | None, tyro.conf.arg(name="to")] = None
    """For whom; left out: deepmd-kit for .dp and .yaml, carryall for the others."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(ConvertConfig, "convert", argv)
    from carryall.package.convert import convert

    path = convert(config.source, config.path, target=config.target, notify=console().print)
    console().print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0
