"""What a hook is, when it fires, and how hooks are opened and closed around a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from carryall.data.batch import Batch
from carryall.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from carryall.dynamics.engine import Engine


class HookStageEnum(Enum):
    """Points of a step, in the order in which they are passed."""

    BEFORE_STEP = 0
    BEFORE_PRE_UPDATE = 1
    AFTER_PRE_UPDATE = 2
    BEFORE_COMPUTE = 3
    AFTER_COMPUTE = 4
    BEFORE_POST_UPDATE = 5
    AFTER_POST_UPDATE = 6
    AFTER_STEP = 7
    ON_CONVERGE = 8


class Hook(Protocol):
    """A callable with a `stage` (or several `stages`) and a `frequency`.

    It fires at its stages whenever `dynamics.step_count % frequency == 0`; at ON_CONVERGE on every event. A hook that is a
    context manager is entered once when a run begins and left once when it ends, also on an exception; one with only `close()`
    is closed then. A hook that changes forces has `on_forces(batch, dynamics, mask)`, called after every evaluation, the one
    before the first step too, with the systems (None: all) that were evaluated; it may have no stages.
    """

    stage: HookStageEnum
    frequency: int

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Do the work; the batch may be changed."""
        ...


def stages_of(hook: Any) -> tuple[HookStageEnum, ...]:
    """The stages at which a hook fires; InputError names a hook without any."""
    stages = getattr(hook, "stages", None)
    if stages is None:
        stages = (getattr(hook, "stage", None),)
    found = tuple(stages)
    for stage in found:
        if not isinstance(stage, HookStageEnum):
            names = [one.name for one in HookStageEnum]
            hint = nearest(str(stage).upper(), names)
            raise InputError(
                f"hook {name_of(hook)} has stage {stage!r}: give it a `stage` of HookStageEnum ({', '.join(names)}){hint}"
            )
    if not found and not hasattr(hook, "on_forces"):
        raise InputError(f"hook {name_of(hook)} has no stages, so that it would never fire")
    return found


def name_of(hook: Any) -> str:
    """How messages call a hook."""
    return getattr(hook, "__name__", None) or type(hook).__name__


def check_hook(hook: Any) -> None:
    """InputError unless the hook is callable, has stages, and a frequency that is a positive integer."""
    if not callable(hook):
        raise InputError(f"hook {hook!r} is not callable: a hook is called with (batch, dynamics)")
    stages_of(hook)
    frequency = getattr(hook, "frequency", 1)
    if isinstance(frequency, bool) or not isinstance(frequency, int) or frequency < 1:
        raise InputError(f"hook {name_of(hook)} has frequency {frequency!r}: expected an integer of at least 1")


class HookRegistry:
    """Hooks by stage, in the order of registration."""

    def __init__(self) -> None:
        self._by_stage: dict[HookStageEnum, list[Any]] = {stage: [] for stage in HookStageEnum}
        self._all: list[Any] = []
        self._of_forces: list[Any] = []

    def add(self, hook: Any) -> None:
        """Register a hook at its stages."""
        check_hook(hook)
        for stage in stages_of(hook):
            self._by_stage[stage].append(hook)
        if not any(hook is known for known in self._all):
            self._all.append(hook)
            if hasattr(hook, "on_forces"):
                self._of_forces.append(hook)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def shape_forces(self) -> bool:
        """Whether a hook changes forces."""
        return bool(self._of_forces)

    def on_forces(self, batch: Batch, dynamics: Engine, mask: Tensor | None) -> None:
        """Let hooks change the forces that were evaluated, at the first evaluation too, in the order of registration."""
        for hook in self._of_forces:
            hook.on_forces(batch, dynamics, mask)

    def waits_for(self, stage: HookStageEnum) -> bool:
        """Whether any hook fires at this stage."""
        return bool(self._by_stage[stage])

    def due(self, stage: HookStageEnum, step_count: int) -> Iterable[Any]:
        """Hooks to call now."""
        hooks = self._by_stage[stage]
        if stage is HookStageEnum.ON_CONVERGE:
            return list(hooks)
        return [hook for hook in hooks if step_count % getattr(hook, "frequency", 1) == 0]


@contextmanager
def entered(hooks: Iterable[Any]) -> Iterator[None]:
    """Enter each hook once, in order; leave in reverse order, also when a later one fails to enter."""
    known: list[Any] = []
    with ExitStack() as stack:
        for hook in hooks:
            if any(hook is one for one in known):
                continue
            known.append(hook)
            if hasattr(hook, "__enter__") and hasattr(hook, "__exit__"):
                stack.enter_context(hook)
            elif hasattr(hook, "close"):
                stack.callback(hook.close)
        yield
