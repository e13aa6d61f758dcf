"""One case of benchmarks/pipeline.py, alone or as a rank of torchrun: `python pipeline_worker.py CASE QUICK OUT.json`."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk

from carryall.data import AtomicData
from carryall.dynamics import FIRE, NVE, NVTLangevin, PipelineStage, Room, SizeAwareSampler
from carryall.dynamics.engine import Engine
from carryall.dynamics.pipeline.worker import Worker
from carryall.models.eager import EagerPotential
from carryall.models.sutton_chen import SuttonChen

ATOMS, FMAX, MD_STEPS, RELAX_STEPS = 1000, 0.02, 200, 300
CALL = 0.010
"""Seconds of a model call, where what is beside it is measured."""


def main() -> None:
    """Run a case and write its times."""
    case, quick, out = sys.argv[1], sys.argv[2] == "quick", Path(sys.argv[3])
    torch.set_num_threads(1)
    kind, _, variant = case.partition("-")
    found = workload(variant, 40 if quick else 500) if kind == "work" else overhead(variant, 16 if quick else 64)
    if found is not None:
        out.write_text(json.dumps(found))


def copper(count: int) -> list[AtomicData]:
    """Copper crystals of 27 to 48 atoms with a vacancy, off their places."""
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        atoms = bulk("Cu", "fcc", a=3.61) * ((3, 3, 3) if seed % 2 else (4, 4, 3))
        del atoms[int(random.integers(len(atoms)))]
        atoms.positions += random.normal(0, 0.05 + 0.1 * random.random(), atoms.positions.shape)
        found.append(AtomicData.from_ase(atoms))
    return found


def stages(potential: Any) -> tuple[FIRE, NVTLangevin]:
    """Relaxation, then dynamics at 300 K."""
    relax = FIRE(potential, convergence_hook=FMAX, n_steps=RELAX_STEPS)
    return relax, NVTLangevin(potential, timestep=2.0, temperature=300.0, friction=0.02, seed=1, n_steps=MD_STEPS)


def workload(variant: str, count: int) -> dict[str, Any] | None:
    """Seconds of relaxations followed by dynamics."""
    structures = copper(count)
    relax, dynamics = stages(EagerPotential(SuttonChen(["Cu"], cutoff=6.0)))
    if variant == "fused":
        fused = relax + dynamics
        fused.refill = fused.refill.__class__(SizeAwareSampler(structures, max_atoms=ATOMS), (), 5, None)
        began = time.perf_counter()
        batch = fused.run()
        assert batch is not None
        return {"seconds": time.perf_counter() - began, "energies": batch.energy.tolist()}
    room = Room(None, ATOMS)
    pipeline = PipelineStage(relax, 1, room) | PipelineStage(dynamics, 1, room)
    pipeline = pipeline.with_settings(helping=variant in ("helping", "turn"))
    with shares() as times:
        began = time.perf_counter()
        results = pipeline.run(structures)
        seconds = time.perf_counter() - began
    if results is None:
        return None
    return {"seconds": seconds, "energies": [one.energy for one in results], **times}


def overhead(variant: str, count: int) -> dict[str, Any] | None:
    """Seconds of two stages whose model call takes `CALL` seconds."""
    potential = Slow(EagerPotential(SuttonChen(["Cu"], cutoff=4.0)))
    structures = copper(count)
    first = NVE(potential, timestep=1.0, n_steps=100)
    second = NVTLangevin(potential, timestep=1.0, temperature=300.0, seed=1, n_steps=100)
    if variant == "plain":
        began = time.perf_counter()
        for engine in (first, second):
            engine.refill = engine.refill.__class__(SizeAwareSampler(structures, max_atoms=ATOMS), (), 5, None)
            assert engine.run() is not None
        return {"seconds": time.perf_counter() - began, "calls": potential.calls}
    room = Room(None, ATOMS)
    pipeline = PipelineStage(first, 1, room) | PipelineStage(second, 1, room)
    with shares() as times:
        began = time.perf_counter()
        results = pipeline.run(structures, checkpoint_seconds=1.0)
        seconds = time.perf_counter() - began
    return None if results is None else {"seconds": seconds, "calls": potential.calls, **times}


class Slow:
    """A potential whose call takes `CALL` seconds of work."""

    def __init__(self, potential: EagerPotential) -> None:
        self._potential, self.spec, self.calls = potential, potential.spec, 0

    def __call__(self, graph: Any, *, atomic_virial: bool = False) -> Any:
        """The potential's result, late."""
        began = time.perf_counter()
        found = self._potential(graph)
        self.calls += 1
        while time.perf_counter() - began < CALL:
            pass
        return found


@contextmanager
def shares() -> Iterator[dict[str, float]]:
    """Seconds that this rank spends in steps, and waiting for others; the rest is what the pipeline itself costs."""
    times = {"steps": 0.0, "waits": 0.0}

    def timed(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def measured(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                times[name] += time.perf_counter() - began

        setattr(owner, method, measured)

    timed(Engine, "step", "steps")
    timed(Worker, "_until", "waits")
    yield times


if __name__ == "__main__":
    main()
