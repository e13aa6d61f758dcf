"""Energy and derivatives of structures, each spread over all ranks: `python -m carryall.engines.domain.single_point`.

    torchrun --nproc-per-node 2 -m carryall.engines.domain.single_point MODEL STRUCTURES.extxyz OUT.npz

OUT.npz, which rank 0 writes: energy (n,), virial (n, 3, 3), forces (atoms of all structures, 3) and atomic_energy (atoms of all
structures,), in input order, eV and Å; and ranks (), how many worked together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.sharing import ATOM_INDEX
from carryall.dynamics.integrators.nve import NVE
from carryall.engines.domain.bricks import Grid
from carryall.engines.domain.group import joined
from carryall.engines.domain.system import evaluator_of, gather, spread
from carryall.errors import CarryallError, InputError
from carryall.exchange import Transport
from carryall.graph.potential import Potential

Result = dict[str, np.ndarray]


def single_points(
    potential: Potential,
    structures: Iterable[AtomicData],
    transport: Transport,
    *,
    grid: Grid | None = None,
    balance: str = "atoms",
) -> list[Result] | None:
    """energy (), virial (3, 3), forces (n, 3), atomic_energy (n,), atomic_virial (n, 3, 3) of each, float64, on rank 0.

    Collective; None on other ranks. grid, balance: of the bricks, see `Decomposition`.
    """
    found = [_single_point(potential, one, transport, grid, balance) for one in structures]
    return None if transport.rank else [one for one in found if one is not None]


def _single_point(
    potential: Potential, structure: AtomicData, transport: Transport, grid: Grid | None, balance: str
) -> Result | None:
    dynamics = NVE(potential)
    part = spread(structure, dynamics, transport, grid=grid, balance=balance)
    dynamics.start(part)
    out = evaluator_of(dynamics).evaluate_atoms(part)
    for key in ("atomic_energy", "atomic_virial"):
        part.set(key, out[key].detach().to(part.device), level="atom")
    whole = gather(part, dynamics)
    if whole is None:
        return None
    assert ATOM_INDEX not in whole
    values = {key: whole.get(key)[0] for key in ("energy", "virial")}
    values |= {key: whole.get(key) for key in ("forces", "atomic_energy", "atomic_virial")}
    return {key: value.cpu().double().numpy() for key, value in values.items()}


def main(arguments: Sequence[str]) -> int:
    """MODEL (.pt2 or .pte), STRUCTURES, OUT.npz; the exit code."""
    from carryall.data.readers import read_structures
    from carryall.package.load import load_packed

    if len(arguments) != 3:
        raise InputError("usage: torchrun ... -m carryall.engines.domain.single_point MODEL STRUCTURES.extxyz OUT.npz")
    model, source, target = map(Path, arguments)
    with joined() as transport:
        found = single_points(load_packed(model), read_structures(source), transport)
        if found is not None:
            write(target, found, transport.size)
    return 0


def write(target: Path, found: Sequence[Result], ranks: int) -> None:
    """The file, which appears only when complete."""
    arrays: dict[str, Any] = {key: np.array([one[key] for one in found]) for key in ("energy", "virial")}
    arrays |= {key: np.concatenate([one[key] for one in found]) for key in ("forces", "atomic_energy")}
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, ranks=np.array(ranks), **arrays)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        sys.exit(main(sys.argv[1:]))
    except (CarryallError, OSError) as error:
        print(f"carryall: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
