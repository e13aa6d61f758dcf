"""The models of benchmarks/lammps.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from lammps_common import Crystal

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def dpa1() -> Any:
    """As the constructor has it: cutoff 6 Å, two layers of attention, random weights."""
    from carryall.models import DPA1, DescriptorConfig

    return DPA1(("O", "H"), DescriptorConfig(attn_layer=2), seed=1).eval()


def built(name: str) -> Any:
    """A model, or the name of a built-in one."""
    if name == "dpa1":
        return dpa1()
    if name.startswith("message-passing"):
        from message_passing_model import MessagePassing

        sizes = {"width": 64, "layers": 3} if name.endswith("wide") else {"width": 8, "layers": 2}
        return MessagePassing(("Cu", "Au"), cutoff=4.0, **sizes)
    return name


def make(name: str, path: str, target: str = "carryall") -> None:
    """Pack it."""
    import carryall

    carryall.pack(built(name), path, target=target)


def convert(path: str) -> None:
    """DPA-1 as a dict that deepmd-kit reads."""
    from carryall.package.export import source_of
    from carryall.package.serialization import deserialize_to_file

    deserialize_to_file(path, {**source_of(dpa1()), "model_def_script": {}})


def atoms(crystal: Crystal) -> Any:
    """As carryall has it."""
    from carryall.data import AtomicData
    from carryall.data.elements import atomic_number

    numbers = np.array([atomic_number(symbol) for symbol in crystal.symbols])[crystal.kinds]
    return AtomicData(crystal.positions(), numbers, np.diag(crystal.lengths))
