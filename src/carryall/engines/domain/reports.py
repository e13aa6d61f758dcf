"""What a run over ranks writes: sums by all ranks, files by rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.engine import Engine
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.checkpoint import save_checkpoint
from carryall.dynamics.hooks.csv_log import CSVLog
from carryall.dynamics.hooks.measures import REPORT_STAGES, Interval, measured
from carryall.dynamics.hooks.trajectory import trajectory_writer
from carryall.engines.domain.system import evaluator_of, gather
from carryall.exchange.transport import agree


class SharedLog:
    """`CSVLog` of a system over ranks: its quantities are sums of all of them, which rank 0 writes."""

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: Path, interval: int, rank: int) -> None:
        self._interval = Interval(interval, "SharedLog")
        self._log = CSVLog(path, interval) if rank == 0 else None

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Write a row when it is due."""
        if not self._interval.due(dynamics):
            return
        # measured on every rank: whether rank 0 has written the row already, before a restart, only that knows
        values = measured(batch, dynamics)
        if self._log is not None and (systems := self._log.due(batch, dynamics)):
            self._log.write(values, systems)

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()


class Gathered:
    """Calls a hook of rank 0 with the whole system, every `interval` steps: for frames of a trajectory."""

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, make: Callable[[], Any], interval: int, rank: int) -> None:
        self._interval = Interval(interval, "Gathered")
        self._hook = make() if rank == 0 else None

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Gather the system and call the hook when it is due."""
        if not self._interval.due(dynamics):
            return
        with_whole(batch, dynamics, lambda whole: self._hook(whole, dynamics) if self._hook is not None else None)

    def close(self) -> None:
        """Close the hook."""
        if hasattr(self._hook, "close"):
            self._hook.close()  # type: ignore[union-attr]


class SharedCheckpoint:
    """Saves the whole system every `interval` steps, as `Checkpoint` does: any number of ranks can go on from it, or none."""

    stage = HookStageEnum.AFTER_STEP
    frequency = 1

    def __init__(self, path: Path, interval: int, extra: Mapping[str, Any]) -> None:
        self.path, self.extra = path, dict(extra)
        self._interval = Interval(interval, "SharedCheckpoint")

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Save when it is due."""
        if self._interval.due(dynamics):
            save_whole(self.path, batch, dynamics, self.extra)


def shared_trajectory(path: Path, interval: int, rank: int) -> Gathered:
    """The trajectory hook for a file name, on the whole system."""
    return Gathered(lambda: trajectory_writer(path, interval), interval, rank)


def save_whole(path: Path, batch: Batch, dynamics: Engine, extra: Mapping[str, Any]) -> None:
    """A checkpoint of the whole system, written by rank 0; all ranks return when it is there. Collective."""
    with_whole(batch, dynamics, lambda whole: save_checkpoint(path, whole, dynamics, extra))


def with_whole(batch: Batch, dynamics: Engine, do: Callable[[Batch], None]) -> None:
    """Do something with the whole system on rank 0; what fails there fails on all ranks. Collective."""
    assert isinstance(dynamics, BaseDynamics)
    evaluator = evaluator_of(dynamics)
    whole, failure = gather(batch, dynamics), None
    evaluator.vouch_for(whole if evaluator.is_current(batch) else None)
    try:
        if whole is not None:
            do(whole)
    except Exception as error:
        failure = error
    evaluator.vouch_for(None)
    agree(evaluator.group.transport, None if failure is None else str(failure) or type(failure).__name__)
