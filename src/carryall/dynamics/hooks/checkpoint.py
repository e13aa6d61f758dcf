"""Checkpoints: the whole state of a run in one file, from which it goes on bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.fields import LEVELS
from carryall.data.levels import Columns
from carryall.dynamics.hooks.base import HookStageEnum
from carryall.dynamics.hooks.measures import Interval
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

FORMAT, VERSION = "carryall-dynamics-checkpoint", 1


class Checkpoint:
    """Saves the state every `interval` steps; register it last, so that it sees what the other hooks did to the step.

    Stages in a row are saved as a whole: register it with the fused stage. In flight the file holds the systems that are on
    their way; those that are done are in the sinks.
    """

    stage = HookStageEnum.AFTER_STEP
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 1000, extra: Mapping[str, Any] | None = None) -> None:
        self.path, self.extra = Path(path), dict(extra or {})
        self._interval = Interval(interval, "Checkpoint")

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Save when it is due."""
        if not self._interval.due(dynamics):
            return
        if dynamics.host is not dynamics:
            raise InputError(
                f"{self.path}: {type(dynamics).__name__} is a stage of a {type(dynamics.host).__name__}, whose state is saved "
                "as a whole: register the Checkpoint there, by register_fused_hook"
            )
        save_checkpoint(self.path, batch, dynamics, self.extra)


@dataclass(frozen=True, eq=False)
class SavedState:
    """What a checkpoint holds."""

    batch: Batch
    step_count: int
    dynamics: str
    """Class name."""
    settings: dict[str, Any]
    forces_current: bool
    extra: dict[str, Any]


def save_checkpoint(path: str | Path, batch: Batch, dynamics: Engine, extra: Mapping[str, Any] | None = None) -> None:
    """Write the batch with all its keys, and the dynamics' settings and step; the file appears only when complete."""
    path = Path(path)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dynamics": type(dynamics).__name__,
        "settings": _settings(dynamics),
        "step_count": dynamics.completed_steps,
        "forces_current": dynamics.forces_are_current(batch),
        "values": {level: {key: batch.get(key) for key in batch.keys(level)} for level in LEVELS},
        "atom_counts": batch.atom_counts,
        "edge_counts": batch.edge_counts,
        "info": plain(batch.info),
        "extra": plain(dict(extra or {})),
    }
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> SavedState:
    """The state in a checkpoint; only tensors and plain values are read, nothing in the file is run."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises whatever its parsing meets
        raise InputError(f"{path} is not a checkpoint: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version", 0) > VERSION:
        raise InputError(f"{path} is not a checkpoint of dynamics (version {VERSION} or older)")
    atoms, edges = (np.array(content[name], dtype=np.int64) for name in ("atom_counts", "edge_counts"))
    batch = Batch(Columns(atoms, edges, content["values"], content["info"]))
    names = ("step_count", "dynamics", "settings", "forces_current", "extra")
    return SavedState(batch, **{name: content[name] for name in names})


def load_checkpoint(path: str | Path, dynamics: Engine) -> Batch:
    """The batch of a checkpoint, with `dynamics` brought to its step: `dynamics.run(batch, n)` goes on from there.

    InputError when the dynamics is of another kind or has other settings than the one that was saved.
    """
    saved = read_checkpoint(path)
    if saved.dynamics != type(dynamics).__name__:
        raise InputError(f"{path} was saved by {saved.dynamics}, not by {type(dynamics).__name__}")
    settings = _settings(dynamics)
    for name in sorted(settings.keys() | saved.settings.keys()):
        if settings.get(name) != saved.settings.get(name):
            raise InputError(
                f"{path} was saved with {name}={saved.settings.get(name)}, but {type(dynamics).__name__} has "
                f"{name}={settings.get(name)}: give the same, or start anew from the structures"
            )
    dynamics.restore(saved.batch, saved.step_count, saved.forces_current)
    return saved.batch


def _settings(dynamics: Engine) -> dict[str, Any]:
    """What has to be the same when a run goes on."""
    held = [[type(one).__name__ for one in part.constraints] for part in dynamics.parts]
    return plain(dynamics.describe()) | ({"constraints": held} if any(held) else {})


def plain(value: Any) -> Any:
    """Values that a checkpoint can hold: numbers, texts, tensors, and lists and dicts of them; anything else as its text."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(one) for one in value]
    return str(value)
