"""Where the time of a step goes: wall time between the points of a step, and torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import get_console
from rich.console import Console
from rich.table import Table

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

STEP_STAGES = tuple(stage for stage in HookStageEnum if stage is not HookStageEnum.ON_CONVERGE)


@dataclass
class Span:
    """Time between two points of a step."""

    count: int = 0
    total: float = 0.0
    """s."""
    longest: float = 0.0
    """s."""

    @property
    def mean(self) -> float:
        """s."""
        return self.total / self.count if self.count else 0.0


class StageTiming:
    """Wall time from each point of a step to the next, as a table at the end of a run at a terminal, and by `summary()`.

    The time from AFTER_STEP to BEFORE_STEP is that of the convergence check, and of a refill in flight. Register it last, so
    that the other hooks at a point count to the span that ends there. synchronize: wait for the GPU at each point, without
    which work that it still does counts to a later span; slower. stages: the points to note, all by default.
    """

    frequency = 1

    def __init__(
        self,
        stages: Iterable[HookStageEnum] = STEP_STAGES,
        synchronize: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stages = tuple(stages)
        if len(self.stages) < 2 or not set(self.stages) <= set(STEP_STAGES):
            raise InputError("StageTiming needs at least two stages, and none of ON_CONVERGE, which belongs to no step")
        self.synchronize, self._console, self._clock = synchronize, console, clock
        self._spans: dict[tuple[str, str], Span] = {}
        self._last: tuple[str, float] | None = None

    def __enter__(self) -> StageTiming:
        self._last = None
        return self

    def __exit__(self, *_: object) -> None:
        console = self._console or get_console()
        if console.is_terminal and self._spans:
            console.print(self.table())

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Note the time."""
        if self.synchronize and batch.device.type == "cuda":
            torch.cuda.synchronize(batch.device)
        now, stage = self._clock(), dynamics.current_hook_stage
        assert stage is not None
        if self._last is not None:
            key = (self._last[0], stage.name)
            span = self._spans.get(key)
            if span is None:
                span = self._spans[key] = Span()
            passed = now - self._last[1]
            span.count += 1
            span.total += passed
            span.longest = max(span.longest, passed)
        self._last = (stage.name, now)

    def summary(self) -> dict[tuple[str, str], Span]:
        """By the two points of each span, in the order of a step."""
        places = {stage.name: stage.value for stage in HookStageEnum}
        return dict(sorted(self._spans.items(), key=lambda item: (places[item[0][0]], places[item[0][1]])))

    def table(self) -> Table:
        """The summary for a person."""
        found, whole = Table(title="time between the points of a step"), sum(one.total for one in self._spans.values())
        for name in ("from", "to", "times", "total/s", "mean/ms", "longest/ms", "share"):
            found.add_column(name, justify="left" if name in ("from", "to") else "right")
        for (start, end), one in self.summary().items():
            share = f"{100 * one.total / whole:.1f} %" if whole else "-"
            numbers = (f"{one.total:.3f}", f"{1e3 * one.mean:.3f}", f"{1e3 * one.longest:.3f}", share)
            found.add_row(start, end, str(one.count), *numbers)
        return found


class Profiler:
    """torch.profiler over some steps, written to `path` as a Chrome trace.

    The first `wait` steps pass, the next `warmup` are recorded but not kept, the next `active` are. Open the file in
    chrome://tracing or https://ui.perfetto.dev. A run that ends before is written as far as it came, when at least one active
    step was done. with_stack: source lines too, slower.
    """

    stages = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_STEP)
    frequency = 1

    def __init__(self, path: str | Path, wait: int = 1, warmup: int = 1, active: int = 3, with_stack: bool = False) -> None:
        for name, value, least in (("wait", wait, 0), ("warmup", warmup, 0), ("active", active, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} of Profiler must be a whole number of at least {least}, got {value!r}")
        self.path = Path(path)
        self.wait, self.warmup, self.active, self.with_stack = wait, warmup, active, with_stack
        self._profile: Any = None
        self._steps = 0

    def __enter__(self) -> Profiler:
        self._steps = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Begin or end what is recorded."""
        if self._steps >= self.wait + self.warmup + self.active:
            return
        if dynamics.current_hook_stage is not HookStageEnum.BEFORE_STEP:
            self._steps += 1
            if self._steps == self.wait + self.warmup + self.active:
                self._stop()
        elif self._profile is not None:
            self._profile.step()
        elif self._steps == self.wait:
            self._start(batch)

    def _start(self, batch: Batch) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if batch.device.type == "cuda" else []
        plan = torch.profiler.schedule(wait=0, warmup=self.warmup, active=self.active, repeat=1)
        self._profile = torch.profiler.profile(activities=kinds, schedule=plan, with_stack=self.with_stack)
        self._profile.start()

    def _stop(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        if self._steps > self.wait + self.warmup:
            profile.export_chrome_trace(str(self.path))
