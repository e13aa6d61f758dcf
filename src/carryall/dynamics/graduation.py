"""Systems that are done with a part of an engine, by its criterion or by its number of steps: they move on, or finish."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.roster import Active, within
from carryall.dynamics.status import OUTCOME, STATUS, Outcome

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics
    from carryall.dynamics.engine import Engine


def graduate(engine: Engine, batch: Batch) -> Tensor | None:
    """Move systems on that are done with their part; (k,) int64 those that reached their end, None for none.

    The converge event fires once for each system and visit of a part, whatever a hook's frequency.
    """
    leaving = [(one.part, *found) for one in engine.active(batch) if (found := _leaving(engine, one, batch)) is not None]
    finished = [_move(engine, batch, part, by_criterion, by_steps) for part, by_criterion, by_steps in leaving]
    rows = [one for one in finished if one is not None]
    if not rows:
        return None
    done = rows[0] if len(rows) == 1 else torch.cat(rows).sort().values
    if engine.parts[0] is not engine:
        _announce(engine, engine, batch, done)
    return done


def _leaving(engine: Engine, one: Active, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """(n_systems,) bool by the criterion and by the number of steps, None where no system leaves."""
    part, hook = one.part, one.part.convergence_hook
    by_criterion = by_steps = None
    if hook is not None:
        by_criterion = within(hook.converged(batch), one.mask)
        if hook.frequency > 1:
            by_criterion = by_criterion & (part.steps(batch) % hook.frequency == 0)
        # only where systems begin may one be done without a step: else a run cut in two would differ from one
        if engine.part_of(engine.entry_status) not in (None, part):
            by_criterion = by_criterion & (part.steps(batch) > 0)
    if engine.counts_own_steps and part.n_steps is not None:
        by_steps = within(part.steps(batch) >= part.n_steps, one.mask)
    if by_criterion is None and by_steps is None:
        return None
    none = torch.zeros(batch.n_systems, dtype=torch.bool, device=batch.device)
    by_criterion, by_steps = (none if found is None else found for found in (by_criterion, by_steps))
    return (by_criterion, by_steps & ~by_criterion) if bool((by_criterion | by_steps).any()) else None


def _move(engine: Engine, batch: Batch, part: BaseDynamics, by_criterion: Tensor, by_steps: Tensor) -> Tensor | None:
    leaving = by_criterion | by_steps
    target = engine.next_status(part)
    batch.set(STATUS, batch.get(STATUS).masked_fill(leaving, target))
    following = engine.part_of(target)
    if following is not None:
        following.enter(batch, leaving)
        if part.hooks.shape_forces or following.hooks.shape_forces or part.constraints != following.constraints:
            # the forces are those of the part that was left
            engine.evaluator.forget()
    else:
        outcome = batch.get(OUTCOME).masked_fill(by_criterion, int(Outcome.CONVERGED))
        batch.set(OUTCOME, outcome.masked_fill(by_steps, int(Outcome.STEP_BUDGET)))
    rows = leaving.nonzero().squeeze(1)
    _announce(engine, part, batch, rows)
    return rows if following is None else None


def _announce(engine: Engine, owner: Engine, batch: Batch, rows: Tensor) -> None:
    if owner.hooks.waits_for(HookStageEnum.ON_CONVERGE):
        owner.newly_converged = rows
        owner.call_hooks(HookStageEnum.ON_CONVERGE, batch)
        owner.newly_converged = None
