"""`a + b + c`: several dynamics on one batch with one model call a step, each moving the systems that its status names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.engine import Engine
from carryall.dynamics.status import STATUS
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.samplers import SizeAwareSampler
    from carryall.dynamics.sinks import DataSink


class FusedStage(Engine):
    """Stages in a row: a system enters the first, leaves each when that one's criterion is met or its `n_steps` are done.

    A system that comes into a stage starts with that stage's fresh state. Hooks of the fused stage see the whole batch, those
    of a sub-stage are called with that sub-stage, whose `running(batch)` are its own systems, in every step in which it has
    some; each hook fires at its own points of the step, BEFORE_COMPUTE and AFTER_COMPUTE too, once. `step_count` of a sub-stage
    is the fused stage's while it is stepped by it.
    """

    def __init__(
        self,
        sub_stages: Sequence[BaseDynamics | tuple[int, BaseDynamics]],
        entry_status: int | None = None,
        exit_status: int | None = None,
        *,
        hooks: Iterable[Any] = (),
        n_steps: int | None = None,
        skin: float | None = None,
        sampler: SizeAwareSampler | None = None,
        sinks: Sequence[DataSink] = (),
        refill_frequency: int = 5,
        init_fn: Callable[[Batch], None] | None = None,
    ) -> None:
        """sub_stages: dynamics, numbered from 0, or pairs (status, dynamics) in ascending order of status.

        entry_status: where new systems start; the first stage's by default. exit_status: at which they are done; one past the
        last stage's by default. n_steps: default of `run`, fused steps.
        InputError for fewer than one stage, statuses that do not ascend, an exit status that a stage has, and stages with
        different models, which one model call cannot serve.
        """
        pairs = [one if isinstance(one, tuple) else (index, one) for index, one in enumerate(sub_stages)]
        self._statuses = tuple(status for status, _ in pairs)
        self._parts = tuple(stage for _, stage in pairs)
        _check(self._statuses, self._parts)
        self._entry = self._statuses[0] if entry_status is None else entry_status
        if self._entry not in self._statuses:
            raise InputError(f"entry_status {self._entry} is no stage's: the stages have {list(self._statuses)}")
        last = self._statuses[-1] + 1 if exit_status is None else exit_status
        if last <= self._statuses[-1]:
            raise InputError(f"exit_status {last} must lie beyond the last stage's status {self._statuses[-1]}")
        name_apart(self._parts)
        needs = frozenset().union(*(part.__needs_keys__ for part in self._parts))
        super().__init__(
            self._parts[0].model,
            needs,
            hooks=hooks,
            n_steps=n_steps,
            skin=min(part.skin for part in self._parts) if skin is None else skin,
            exit_status=last,
            sampler=sampler,
            sinks=sinks,
            refill_frequency=refill_frequency,
            init_fn=init_fn,
        )

    @property
    def parts(self) -> tuple[BaseDynamics, ...]:
        """The stages."""
        return self._parts

    @property
    def sub_stages(self) -> list[tuple[int, BaseDynamics]]:
        """The stages with their statuses."""
        return list(zip(self._statuses, self._parts, strict=True))

    @property
    def entry_status(self) -> int:
        """Where new systems start."""
        return self._entry

    @property
    def counts_own_steps(self) -> bool:
        """A stage's `n_steps` always count here."""
        return True

    def part_masks(self, status: Tensor) -> list[Tensor]:
        """Systems by the stage that their status names."""
        return [status == one for one in self._statuses]

    def next_status(self, part: BaseDynamics) -> int:
        """The status after a stage's."""
        index = next(i for i, one in enumerate(self._parts) if one is part)
        return self._statuses[index + 1] if index + 1 < len(self._parts) else self.exit_status

    def part_of(self, status: int) -> BaseDynamics | None:
        """The stage of a status."""
        return dict(self.sub_stages).get(status)

    def enlist(self, batch: Batch, fresh: bool = False) -> None:
        """As every engine; a status that names no stage is an InputError."""
        super().enlist(batch, fresh)
        status = batch.get(STATUS)
        known = torch.stack(self.part_masks(status)).any(0) | (status >= self.exit_status)
        if not bool(known.all()):
            index = int((~known).nonzero()[0])
            raise InputError(
                f"system {index} has status {int(status[index])}, which names no stage: the stages have "
                f"{list(self._statuses)}, and from {self.exit_status} on a system is done"
            )

    def _limit(self, n_steps: int | None) -> int | None:
        # every system ends by its stages, so that no limit is needed where each stage has an end
        if n_steps is None and self.n_steps is None and all(_ends(part) for part in self._parts):
            return None
        return super()._limit(n_steps)

    def register_fused_hook(self, hook: Any) -> None:
        """The same as `register_hook`: a hook of the fused stage sees the whole batch."""
        self.register_hook(hook)

    @property
    def all_complete(self) -> bool:
        """Whether every system of the batch of the last step is done."""
        return self._batch is not None and self.n_running(self._batch) == 0

    def __add__(self, other: BaseDynamics | FusedStage) -> FusedStage:
        """`(a + b) + c` is `a + (b + c)`: stages in one row; what the left one has (hooks, sinks, sampler ...) is kept."""
        return fuse(self, other)

    def describe(self) -> dict[str, Any]:
        """Settings of each stage."""
        found: dict[str, Any] = {"entry_status": self._entry, "exit_status": self.exit_status}
        for status, part in self.sub_stages:
            limit = {} if part.n_steps is None else {"n_steps": part.n_steps}
            found[f"stage {status}"] = {"dynamics": type(part).__name__, **part.describe(), **limit}
        return found

    def __repr__(self) -> str:
        stages = ", ".join(f"{status}: {part!r}" for status, part in self.sub_stages)
        return f"FusedStage(step_count={self.step_count}, {stages})"


