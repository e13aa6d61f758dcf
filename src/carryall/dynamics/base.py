"""The step, and the loop over steps: every integrator and optimizer is a `BaseDynamics` with its own two halves of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import fs
from carryall.dynamics.convergence import ConvergenceHook, Criteria
from carryall.dynamics.forces import ForceEvaluator, Snapshot
from carryall.dynamics.hooks.base import HookRegistry, HookStageEnum, name_of, stages_of
from carryall.dynamics.status import (
    OUTCOME,
    PREVIOUS_ENERGY,
    REASON,
    STATUS,
    SYSTEM_ID,
    Outcome,
    ensure_keys,
    reopen_converged,
)
from carryall.dynamics.thermo import standard_masses
from carryall.errors import InputError
from carryall.graph.potential import Potential

logger = logging.getLogger("carryall.dynamics")


class BaseDynamics:
    """pre_update -> compute -> post_update -> convergence, with hooks between.

    A subclass gives `pre_update(batch, mask)` and `post_update(batch, mask)`, which change the systems where `mask`
    (n_systems,) bool is true (None for all) and leave the others bit for bit, and `state_defaults(batch)`: its per-system
    state, kept under keys of the batch, so that it follows systems through selection, removal and reordering.

    A system that has converged is frozen where it converged while the others go on; one without finite energy and forces, or
    without a neighbour graph, is set aside with its reason. A dynamics that has not stepped yet starts its own state afresh,
    and takes over systems that an earlier one has converged; systems that failed stay aside.
    """

    __needs_keys__: ClassVar[frozenset[str]] = frozenset({"energy", "forces"})
    """Outputs that the model must have."""
    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions"})
    """Keys that a step changes."""
    prefix: str = "dynamics"
    """Before the names of the state's keys."""
    removed_degrees: int = 0
    """Degrees of freedom that the dynamics does not heat: 3 where the centre of mass keeps its velocity."""
    has_time: bool = False
    """Whether the state's `dt` is physical time."""

    def __init__(
        self,
        model: Potential,
        hooks: Iterable[Any] = (),
        convergence_hook: ConvergenceHook | Criteria = None,
        n_steps: int | None = None,
        *,
        skin: float = 0.5,
        exit_status: int = 1,
    ) -> None:
        """model: any `Potential`. n_steps: default of `run`. skin: Å, of the neighbour list.

        exit_status: from this status on a system is done.
        """
        self.model = model
        if convergence_hook is not None and not isinstance(convergence_hook, ConvergenceHook):
            convergence_hook = ConvergenceHook(convergence_hook)
        self.convergence_hook: ConvergenceHook | None = convergence_hook
        self.n_steps = None if n_steps is None else _checked_steps(n_steps)
        self.exit_status = exit_status
        self.step_count = 0
        """Steps done by this dynamics."""
        self.completed_steps = 0
        """step_count, and one more once the second half of a step is done: the number of steps that positions have seen."""
        self.target_steps: int | None = None
        """step_count at which the run now under way ends at the latest."""
        self.current_hook_stage: HookStageEnum | None = None
        self.newly_converged: Tensor | None = None
        """(k,) int64 systems that the converge event now under way is about."""
        self.evaluator = ForceEvaluator(model, self.__needs_keys__, type(self).__name__, skin)
        self.hooks = HookRegistry()
        self._bookkeeping: dict[str, Callable[[Batch], Tensor]] = {}
        self._batch: Batch | None = None
        self._running: tuple[Snapshot, Tensor | None, int] | None = None
        for hook in hooks:
            self.register_hook(hook)

    # -- what a subclass gives

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """First half of a step, before the forces are evaluated."""

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Second half of a step, after the forces are evaluated."""

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """State that a system starts with, by name: one row per system, or per atom for names in `atom_state`."""
        return {}

    atom_state: ClassVar[frozenset[str]] = frozenset()
    """Names in the state that have one row per atom."""

    # -- hooks

    def register_hook(self, hook: Any) -> None:
        """Add a hook; InputError (a ValueError) names it when it is not one, or could never fire here."""
        if HookStageEnum.ON_CONVERGE in stages_of(hook) and self.convergence_hook is None:
            raise InputError(
                f"hook {name_of(hook)} waits for ON_CONVERGE, which never comes: {type(self).__name__} has no convergence_hook"
            )
        self.hooks.add(hook)

    def register_bookkeeping_key(self, key: str, init_fn: Callable[[Batch], Tensor]) -> None:
        """A system-level key that every batch of this dynamics gets: `init_fn(batch)` gives its first values."""
        self._bookkeeping[key] = init_fn
        self._batch = None

    # -- the loop

    def run(self, batch: Batch, n_steps: int | None = None) -> Batch:
        """Step until all systems are done, at most `n_steps` times (the call's number wins over the constructor's).

        The batch is changed in place and returned. Systems that meet the criterion at the start are not moved.
        """
        limit = self.n_steps if n_steps is None else _checked_steps(n_steps)
        if limit is None:
            raise InputError(
                f"{type(self).__name__} has no number of steps: give run(batch, n_steps=...), "
                f"or {type(self).__name__}(..., n_steps=...) when making it"
            )
        self.target_steps, self.completed_steps = self.step_count + limit, self.step_count
        with self.hooks.opened():
            self._adopt(batch)
            self._prime(batch)
            self._check_convergence(batch)
            for _ in range(limit):
                if self._running_systems(batch)[1] == 0:
                    break
                self.step(batch)
        return batch

    def step(self, batch: Batch) -> None:
        """One step of every system that is not done; evaluates the forces first only when they are not current."""
        self._adopt(batch)
        self._prime(batch)
        self.completed_steps = self.step_count
        self._fire(HookStageEnum.BEFORE_STEP, batch)
        self._fire(HookStageEnum.BEFORE_PRE_UPDATE, batch)
        self._prime(batch)
        self.pre_update(batch, self._running_systems(batch)[0])
        self._fire(HookStageEnum.AFTER_PRE_UPDATE, batch)
        self._fire(HookStageEnum.BEFORE_COMPUTE, batch)
        self.compute(batch)
        self._fire(HookStageEnum.AFTER_COMPUTE, batch)
        self._fire(HookStageEnum.BEFORE_POST_UPDATE, batch)
        mask = self._running_systems(batch)[0]
        self.post_update(batch, mask)
        self._count(batch, mask)
        self.completed_steps = self.step_count + 1
        self._fire(HookStageEnum.AFTER_POST_UPDATE, batch)
        self._fire(HookStageEnum.AFTER_STEP, batch)
        self._check_convergence(batch)
        self.step_count += 1

    def compute(self, batch: Batch) -> None:
        """One model call; energy, forces, virial and stress of running systems are written to the batch."""
        self._adopt(batch)
        for _ in range(batch.n_systems + 1):
            failures = self.evaluator.evaluate(batch, self._running_systems(batch)[0])
            for index, reason in failures.items():
                self.set_aside(batch, index, reason)
            if not failures or self.evaluator.is_current(batch):
                return

    def restore(self, batch: Batch, step_count: int, forces_current: bool) -> None:
        """Take up a batch that this dynamics had brought to `step_count`: its state is kept, no forces are evaluated twice."""
        self.step_count = self.completed_steps = step_count
        self._adopt(batch)
        if forces_current:
            self.evaluator.mark_current(batch)

    # -- systems that stop

    def set_aside(self, batch: Batch, index: int | Tensor, reason: str) -> None:
        """Freeze systems (an index, or a tensor of indices) as failed; the reason goes to `batch.info[i]["failure"]`."""
        chosen = torch.as_tensor(index, device=batch.device, dtype=torch.int64).reshape(-1)
        batch.set(STATUS, batch.get(STATUS).index_fill(0, chosen, self.exit_status))
        batch.set(OUTCOME, batch.get(OUTCOME).index_fill(0, chosen, int(Outcome.FAILED)))
        for i in chosen.tolist():
            batch.info[i][REASON] = reason
            name = int(batch.get(SYSTEM_ID)[i])
            logger.warning("system %d set aside at step %d of %s: %s", name, self.step_count, type(self).__name__, reason)

    def running(self, batch: Batch) -> Tensor | None:
        """(n_systems,) bool, true for systems that are not done; None when none is."""
        return self._running_systems(batch)[0]

    def n_running(self, batch: Batch) -> int:
        """How many systems are not done."""
        return self._running_systems(batch)[1]

    def key(self, name: str) -> str:
        """Key of the batch that holds a part of the state, such as `fire_dt`."""
        return f"{self.prefix}_{name}"

    def steps(self, batch: Batch) -> Tensor:
        """(n_systems,) int64 steps that each system has taken in this dynamics."""
        return batch.get(self.key("steps"))

    def time(self, batch: Batch) -> Tensor:
        """(n_systems,) fs that each system has moved in this dynamics; NaN where steps are not time."""
        steps = self.steps(batch).double()
        return steps * batch.get(self.key("dt")) / fs if self.has_time else torch.full_like(steps, torch.nan)

    def forces_are_current(self, batch: Batch) -> bool:
        """Whether the batch's energy and forces belong to its positions."""
        return self.evaluator.is_current(batch)

    def mark_forces_current(self, batch: Batch) -> None:
        """For a hook that moved atoms without changing energy and forces, such as by lattice vectors: saves a model call."""
        self.evaluator.mark_current(batch)

    @property
    def active_batch(self) -> Batch | None:
        """The batch of the last step."""
        return self._batch

    def __repr__(self) -> str:
        facts = [type(self.model).__name__, f"step_count={self.step_count}"]
        facts += [f"n_steps={self.n_steps}"] if self.n_steps is not None else []
        facts += [f"{name}={value}" for name, value in self.describe().items()]
        facts += [repr(self.convergence_hook)] if self.convergence_hook is not None else []
        facts += [f"hooks=[{', '.join(name_of(hook) for hook in self.hooks)}]"] if len(self.hooks) else []
        return f"{type(self).__name__}({', '.join(facts)})"

    def describe(self) -> dict[str, Any]:
        """Settings for `repr` and for checkpoints."""
        return {}

    # -- inside

    def _adopt(self, batch: Batch) -> None:
        if batch is self._batch:
            return
        fresh = self.step_count == 0
        for key in ("positions", "velocities", "cell", "masses"):
            if key in batch and (batch.get(key).dtype != torch.float64 or batch.get(key).requires_grad):
                batch.set(key, batch.get(key).detach().double())
        if "masses" not in batch:
            batch.masses = standard_masses(batch.atomic_numbers)
        ensure_keys(batch)
        if fresh:
            reopen_converged(batch)
        for key, init_fn in self._bookkeeping.items():
            if key not in batch:
                batch.set(key, init_fn(batch), level="system")
        if self.convergence_hook is not None and self.convergence_hook.needs_previous_energy and PREVIOUS_ENERGY not in batch:
            unknown = torch.full((batch.n_systems,), torch.nan, dtype=torch.float64, device=batch.device)
            batch.set(PREVIOUS_ENERGY, unknown, level="system")
        self.init_state(batch, fresh)
        self._batch = batch

    def init_state(self, batch: Batch, fresh: bool) -> None:
        """Set the state's keys: all of them when `fresh`, else those that the batch lacks."""
        counter = torch.zeros(batch.n_systems, dtype=torch.int64, device=batch.device)
        for name, value in {"steps": counter, **self.state_defaults(batch)}.items():
            if fresh or self.key(name) not in batch:
                batch.set(self.key(name), value, level="atom" if name in self.atom_state else "system")

    def _prime(self, batch: Batch) -> None:
        if not self.evaluator.is_current(batch) and self._running_systems(batch)[1]:
            self.compute(batch)

    def _running_systems(self, batch: Batch) -> tuple[Tensor | None, int]:
        """Mask (None for all) and number of running systems, counted again only when the status was changed."""
        status = batch.get(STATUS)
        if self._running is None or not self._running[0].holds(status):
            mask = status < self.exit_status
            count = int(mask.sum())
            self._running = (Snapshot.of(status), None if count == batch.n_systems else mask, count)
        return self._running[1], self._running[2]

    def _count(self, batch: Batch, mask: Tensor | None) -> None:
        key = self.key("steps")
        batch.set(key, batch.get(key) + (1 if mask is None else mask.long()))

    def _check_convergence(self, batch: Batch) -> None:
        hook = self.convergence_hook
        mask, count = self._running_systems(batch)
        if hook is None or count == 0 or self.completed_steps % hook.frequency:
            return
        newly = hook.converged(batch) if mask is None else hook.converged(batch) & mask
        if not bool(newly.any()):
            return
        batch.set(STATUS, batch.get(STATUS).masked_fill(newly, self.exit_status))
        batch.set(OUTCOME, batch.get(OUTCOME).masked_fill(newly, int(Outcome.CONVERGED)))
        self.newly_converged = newly.nonzero().squeeze(1)
        self._fire(HookStageEnum.ON_CONVERGE, batch)
        self.newly_converged = None

    def _fire(self, stage: HookStageEnum, batch: Batch) -> None:
        for hook in self.hooks.due(stage, self.step_count):
            self.current_hook_stage = stage
            try:
                hook(batch, self)
            finally:
                self.current_hook_stage = None


def _checked_steps(n_steps: int) -> int:
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise InputError(f"n_steps must be a non-negative integer, got {n_steps!r}")
    return n_steps
