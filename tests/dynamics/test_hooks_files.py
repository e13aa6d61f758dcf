"""Trajectory files: older versions, writers that are killed, ASE's format; and what hooks cost when they are not due."""

import subprocess
import sys
import time
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of, cluster

from carryall.dynamics import (
    NVE,
    Checkpoint,
    CSVLog,
    EnergyDriftMonitor,
    ExtXYZTrajectory,
    HDF5Trajectory,
    HookStageEnum,
    LogTable,
    NVTLangevin,
    ProgressBar,
    initialize_velocities,
    load_checkpoint,
    read_trajectory,
)
from carryall.dynamics.hooks import trajectory_writer
from carryall.dynamics.hooks.ase import ASETrajectory
from carryall.errors import InputError


def pair():
    return batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))


def write_first_version(path, steps=(0, 5)):
    """A file as version 1 was written: two systems of 3 and 2 atoms in every frame."""
    rng = np.random.default_rng(0)
    values = {
        "atomic_numbers": np.array([18] * 5),
        "ptr": np.array([0, 3, 5]),
        "pbc": np.zeros((2, 3), dtype=bool),
        "masses": np.full(5, 39.948),
        "system_id": np.array([4, 9]),
        "positions": rng.normal(size=(len(steps), 5, 3)),
        "velocities": rng.normal(size=(len(steps), 5, 3)),
        "cell": np.zeros((len(steps), 2, 3, 3)),
        "energy": rng.normal(size=(len(steps), 2)),
        "time": 2.0 * np.array(steps)[:, None] * np.ones(2),
        "step": np.array(steps),
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "carryall-trajectory", "version": 1})
        for key, value in values.items():
            file[key] = value
    return values


def test_files_of_the_first_version_are_read(tmp_path):
    path = tmp_path / "old.h5"
    values = write_first_version(path)
    found = read_trajectory(path)
    assert found.step.tolist() == [0, 5]
    assert found.system_ids == [4, 9]
    one = found.system(9)
    np.testing.assert_array_equal(one.positions, values["positions"][:, 3:])
    np.testing.assert_array_equal(one.velocities, values["velocities"][:, 3:])
    np.testing.assert_array_equal(one.energy, values["energy"][:, 1])
    np.testing.assert_array_equal(one.time, [0, 10])
    assert [data.n_atoms for data in one.structures()] == [2, 2]
    assert read_trajectory(path, {4}).system_ids == [4]
    dynamics = NVE(Well(), hooks=[HDF5Trajectory(path, 1)])
    dynamics._steps = 3
    with pytest.raises(InputError, match="of an older version, which is not gone on with"):
        dynamics.run(pair(), 1)


def test_a_version_to_come_is_refused(tmp_path):
    path = tmp_path / "new.h5"
    write_first_version(path)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 3
    with pytest.raises(InputError, match=r"not a trajectory of carryall \(version 2 or older\)"):
        read_trajectory(path)


def test_single_precision_halves_the_file_and_keeps_energies(tmp_path):
    found = {}
    for dtype in ("float64", "float32"):
        path = tmp_path / f"{dtype}.h5"
        NVE(Well(), hooks=[HDF5Trajectory(path, 1, dtype)]).run(pair(), 3)
        found[dtype] = read_trajectory(path).system(0)
    assert found["float32"].positions.dtype == np.float32
    np.testing.assert_allclose(found["float32"].positions, found["float64"].positions, atol=1e-6)
    np.testing.assert_array_equal(found["float32"].energy, found["float64"].energy)


def test_a_trajectory_can_be_read_while_it_is_written(tmp_path):
    path, seen = tmp_path / "a.h5", []

    class Reader:
        stage, frequency = HookStageEnum.AFTER_STEP, 1

        def __call__(self, batch, dynamics):
            seen.append(read_trajectory(path).step.tolist())

    NVE(Well(), hooks=[HDF5Trajectory(path, 2), Reader()]).run(pair(), 4)
    assert seen == [[0], [0, 2], [0, 2], [0, 2, 4]]
    with h5py.File(path, "r") as file:
        assert file["committed"][0] == len(file["step"]) == 3


