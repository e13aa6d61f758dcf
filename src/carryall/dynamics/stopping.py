"""Ends a run between two steps when Ctrl-C or SIGTERM has come: the state is whole then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from carryall.data.batch import Batch
from carryall.dynamics.hooks.base import HookStageEnum

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine


class StopRequested(KeyboardInterrupt):
    """Raised between two steps: the state is whole."""


class StopOnRequest:
    """Raises StopRequested before a step when one is wanted; the step before is complete."""

    stage = HookStageEnum.BEFORE_STEP
    frequency = 1

    def __init__(self, requested: Callable[[], bool]) -> None:
        self._requested = requested

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Raise StopRequested when it is wanted."""
        if self._requested():
            raise StopRequested
