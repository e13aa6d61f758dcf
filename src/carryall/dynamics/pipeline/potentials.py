"""Two runs are never mixed: the potentials of the stages are known again by the energies of one structure."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from carryall.data.atomic_data import AtomicData
from carryall.dynamics.blobs import structure_from_bytes, structure_to_bytes
from carryall.dynamics.ledger import Ledger
from carryall.dynamics.pipeline.stages import PipelineStage
from carryall.dynamics.relax import SAME_ENERGY, energy_of
from carryall.errors import InputError
from carryall.graph.potential import Potential

FACT = "potentials"
"""Fact of the ledger: a structure in hexadecimal digits, and its energy in eV by each stage's potential."""


def remember_potentials(ledger: Ledger, stages: Sequence[PipelineStage], data: AtomicData) -> None:
    """Keep the energies of a structure, unless there are some already."""
    if ledger.fact(FACT) is None:
        # what a potential cannot evaluate fails later, as any system
        with suppress(InputError):
            ledger.set_fact(FACT, {"structure": structure_to_bytes(data).hex(), "energies": _energies(stages, data)})


def check_potentials(ledger: Ledger, stages: Sequence[PipelineStage]) -> None:
    """InputError when a stage's potential gives another energy than when the run began."""
    known = ledger.fact(FACT)
    if known is None:
        return
    data = structure_from_bytes(bytes.fromhex(known["structure"]))
    for stage, then, now in zip(stages, known["energies"], _energies(stages, data), strict=True):
        if abs(now - then) > SAME_ENERGY * max(1.0, abs(then)):
            raise InputError(
                f"{ledger.path.parent} was begun with another potential in stage {stage.name}: the energy of a structure was "
                f"{then:.8g} eV, and is {now:.8g} eV with this one; give the same, or write elsewhere"
            )


def _energies(stages: Sequence[PipelineStage], data: AtomicData) -> list[float]:
    known: dict[int, float] = {}
    for one in stages:
        model: Potential = one.engine.model
        if id(model) not in known:
            known[id(model)] = energy_of(model, data)
    return [known[id(one.engine.model)] for one in stages]