KILLED = """
import sys
sys.path.insert(0, {samples!r})
import torch
torch.set_num_threads(1)
from dynamics_samples import Well, atoms_in_well, batch_of
from carryall.dynamics import NVTLangevin, HDF5Trajectory, CSVLog, ExtXYZTrajectory, Checkpoint
folder = {folder!r}
hooks = [HDF5Trajectory(folder + "/a.h5", 1), CSVLog(folder + "/a.csv", 1), ExtXYZTrajectory(folder + "/a.extxyz", 1),
         Checkpoint(folder + "/a.ckpt", 7)]
NVTLangevin(Well(), seed=2, hooks=hooks).run(batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2)), 10**9)
"""


def test_files_of_a_run_that_was_killed_are_read_and_gone_on_with(tmp_path):
    code = KILLED.format(samples=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (tmp_path / "a.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    before = read_trajectory(tmp_path / "a.h5")
    assert before.n_frames > 7

    def hooks(stem):
        files = [tmp_path / f"{stem}{suffix}" for suffix in (".h5", ".csv", ".extxyz")]
        return [make(path, 1) for make, path in zip((HDF5Trajectory, CSVLog, ExtXYZTrajectory), files, strict=True)]

    dynamics = NVTLangevin(Well(), seed=2, hooks=hooks("a"))
    batch = load_checkpoint(tmp_path / "a.ckpt", dynamics)
    step = dynamics.step_count
    assert step % 7 == 0
    dynamics.run(batch, 12)
    NVTLangevin(Well(), seed=2, hooks=hooks("whole")).run(pair(), step + 12)
    a, b = read_trajectory(tmp_path / "a.h5"), read_trajectory(tmp_path / "whole.h5")
    assert a.step.tolist() == b.step.tolist() == list(range(step + 13))
    for index in (0, 1):
        np.testing.assert_array_equal(a.system(index).positions, b.system(index).positions)
        np.testing.assert_array_equal(a.system(index).velocities, b.system(index).velocities)
    for suffix in (".csv", ".extxyz"):
        assert (tmp_path / f"a{suffix}").read_text() == (tmp_path / f"whole{suffix}").read_text()


def moving(*structures):
    batch = batch_of(*structures)
    initialize_velocities(batch, 50.0)
    return batch


def test_ase_reads_one_file_for_each_system(tmp_path):
    batch = moving(argon(1), cluster(3))
    name = tmp_path / "md-{system_id}.traj"
    NVE(LennardJones(), 2.0, hooks=[trajectory_writer(name, 2)]).run(batch, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["md-0.traj", "md-1.traj"]
    images = ase.io.read(tmp_path / "md-0.traj", ":")
    assert [atoms.info["step"] for atoms in images] == [0, 2, 4]
    assert [atoms.info["time"] for atoms in images] == pytest.approx([0, 4, 8])
    again = moving(argon(1), cluster(3))
    NVE(LennardJones(), 2.0).run(again, 4)
    np.testing.assert_array_equal(images[-1].positions, again.positions[:4])
    np.testing.assert_allclose(images[-1].get_velocities(), again.velocities[:4], atol=1e-14)
    assert images[-1].get_potential_energy() == float(again.energy[0])
    np.testing.assert_array_equal(images[-1].get_forces(), again.forces[:4])
    np.testing.assert_allclose(images[-1].get_stress(voigt=False), again.stress[0], atol=1e-15)
    other = ase.io.read(tmp_path / "md-1.traj", ":")
    assert not other[0].cell.any()
    assert len(other) == 3


def test_ase_has_one_file_for_one_system(tmp_path):
    NVE(Well(), hooks=[ASETrajectory(tmp_path / "a.traj", 1)]).run(batch_of(atoms_in_well(3, 1)), 2)
    assert len(ase.io.read(tmp_path / "a.traj", ":")) == 3
    NVE(Well(), hooks=[ASETrajectory(tmp_path / "b.traj", 1, system_id=1)]).run(pair(), 2)
    assert [len(atoms) for atoms in ase.io.read(tmp_path / "b.traj", ":")] == [2, 2, 2]
    with pytest.raises(InputError, match=r"takes one system, but there are systems 0 and 1: name it like c-{system_id}.traj"):
        NVE(Well(), hooks=[ASETrajectory(tmp_path / "c.traj")]).run(pair(), 2)
    with pytest.raises(InputError, match="one file for each system: give no system_id"):
        ASETrajectory(tmp_path / "c-{system_id}.traj", system_id=1)


def test_ases_files_are_gone_on_with_after_a_restart(tmp_path):
    def hooks(stem):
        return [ASETrajectory(tmp_path / (stem + "-{system_id}.traj"), 2)]

    NVE(Well(), 2.0, hooks=hooks("whole")).run(pair(), 12)
    NVE(Well(), 2.0, hooks=[*hooks("parts"), Checkpoint(tmp_path / "a.ckpt", 4)]).run(pair(), 7)
    dynamics = NVE(Well(), 2.0, hooks=hooks("parts"))
    batch = load_checkpoint(tmp_path / "a.ckpt", dynamics)
    dynamics.run(batch, 8)
    for index in (0, 1):
        a, b = (ase.io.read(tmp_path / f"{stem}-{index}.traj", ":") for stem in ("whole", "parts"))
        assert [one.info["step"] for one in a] == [one.info["step"] for one in b] == list(range(0, 13, 2))
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one.positions, other.positions)
    # a run that begins anew begins the files anew
    NVE(Well(), 2.0, hooks=hooks("parts")).run(pair(), 2)
    assert len(ase.io.read(tmp_path / "parts-0.traj", ":")) == 2
    (tmp_path / "parts-0.traj").write_text("nonsense")
    again = NVE(Well(), 2.0, hooks=hooks("parts"))
    batch = load_checkpoint(tmp_path / "a.ckpt", again)
    with pytest.raises(InputError, match="ASE cannot read it"):
        again.run(batch, 8)


def test_a_log_with_other_columns_is_not_gone_on_with(tmp_path):
    path = tmp_path / "log.csv"
    NVE(Well(), hooks=[CSVLog(path, 1), Checkpoint(tmp_path / "a.ckpt", 2)]).run(pair(), 2)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rsplit(",", 4)[0] for line in lines) + "\n")
    dynamics = NVE(Well(), hooks=[CSVLog(path, 1)])
    with pytest.raises(InputError, match="has other columns"):
        dynamics.run(load_checkpoint(tmp_path / "a.ckpt", dynamics), 2)


