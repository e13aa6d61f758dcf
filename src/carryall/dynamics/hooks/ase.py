"""Trajectories as ASE writes them (.traj). The only hook that imports ASE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryall.data.ase import import_ase
from carryall.data.batch import Batch
from carryall.dynamics.hooks.measures import REPORT_STAGES, SystemInterval, continues, frames
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.dynamics.engine import Engine

PLACE = "{system_id}"


class ASETrajectory:
    """Frames of the running systems, each every `interval` of its steps, in a .traj file of its own for each system.

    A name with "{system_id}" in it, such as "md-{system_id}.traj", is one file for each system. A name without is one file for
    one system: that of `system_id`, or the only one that there is. Frames have energy, forces, stress, momenta, and in `info`
    what `ExtXYZTrajectory` writes into its comment. Begun anew or gone on with as `CSVLog` is. Needs ASE.
    """

    stages = REPORT_STAGES
    frequency = 1

    def __init__(self, path: str | Path, interval: int = 10, system_id: int | None = None) -> None:
        import_ase()
        self.path, self.system_id = Path(path), system_id
        if system_id is not None and PLACE in self.path.name:
            raise InputError(f"{path} is one file for each system: give no system_id, or a name without {PLACE}")
        self._interval = SystemInterval(interval, "ASETrajectory")
        self._last: dict[int, int] = {}
        """Step of the last frame in the file of each system."""

    def __call__(self, batch: Batch, dynamics: Engine) -> None:
        """Write frames when they are due."""
        systems = self._interval.due(batch, dynamics)
        for data in frames(batch, dynamics, systems) if systems else ():
            name = int(data.info["system_id"])
            if self.system_id is not None and name != self.system_id:
                continue
            path = self._path_of(name)
            step = int(data.info["step"])
            began = name in self._last
            if not began:
                self._last[name] = _trim(path, dynamics.step_count) if continues(path, dynamics, False) else -1
                if self._last[name] < 0:
                    path.unlink(missing_ok=True)
            # a resumed file holds the frame of the checkpoint already
            if began or step > self._last[name]:
                _append(path, data.to_ase())
                self._last[name] = step

    def _path_of(self, name: int) -> Path:
        if PLACE in self.path.name:
            return self.path.with_name(self.path.name.replace(PLACE, str(name)))
        if self.system_id is None and self._last and name not in self._last:
            raise InputError(
                f"{self.path} takes one system, but there are systems {next(iter(self._last))} and {name}: name it like "
                f"{self.path.stem}-{PLACE}{self.path.suffix} for a file each, or choose one by system_id"
            )
        return self.path


def _append(path: Path, atoms: Any) -> None:
    from ase.io.trajectory import Trajectory

    # opened for each frame: systems in flight may be more than files may be open
    with Trajectory(path, "a" if path.exists() else "w") as file:
        file.write(atoms)


def _trim(path: Path, step: int) -> int:
    """Drop frames after `step`; returns the last step that is left, -1 for none."""
    from ase.io.trajectory import Trajectory

    try:
        with Trajectory(path, "r") as file:
            images = list(file)
    except Exception as error:  # ASE raises whatever its parsing meets
        raise InputError(f"{path} cannot be gone on with: ASE cannot read it ({error}): give another name") from None
    kept = [atoms for atoms in images if int(atoms.info.get("step", step + 1)) <= step]
    if len(kept) < len(images):
        temporary = path.with_name(f".{path.name}.new")
        with Trajectory(temporary, "w") as file:
            for atoms in kept:
                file.write(atoms)
        temporary.replace(path)
    return int(kept[-1].info["step"]) if kept else -1
