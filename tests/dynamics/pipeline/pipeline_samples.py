"""Potentials that sleep, fail or work in float32, small argon systems, and what a run made of them, bit for bit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from dynamics_samples import LennardJones

from carryall.data import AtomicData, Batch
from carryall.dynamics import FIRE, NVE, FusedStage, Outcome, PipelineStage, RelaxResult, Room
from carryall.dynamics.blobs import batch_to_bytes
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.pipeline.books import State, TakenUp
from carryall.dynamics.results import OUTCOMES

COPPER = 29
"""Systems with this element fail in `Failing`."""


class Slow(LennardJones):
    """Sleeps before each call."""

    def __init__(self, seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds = seconds

    def __call__(self, graph: Any, **options: Any) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        return super().__call__(graph, **options)


class Failing(LennardJones):
    """Forces of systems with copper are not finite."""

    def __call__(self, graph: Any, **options: Any) -> dict[str, torch.Tensor]:
        found = super().__call__(graph, **options)
        copper = graph.atom_types == 1
        return {**found, "forces": torch.where(copper[:, None], torch.nan, found["forces"])}


class Single(LennardJones):
    """Works in float32."""

    def __call__(self, graph: Any, **options: Any) -> dict[str, torch.Tensor]:
        values = {"positions": graph.positions.float(), "cell": graph.cell.float()}
        return super().__call__(dataclasses.replace(graph, **values), **options)


def system(index: int, numbers: int = 18, velocities: bool = False) -> AtomicData:
    """A cluster of 2 to 6 argon atoms, every third in a periodic box; the same for the same index."""
    rng = np.random.default_rng(1000 + index)
    n_atoms = 2 + index % 5
    grid = np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)][:n_atoms], dtype=float) * 3.7
    cell = np.diag([11.0, 11.5, 12.0]) if index % 3 == 0 else None
    moving = rng.normal(0, 0.01, (n_atoms, 3)) if velocities else None
    positions = grid + rng.normal(0, 0.12, (n_atoms, 3))
    return AtomicData(positions, [18] * (n_atoms - 1) + [numbers], cell, velocities=moving, info={"name": f"input {index}"})


def systems(count: int, failing: Iterable[int] = (), velocities: bool = False) -> list[AtomicData]:
    """Systems 0, 1, ...; those in `failing` have a copper atom."""
    bad = frozenset(failing)
    return [system(index, COPPER if index in bad else 18, velocities) for index in range(count)]


def in_well(index: int, numbers: int = 18) -> AtomicData:
    """1 to 4 atoms for `Well`."""
    rng = np.random.default_rng(index)
    n_atoms = 1 + index % 4
    values = rng.normal(0, 0.5, (n_atoms, 3))
    return AtomicData(values, [numbers] * n_atoms, velocities=rng.normal(0, 0.05, (n_atoms, 3)))


def stage(engine: Any, n_ranks: int = 1, n_systems: int = 8, n_atoms: int | None = 400) -> PipelineStage:
    """A stage with limits, so that nothing is measured."""
    return PipelineStage(engine, n_ranks, Room(n_systems, n_atoms))


def relax_and_move(model: Any, n_steps: int = 20, fmax: float = 0.02) -> tuple[FIRE, NVE]:
    """A relaxation, and some steps of dynamics."""
    return FIRE(model, convergence_hook=fmax, n_steps=60), NVE(model, timestep=2.0, n_steps=n_steps)


def bits(one: RelaxResult) -> dict[str, Any]:
    """All that a result says, tensors as bytes."""
    found: dict[str, Any] = {
        "index": one.index,
        "outcome": one.outcome,
        "steps": one.steps,
        "energy": None if one.energy is None else np.float64(one.energy).tobytes().hex(),
        "fmax": None if one.fmax is None else np.float64(one.fmax).tobytes().hex(),
    }
    for name in ("positions", "velocities", "cell", "forces", "atomic_numbers"):
        value = None if one.structure is None else getattr(one.structure, name)
        found[name] = None if value is None else [str(value.dtype), value.numpy().tobytes().hex()]
    return found


def fused_alone(structures: Sequence[AtomicData], fused: FusedStage, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Positions, velocities, energy and outcome of each system, run by itself through stages in a row."""
    found = []
    for index, data in zip(range(len(structures)) if ids is None else ids, structures, strict=True):
        batch = moving_batch([data], [index])
        FusedStage(list(fused.sub_stages)).run(batch)
        failed = int(batch.outcome[0]) == Outcome.FAILED
        found.append(
            {
                "index": index,
                "outcome": OUTCOMES[Outcome(int(batch.outcome[0]))],
                "steps": sum(int(part.steps(batch)[0]) for part in fused.parts),
                "energy": None if failed else batch.energy.double().numpy().tobytes().hex(),
                "positions": [str(batch.positions.dtype), batch.positions.numpy().tobytes().hex()],
                "velocities": [str(batch.velocities.dtype), batch.velocities.numpy().tobytes().hex()],
                "atomic_numbers": [str(batch.atomic_numbers.dtype), batch.atomic_numbers.numpy().tobytes().hex()],
            }
        )
    return found


def taken_up(index: int, numbers: int = 18) -> TakenUp:
    """An input of a ledger."""
    data = in_well(index, numbers)
    return TakenUp(State(index, data.n_atoms, batch_to_bytes(moving_batch([data], [index]), {})), data, b"hash %d" % index)


def well_batch(ids: Sequence[int]) -> Batch:
    """Systems in a well, numbered."""
    return moving_batch([in_well(index) for index in ids], ids)