@pytest.mark.parametrize("kind", ["csv", "extxyz", "hdf5", "ase", "table", "bar", "drift", "checkpoint"])
def test_a_hook_that_is_not_due_costs_less_than_two_microseconds(kind, tmp_path):
    path = tmp_path / "file"
    hook = {
        "csv": lambda: CSVLog(path, 1000),
        "extxyz": lambda: ExtXYZTrajectory(path, 1000),
        "hdf5": lambda: HDF5Trajectory(path, 1000),
        "ase": lambda: ASETrajectory(tmp_path / "{system_id}.traj", 1000),
        "table": lambda: LogTable(1000),
        "bar": lambda: ProgressBar(),
        "drift": lambda: EnergyDriftMonitor(1000),
        "checkpoint": lambda: Checkpoint(path, 1000),
    }[kind]()
    dynamics, batch = NVE(Well(), hooks=[hook]), batch_of(*(atoms_in_well(2, seed) for seed in range(300)))
    dynamics.run(batch, 1)
    if hasattr(hook, "_opened"):
        hook(batch, dynamics)
    dynamics._completed = 1

    def cost():
        began = time.perf_counter()
        for _ in range(200):
            hook(batch, dynamics)
        return (time.perf_counter() - began) / 200

    assert min(cost() for _ in range(200)) < 2e-6
    if hasattr(hook, "close"):
        hook.close()
