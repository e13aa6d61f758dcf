"""The loop over steps, for one dynamics or several on one batch: one model call a step, hooks between, systems that finish.

An engine has `parts`, the dynamics that it steps: a `BaseDynamics` is an engine with itself as its only part, a `FusedStage`
one with several. What is written once for both is here; what they do differently is in their own files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import system_sizes
from carryall.dynamics.composition import chained, on_ranks
from carryall.dynamics.forces import ForceEvaluator
from carryall.dynamics.graduation import graduate
from carryall.dynamics.hooks.base import HookRegistry, HookStageEnum, entered, name_of, stages_of
from carryall.dynamics.inflight import Refill, run_in_flight
from carryall.dynamics.parameters import whole
from carryall.dynamics.roster import Active, Roster, Standing, within
from carryall.dynamics.status import OUTCOME, PREVIOUS_ENERGY, REASON, STATUS, SYSTEM_ID, Outcome, ensure_keys, reopen
from carryall.dynamics.thermo import standard_masses
from carryall.errors import InputError
from carryall.graph.potential import Potential

if TYPE_CHECKING:
    from carryall.dynamics.base import BaseDynamics
    from carryall.dynamics.samplers import SizeAwareSampler
    from carryall.dynamics.sinks import DataSink

logger = logging.getLogger("carryall.dynamics")
NO_ATOMS = "the system has no atoms"


class Engine:
    """Steps a batch, or works through a sampler's systems in flight; see `BaseDynamics` and `FusedStage`."""

    def __init__(
        self,
        model: Potential,
        needs: Collection[str],
        *,
        hooks: Iterable[Any] = (),
        n_steps: int | None = None,
        skin: float = 0.5,
        exit_status: int = 1,
        sampler: SizeAwareSampler | None = None,
        sinks: Sequence[DataSink] = (),
        refill_frequency: int = 5,
        init_fn: Callable[[Batch], None] | None = None,
    ) -> None:
        self.model = model
        self.skin = skin
        self.evaluator = ForceEvaluator(model, needs, type(self).__name__, skin)
        self.n_steps = None if n_steps is None else whole("n_steps", n_steps)
        self.exit_status = exit_status
        self.refill = Refill(sampler, tuple(sinks), whole("refill_frequency", refill_frequency, 1), init_fn)
        self.hooks = HookRegistry()
        self.current_hook_stage: HookStageEnum | None = None
        self.newly_converged: Tensor | None = None
        """(k,) int64 systems that the converge event now under way is about: by the criterion, or by the number of steps."""
        self.in_pipeline = False
        """Whether systems come from and go to other stages of a pipeline."""
        self.host: Engine = self
        """The engine that steps this one: itself, or the fused stage that it is a part of."""
        self._steps = self._completed = 0
        self._target: int | None = None
        self._batch: Batch | None = None
        self.roster = Roster()
        for hook in hooks:
            self.register_hook(hook)

    # -- what the two kinds of engine give

    @property
    def parts(self) -> tuple[BaseDynamics, ...]:
        """The dynamics that are stepped."""
        raise NotImplementedError

    @property
    def entry_status(self) -> int:
        """Status of a system that begins."""
        return 0

    def part_masks(self, status: Tensor) -> list[Tensor]:
        """(n_systems,) bool for each part: the systems that it moves."""
        raise NotImplementedError

    def next_status(self, part: BaseDynamics) -> int:
        """Status of a system that leaves a part."""
        return self.exit_status

    def part_of(self, status: int) -> BaseDynamics | None:
        """The part that a status leads to; None when the system is done."""
        return None

    @property
    def counts_own_steps(self) -> bool:
        """Whether a system leaves a part after that part's `n_steps` steps of its own."""
        return self.refill.sampler is not None or self.in_pipeline

    # -- hooks

    def register_hook(self, hook: Any) -> None:
        """Add a hook; InputError (a ValueError) names it when it is not one, or could never fire here."""
        if HookStageEnum.ON_CONVERGE in stages_of(hook) and not self.can_converge:
            raise InputError(
                f"hook {name_of(hook)} waits for ON_CONVERGE, which never comes: {type(self).__name__} has no convergence_hook"
            )
        self.hooks.add(hook)

    @property
    def can_converge(self) -> bool:
        """Whether a system can ever leave a part."""
        return any(part.convergence_hook is not None or part.n_steps is not None for part in self.parts)

    # -- the loop

    @property
    def step_count(self) -> int:
        """Steps done; of a part of a fused stage, the fused stage's."""
        return self.host._steps

    @property
    def completed_steps(self) -> int:
        """step_count, and one more once the second half of a step is done: the number of steps that positions have seen."""
        return self.host._completed

    @property
    def target_steps(self) -> int | None:
        """step_count at which the run now under way ends at the latest."""
        return self.host._target

    def run(self, batch: Batch | None = None, n_steps: int | None = None) -> Batch | None:
        """Step until all systems are done, at most `n_steps` times (the call's number wins over the constructor's).

        The batch is changed in place and returned. Systems that meet the criterion at the start are not moved. With a sampler
        systems come and go until it is exhausted; `batch` may hold systems to begin with, and `n_steps` of the constructor is
        what each system may take. Then the result is what is not in a sink: the systems still on their way, all of them in the
        order of their ids where the engine has no sink, None where nothing is left.
        """
        if self.refill.sampler is not None:
            return run_in_flight(self, batch, None if n_steps is None else whole("n_steps", n_steps))
        if batch is None:
            raise InputError(f"{type(self).__name__} has no sampler to take systems from: give run(batch)")
        if not batch.n_systems:
            raise InputError(f"the batch that {type(self).__name__} was given holds no systems: give at least one")
        limit = self._limit(n_steps)
        self.begin_run(limit)
        with self.opened():
            self.start(batch)
            done = 0
            while self.n_running(batch) and (limit is None or done < limit):
                self.step(batch)
                done += 1
        return batch

    def _limit(self, n_steps: int | None) -> int | None:
        limit = self.n_steps if n_steps is None else whole("n_steps", n_steps)
        if limit is None:
            raise InputError(
                f"{type(self).__name__} has no number of steps: give run(batch, n_steps=...), "
                f"or {type(self).__name__}(..., n_steps=...) when making it"
            )
        return limit

    def start(self, batch: Batch) -> None:
        """Take up a batch: state, forces at the start, and systems that need no step."""
        self.attach(batch)
        self.prime(batch)
        graduate(self, batch)

    def step(self, batch: Batch) -> Tensor | None:
        """One step of every system that is not done; evaluates the forces first only when they are not current.

        Returns (k,) int64 the systems that this step brought to their end (failures are not among them), None for none.
        """
        self.attach(batch)
        self.prime(batch)
        self._completed = self._steps
        self.fire(HookStageEnum.BEFORE_STEP, batch)
        self.fire(HookStageEnum.BEFORE_PRE_UPDATE, batch)
        self.prime(batch)
        for one in self.active(batch):
            one.part.pre_update(batch, one.mask)
        self.fire(HookStageEnum.AFTER_PRE_UPDATE, batch)
        self.fire(HookStageEnum.BEFORE_COMPUTE, batch)
        self.compute(batch, primed=False)
        self.fire(HookStageEnum.AFTER_COMPUTE, batch)
        self.fire(HookStageEnum.BEFORE_POST_UPDATE, batch)
        for one in self.active(batch):
            one.part.post_update(batch, one.mask)
            one.part.count(batch, one.mask)
        self.roster.unprimed = None
        self._completed = self._steps + 1
        self.fire(HookStageEnum.AFTER_POST_UPDATE, batch)
        self.fire(HookStageEnum.AFTER_STEP, batch)
        finished = graduate(self, batch)
        self._steps += 1
        return finished

    def compute(self, batch: Batch, primed: bool = True) -> None:
        """One model call; energy, forces, virial and stress of running systems are written to the batch."""
        self.attach(batch)
        for _ in range(batch.n_systems + 1):
            failures = self.evaluator.evaluate(batch, self.standing(batch).mask)
            for index, reason in failures.items():
                self.set_aside(batch, index, reason)
            if not failures or self.evaluator.is_current(batch):
                break
        if primed:
            self.roster.unprimed = None
        standing = self.standing(batch)
        if self.parts[0] is not self:
            self.hooks.on_forces(batch, self, standing.mask)
        for one in standing.active:
            one.part.finish_forces(batch, one.mask)

    def prime(self, batch: Batch) -> None:
        """Evaluate the forces unless they are those of the positions; fires no hook."""
        if not self.evaluator.is_current(batch) and self.standing(batch).count:
            self.compute(batch)

    def attach(self, batch: Batch) -> None:
        """Take up a batch that is not the one of the last step: the keys and the state that it lacks, all checks."""
        if batch is self._batch:
            return
        self._attach(batch, fresh=self._steps == 0)

    def _attach(self, batch: Batch, fresh: bool) -> None:
        for part in self.parts:
            part.host = self
        self.roster.unprimed = None
        self.enlist(batch, fresh)
        self._batch = batch

    def enlist(self, batch: Batch, fresh: bool = False) -> None:
        """Give systems the keys and the state that they lack (all state where `fresh`), and set aside those that are unfit."""
        for key in ("positions", "velocities", "cell", "masses"):
            if key in batch and (batch.get(key).dtype != torch.float64 or batch.get(key).requires_grad):
                batch.set(key, batch.get(key).detach().double())
        if "masses" not in batch:
            batch.masses = standard_masses(batch.atomic_numbers)
        ensure_keys(batch, self.entry_status)
        if fresh:
            reopen(batch, self.entry_status)
        if any(part.needs_previous_energy for part in self.parts) and PREVIOUS_ENERGY not in batch:
            unknown = torch.full((batch.n_systems,), torch.nan, dtype=torch.float64, device=batch.device)
            batch.set(PREVIOUS_ENERGY, unknown, level="system")
        self._set_aside_all(batch, {i: NO_ATOMS for i, n in enumerate(system_sizes(batch).tolist()) if n == 0})
        for part in self.parts:
            for constraint in part.constraints:
                constraint.check(batch)
            self._set_aside_all(batch, part.unfit_systems(batch))
            part.prepare(batch)
            part.init_state(batch, fresh)

    def go_on_with(self, batch: Batch | None, unprimed: Tensor | None, current: bool = True) -> None:
        """Take a batch of enlisted systems; the next step brings the forces of `unprimed` (n_systems,) bool ones."""
        self._batch, self.roster.unprimed = batch, unprimed
        if batch is not None and current:
            self.evaluator.mark_current(batch)

    def begin_run(self, n_steps: int | None) -> None:
        """Note where a run ends, for those who report."""
        self._completed = self._steps
        self._target = None if n_steps is None else self._steps + n_steps

    def not_done(self, batch: Batch) -> Tensor:
        """(n_systems,) bool, true for systems that are not done, new ones too."""
        mask = self.standing(batch).mask
        return torch.ones(batch.n_systems, dtype=torch.bool, device=batch.device) if mask is None else mask

    def restore(self, batch: Batch, step_count: int, forces_current: bool) -> None:
        """Take up a batch that this engine had brought to `step_count`: its state is kept, no forces are evaluated twice."""
        self.host = self
        self._steps = self._completed = step_count
        self._attach(batch, fresh=False)
        if forces_current:
            self.evaluator.mark_current(batch)

    # -- systems that stop

    def set_aside(self, batch: Batch, index: int | Tensor, reason: str) -> None:
        """Freeze systems (an index, or a tensor of indices) as failed; the reason goes to `batch.info[i]["failure"]`."""
        chosen = torch.as_tensor(index, device=batch.device, dtype=torch.int64).reshape(-1)
        batch.set(STATUS, batch.get(STATUS).index_fill(0, chosen, self.host.exit_status))
        batch.set(OUTCOME, batch.get(OUTCOME).index_fill(0, chosen, int(Outcome.FAILED)))
        for i in chosen.tolist():
            batch.info[i][REASON] = reason
            name = int(batch.get(SYSTEM_ID)[i])
            logger.warning("system %d set aside at step %d of %s: %s", name, self.step_count, type(self).__name__, reason)

    def _set_aside_all(self, batch: Batch, reasons: dict[int, str]) -> None:
        for index, reason in reasons.items():
            if int(batch.get(OUTCOME)[index]) == Outcome.RUNNING:
                self.set_aside(batch, index, reason)

    def running(self, batch: Batch) -> Tensor | None:
        """(n_systems,) bool, true for systems that move now; None when all do."""
        if self.host is not self:
            return next((one.mask for one in self.host.active(batch) if one.part is self), _none(batch))
        mask = self.standing(batch).mask
        return mask if self.roster.unprimed is None else within(~self.roster.unprimed, mask)

    def n_running(self, batch: Batch) -> int:
        """How many systems are not done."""
        if self.host is not self:
            return next((one.count for one in self.host.active(batch) if one.part is self), 0)
        return self.standing(batch).count

    def active(self, batch: Batch) -> list[Active]:
        """The parts that have systems to move, new systems without forces left out."""
        return self.roster.moving(self.standing(batch))

    def standing(self, batch: Batch) -> Standing:
        """Who moves what, new systems too."""
        return self.roster.standing(batch.get(STATUS), self.parts, self.part_masks)

    # -- forces, for hooks

    def forces_are_current(self, batch: Batch) -> bool:
        """Whether the batch's energy and forces belong to its positions."""
        return self.host.evaluator.is_current(batch)

    def mark_forces_current(self, batch: Batch) -> None:
        """For a hook that moved atoms without changing energy and forces, such as by lattice vectors: saves a model call."""
        self.host.evaluator.mark_current(batch)

    # -- facts

    @property
    def device(self) -> torch.device | None:
        """Where the batch of the last step is; None before there was one."""
        return None if self._batch is None else self._batch.device

    @property
    def active_batch(self) -> Batch | None:
        """The batch of the last step."""
        return self.host._batch

    @property
    def active_batch_size(self) -> int:
        """Systems in it."""
        return 0 if self.active_batch is None else self.active_batch.n_systems

    @property
    def inflight_mode(self) -> bool:
        """Whether systems come from a sampler."""
        return self.refill.sampler is not None

    @property
    def done(self) -> bool:
        """Whether nothing is left to do: no system runs and no sampler has more."""
        exhausted = self.refill.sampler is None or self.refill.sampler.exhausted
        return exhausted and (self._batch is None or self.n_running(self._batch) == 0)

    def describe(self) -> dict[str, Any]:
        """Settings for `repr` and for checkpoints."""
        return {}

    __or__ = chained
    __mul__ = __rmul__ = on_ranks

    # -- inside

    def opened(self) -> AbstractContextManager[None]:
        """The hooks of the engine and its parts, entered for a run."""
        registries = [self.hooks, *(part.hooks for part in self.parts if part is not self)]
        return entered(hook for registry in registries for hook in registry)

    def fire(self, stage: HookStageEnum, batch: Batch) -> None:
        """Call the hooks that are due: the engine's own, then those of each part that has systems."""
        if self.hooks.waits_for(stage):
            self.call_hooks(stage, batch)
        if self.parts[0] is not self:
            for one in self.active(batch):
                if one.part.hooks.waits_for(stage):
                    one.part.call_hooks(stage, batch)

    def call_hooks(self, stage: HookStageEnum, batch: Batch) -> None:
        """Call this engine's own hooks that are due."""
        for hook in self.hooks.due(stage, self.step_count):
            self.current_hook_stage = stage
            try:
                hook(batch, self)
            finally:
                self.current_hook_stage = None


def _none(batch: Batch) -> Tensor:
    return torch.zeros(batch.n_systems, dtype=torch.bool, device=batch.device)
