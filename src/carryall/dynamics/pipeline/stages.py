"""The stages of a pipeline: `a * 4` runs a stage on four ranks, `a | b` puts one behind the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.composition import chained
from carryall.dynamics.engine import Engine
from carryall.dynamics.fused import FusedStage, name_apart
from carryall.dynamics.hooks.checkpoint import plain
from carryall.dynamics.parameters import whole
from carryall.dynamics.samplers import Room
from carryall.errors import InputError

Stage: TypeAlias = "PipelineStage | BaseDynamics | FusedStage"


@dataclass(frozen=True, eq=False)
class PipelineStage:
    """A dynamics or a fused stage, on one rank or several that share its systems."""

    engine: Engine
    n_ranks: int = 1
    limits: Room | None = None
    """What a batch of it may hold; None: what the first stage's sampler says, or else what is measured."""
    name: str = ""
    """What reports call it; the kind of its dynamics unless given."""

    def __post_init__(self) -> None:
        whole("n_ranks", self.n_ranks, 1)
        if not isinstance(self.engine, (BaseDynamics, FusedStage)):
            raise InputError(f"a stage of a pipeline must be a dynamics or a fused stage, got {self.engine!r}")
        if not self.name:
            object.__setattr__(self, "name", "+".join(type(part).__name__ for part in self.engine.parts))

    def __mul__(self, n_ranks: int) -> PipelineStage:
        """`stage * 4`: the same on four ranks."""
        return replace(self, n_ranks=self.n_ranks * whole("the number of ranks", n_ranks, 1))

    __rmul__ = __mul__

    __or__ = chained


def as_stage(value: Any) -> PipelineStage:
    """A stage as it is, or one made of a dynamics; InputError for anything else."""
    return value if isinstance(value, PipelineStage) else PipelineStage(value)


def checked(stages: Sequence[PipelineStage]) -> tuple[PipelineStage, ...]:
    """Stages that can work one behind the other, their states and names told apart; InputError says what is wrong."""
    if len(stages) < 2:
        raise InputError(f"a pipeline has at least two stages, got {len(stages)}: run a single one by itself")
    parts = [part for one in stages for part in one.engine.parts]
    if len({id(one) for one in parts}) < len(parts):
        raise InputError("the same dynamics is in two stages: its state cannot belong to both; make two")
    for place, one in enumerate(stages):
        where = f"stage {place} ({one.name})"
        for part in one.engine.parts:
            if part.n_steps == 0:
                raise InputError(
                    f"{type(part).__name__} of {where} has n_steps=0: a stage takes at least one step; leave it out"
                )
        last = one.engine.parts[-1]
        if last.n_steps is None and last.convergence_hook is None:
            raise InputError(f"no system ever leaves {where}: give {type(last).__name__} a convergence_hook or n_steps")
        if place and one.engine.refill.sampler is not None:
            raise InputError(f"{where} has a sampler, but takes its systems from the stage before: only the first may have one")
        if one.engine.refill.sinks and place < len(stages) - 1:
            raise InputError(
                f"{where} has sinks, but hands its systems on: give the sinks to the last stage, or to the pipeline"
            )
    name_apart(parts)
    return tuple(_limited(_named_apart(stages)))


def program_of(stages: Sequence[PipelineStage]) -> list[Any]:
    """What has to be the same on every rank, and when a run is resumed."""
    found = [{"name": one.name, "dynamics": [_facts_of(part) for part in one.engine.parts]} for one in stages]
    return list(json.loads(json.dumps(found, default=lambda value: value.tolist())))


def _facts_of(part: BaseDynamics) -> dict[str, Any]:
    spec = part.model.spec
    facts = {"kind": type(part).__name__, "n_steps": part.n_steps, "criterion": repr(part.convergence_hook)}
    return {**facts, "cutoff": spec.cutoff, "type_map": list(spec.type_map), **plain(part.describe())}


def _named_apart(stages: Sequence[PipelineStage]) -> list[PipelineStage]:
    taken: set[str] = set()
    found = []
    for one in stages:
        name, count = one.name, 2
        while name in taken:
            name, count = f"{one.name} {count}", count + 1
        taken.add(name)
        found.append(replace(one, name=name))
    return found


def _limited(stages: Sequence[PipelineStage]) -> list[PipelineStage]:
    sampler = stages[0].engine.refill.sampler
    if sampler is None:
        return list(stages)
    room = Room(sampler.max_batch_size, sampler.max_atoms, sampler.max_edges)
    return [one if one.limits is not None else replace(one, limits=room) for one in stages]