def fuse(left: BaseDynamics | FusedStage, right: BaseDynamics | FusedStage) -> FusedStage:
    """Stages of both in one row, numbered anew unless the left one has statuses of its own, which go on from its last.

    Hooks, sampler, sinks, skin and number of steps of a fused operand stay: those of the left one, or of the right one where
    the left has none; two samplers, or a right operand with statuses of its own, are an InputError.
    """
    for one in (left, right):
        if not isinstance(one, (BaseDynamics, FusedStage)):
            raise InputError(f"only a dynamics or a fused stage can be added, got {one!r}")
    fused = [one for one in (left, right) if isinstance(one, FusedStage)]
    with_sampler = [one for one in (left, right) if one.refill.sampler is not None]
    if len(with_sampler) > 1:
        raise InputError("both operands of + have a sampler: give one, to FusedStage or to the first stage")
    first = list(left.sub_stages) if isinstance(left, FusedStage) else [(0, left)]
    if isinstance(right, FusedStage) and right._statuses != tuple(range(len(right.parts))):
        raise InputError(
            f"the right operand of + has statuses of its own {list(right._statuses)}: "
            "give all with FusedStage([(status, stage), ...])"
        )
    start = first[-1][0] + 1
    rest = [(start + i, part) for i, part in enumerate(right.parts)]
    refill = (with_sampler or fused or [left])[0].refill
    sinks = next((one.refill.sinks for one in (left, right) if one.refill.sinks), ())
    limits = [one.n_steps for one in fused if one.n_steps is not None]
    custom = isinstance(left, FusedStage) and left.exit_status != left._statuses[-1] + 1
    found = FusedStage(
        [*first, *rest],
        left.entry_status if isinstance(left, FusedStage) else None,
        max(left.exit_status, rest[-1][0] + 1) if custom else None,
        n_steps=limits[0] if limits else None,
        skin=min(one.skin for one in (left, right)),
        sampler=refill.sampler,
        sinks=sinks,
        refill_frequency=refill.frequency,
        init_fn=next((one.refill.init_fn for one in (left, right) if one.refill.init_fn is not None), None),
    )
    for one in fused:
        for hook in one.hooks:
            found.register_hook(hook)
    return found


def _check(statuses: tuple[int, ...], parts: tuple[BaseDynamics, ...]) -> None:
    if not parts:
        raise InputError("a fused stage needs at least one stage")
    for part in parts:
        if not isinstance(part, BaseDynamics):
            raise InputError(f"a stage must be a dynamics, got {part!r}; fused stages are joined by +")
    if any(a >= b for a, b in pairwise(statuses)) or statuses[0] < 0:
        raise InputError(f"the statuses of the stages must ascend from 0 or more, got {list(statuses)}")
    if len({id(part) for part in parts}) < len(parts):
        raise InputError("the same dynamics is there twice: its state cannot belong to two stages; make two")
    for part in parts[1:]:
        if part.model is not parts[0].model:
            raise InputError(
                f"{type(part).__name__} has another model than {type(parts[0]).__name__}: a fused stage makes one model call a "
                "step; give all stages the same object, or run them one after the other"
            )
    for part in parts:
        if part.n_steps == 0:
            raise InputError(f"{type(part).__name__} has n_steps=0: a stage takes at least one step; leave it out")
    for part in parts[:-1]:
        if not _ends(part):
            raise InputError(
                f"no system ever leaves {type(part).__name__}: give it a convergence_hook or n_steps, "
                "so that the next stage begins"
            )


def _ends(part: BaseDynamics) -> bool:
    return part.n_steps is not None or part.convergence_hook is not None


def name_apart(parts: Sequence[BaseDynamics]) -> None:
    """Stages of one kind keep their states under names of their own."""
    taken: set[str] = set()
    for part in parts:
        name, count = type(part).prefix, 2
        while name in taken:
            name, count = f"{type(part).prefix}{count}", count + 1
        taken.add(name)
        part.prefix = name
