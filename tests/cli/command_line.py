"""How the tests run verbs and make files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from carryall.cli.inputs import face_centered_cubic
from carryall.cli.main import main
from carryall.data import AtomicData, write_structures
from carryall.models import EagerPotential, LennardJones
from carryall.properties import evaluate

SMALL_MODEL = {
    "descriptor": {
        "rcut": 4.0,
        "rcut_smth": 2.0,
        "neuron": [2, 4],
        "axis_neuron": 2,
        "tebd_dim": 2,
        "attn_layer": 0,
    },
    "fitting": {"neuron": [4, 4]},
}


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints."""
    assert main([str(one) for one in arguments]) == 2
    error = capsys.readouterr().err
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("carryall: error: ")
    return lines[0]


def argon(n: int = 2, labels: bool = False, seed: int = 0) -> AtomicData:
    """n^3 cells of fcc argon, off their sites."""
    frame = face_centered_cubic("Ar", 5.26, n, rattle=0.05, seed=seed)
    if not labels:
        return frame
    found = evaluate(EagerPotential(LennardJones.argon()), frame, ("energy", "forces", "stress"))[0]
    return frame.replace(**found)


def write(path: Path, frames: Sequence[AtomicData]) -> Path:
    """An extended XYZ file."""
    write_structures(path, frames)
    return path


def dimer(symbol: str = "Ar", distance: float = 3.8) -> str:
    """Text of a frame that the reader takes as it is."""
    return f'2\nLattice="20 0 0 0 20 0 0 0 20" pbc="T T T"\n{symbol} 0 0 0\n{symbol} {distance} 0 0\n'


def columns(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV with units, by column."""
    lines = [line.split(",") for line in path.read_text().splitlines()]
    assert len(lines[1]) == len(lines[0])
    return [dict(zip(lines[0], row, strict=False)) for row in lines[2:]]


def is_png(path: Path) -> bool:
    """Whether the file is a picture."""
    return path.read_bytes().startswith(b"\x89PNG") and np.frombuffer(path.read_bytes(), np.uint8).size > 1000
