"""Logs, trajectories, checkpoints and the other hooks that come with the package."""

import io
import re

import h5py
import numpy as np
import pytest
import torch
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of, cluster
from rich.console import Console

from carryall.data import read_structures
from carryall.data.units import GPa, kB
from carryall.dynamics import (
    FIRE,
    NVE,
    Checkpoint,
    CSVLog,
    EnergyDriftMonitor,
    ExtXYZTrajectory,
    HDF5Trajectory,
    HookStageEnum,
    LogTable,
    NVTLangevin,
    Outcome,
    ProgressBar,
    WrapPositions,
    initialize_velocities,
    load_checkpoint,
    read_csv_log,
    read_trajectory,
)
from carryall.dynamics.hooks import trajectory_writer
from carryall.errors import InputError


def pair():
    return batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))


def test_the_csv_log_has_names_units_and_a_row_for_each_system(tmp_path):
    path = tmp_path / "log.csv"
    batch = batch_of(argon(1))
    initialize_velocities(batch, 30.0)
    NVE(LennardJones(), 2.0, hooks=[CSVLog(path, interval=5)]).run(batch, 10)
    lines = path.read_text().splitlines()
    assert lines[0] == (
        "step,system_id,time,temperature,potential_energy,kinetic_energy,total_energy,pressure,volume,conserved_energy,"
        "system_step,stage"
    )
    assert lines[1] == ",,fs,K,eV,eV,eV,GPa,Å^3,eV,,"
    table = read_csv_log(path)
    assert table["step"].tolist() == [0, 5, 10]
    np.testing.assert_allclose(table["time"], [0, 10, 20])
    np.testing.assert_allclose(table["total_energy"], table["potential_energy"] + table["kinetic_energy"], atol=1e-9)
    assert np.ptp(table["total_energy"]) < 1e-5
    np.testing.assert_array_equal(table["conserved_energy"], table["total_energy"])
    np.testing.assert_allclose(table["volume"], 5.4**3)
    assert table["system_step"].tolist() == [0, 5, 10]
    assert table["stage"].tolist() == [0, 0, 0]
    # the last state by other means: 3 N - 3 degrees, pressure of kinetic energy and stress
    kinetic = float((batch.masses * batch.velocities.square().sum(1)).sum() / 2)
    assert table["temperature"][-1] == pytest.approx(2 * kinetic / (kB * 9), rel=1e-10)
    trace = float(batch.stress[0].diagonal().sum())
    assert table["pressure"][-1] == pytest.approx((2 * kinetic / 5.4**3 - trace) / 3 / GPa, rel=1e-9)
    NVE(Well(), hooks=[CSVLog(path, interval=4)]).run(pair(), 4)
    assert read_csv_log(path)["system_id"].tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="interval 0"):
        CSVLog(path, interval=0)


def test_the_log_of_a_relaxation_ends_where_each_system_ends(tmp_path):
    path = tmp_path / "log.csv"
    batch = batch_of(cluster(4, 1), cluster(7, 2))
    FIRE(LennardJones(), hooks=[CSVLog(path, 1)], convergence_hook=0.01).run(batch, 500)
    table = read_csv_log(path)
    for index, steps in enumerate(batch.fire_steps.tolist()):
        assert table["step"][table["system_id"] == index].tolist() == list(range(steps + 1))


def test_extended_xyz_frames_can_be_read_back(tmp_path):
    path = tmp_path / "run.extxyz"
    batch = batch_of(argon(1), argon(1, seed=3))
    initialize_velocities(batch, 50.0)
    NVE(LennardJones(), 2.0, hooks=[ExtXYZTrajectory(path, 2)]).run(batch, 4)
    frames = read_structures(path)
    assert [(one.info["step"], one.info["system_id"]) for one in frames] == [(s, i) for s in (0, 2, 4) for i in (0, 1)]
    last = batch.get_data(1)
    assert torch.equal(frames[-1].positions, last.positions)
    assert torch.equal(frames[-1].forces, last.forces)
    torch.testing.assert_close(frames[-1].velocities, last.velocities, atol=1e-14, rtol=1e-14)
    assert torch.equal(frames[-1].stress, last.stress)
    assert float(frames[-1].energy) == float(last.energy)
    assert frames[2].info["time"] == pytest.approx(4.0)


def test_hdf5_frames_can_be_read_back(tmp_path):
    path = tmp_path / "run.h5"
    batch = batch_of(argon(1), cluster(3))
    initialize_velocities(batch, 50.0)
    NVE(LennardJones(), 2.0, hooks=[HDF5Trajectory(path, 3)]).run(batch, 7)
    found = read_trajectory(path)
    assert found.step.tolist() == [0, 3, 6]
    assert found.n_frames == 3
    assert found.system_ids == [0, 1]
    assert found.system(0).positions.shape == (3, 4, 3)
    np.testing.assert_allclose(found.system(1).time, [0, 6, 12])
    one = found.structures(1)
    assert [data.n_atoms for data in one] == [3, 3, 3]
    assert [data.info["system_step"] for data in one] == [0, 3, 6]
    assert one[0].cell is None
    assert found.structures(0)[0].cell is not None
    assert torch.equal(found.structures(0)[0].masses, batch.masses[:4])
    with pytest.raises(InputError, match="no system 7: it has 0, 1"):
        found.system(7)
    assert read_trajectory(path, [1]).system_ids == [1]
    NVE(LennardJones(), 2.0).run(batch, 0)
    again = batch_of(argon(1), cluster(3))
    initialize_velocities(again, 50.0)
    NVE(LennardJones(), 2.0).run(again, 6)
    for index, rows in enumerate((slice(0, 4), slice(4, 7))):
        last = found.system(index)
        np.testing.assert_array_equal(last.positions[-1], again.positions[rows])
        np.testing.assert_array_equal(last.velocities[-1], again.velocities[rows])
        assert last.energy[-1] == again.energy[index]
        np.testing.assert_array_equal(last.cell[-1], again.cell[index])


def test_files_that_are_no_trajectories_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_trajectory(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(InputError, match="cannot be opened as HDF5"):
        read_trajectory(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(InputError, match="is not a trajectory of carryall"):
        read_trajectory(tmp_path / "other.h5")
    with pytest.raises(InputError, match=r"one of .h5, .hdf5, .extxyz, .xyz, .traj"):
        trajectory_writer(tmp_path / "run.dcd")
    with pytest.raises(InputError, match="float16"):
        HDF5Trajectory(tmp_path / "run.h5", dtype="float16")


MAKERS = {
    "nve": lambda hooks: NVE(Well(), 2.0, hooks=hooks),
    "langevin": lambda hooks: NVTLangevin(Well(), seed=3, friction=20.0, hooks=hooks),
    "fire": lambda hooks: FIRE(Well(k=0.1), hooks=hooks, convergence_hook=0.004),
    "lj": lambda hooks: NVTLangevin(LennardJones(), temperature=60.0, hooks=[*hooks, WrapPositions(4)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    def start():
        batch = batch_of(argon(1), argon(1, seed=4)) if name == "lj" else pair()
        batch.info[0]["note"] = {"array": np.arange(3), "odd": object()}
        return batch

    make, suffixes = MAKERS[name], (".csv", ".extxyz", ".h5")

    def reporters(stem):
        log, xyz, h5 = (tmp_path / f"{stem}{suffix}" for suffix in suffixes)
        return [CSVLog(log, 4), ExtXYZTrajectory(xyz, 4), HDF5Trajectory(h5, 4)]

    whole = start()
    make(reporters("whole")).run(whole, 60)
    # A run that is killed at step 33: its last checkpoint is of step 20, its files are further on.
    checkpoint = tmp_path / "state.ckpt"
    make([*reporters("parts"), Checkpoint(checkpoint, 20)]).run(start(), 33)
    with (tmp_path / "parts.csv").open("a") as file:
        file.write("36,0,12.")
    dynamics = make(reporters("parts"))
    batch = load_checkpoint(checkpoint, dynamics)
    assert dynamics.step_count == 20
    dynamics.run(batch, 40)
    assert sorted(batch.keys()) == sorted(whole.keys())
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(batch.get(key), whole.get(key)), key
    for suffix in (".csv", ".extxyz"):
        assert (tmp_path / f"parts{suffix}").read_text() == (tmp_path / f"whole{suffix}").read_text()
    a, b = read_trajectory(tmp_path / "whole.h5"), read_trajectory(tmp_path / "parts.h5")
    assert a.step.tolist() == b.step.tolist()
    assert a.system_ids == b.system_ids == [0, 1]
    for index in a.system_ids:
        for key in ("step", "positions", "velocities", "energy", "time"):
            np.testing.assert_array_equal(getattr(a.system(index), key), getattr(b.system(index), key))
    assert batch.info[0]["note"]["array"].tolist() == [0, 1, 2]


def test_a_restart_makes_no_further_force_call(tmp_path):
    potential = Well()
    dynamics = NVE(potential, hooks=[Checkpoint(tmp_path / "a.ckpt", 2)])
    dynamics.run(pair(), 2)
    potential.n_calls = 0
    again = NVE(potential)
    again.run(load_checkpoint(tmp_path / "a.ckpt", again), 3)
    assert potential.n_calls == 3


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    NVTLangevin(Well(), seed=1, hooks=[Checkpoint(path, 1)]).run(pair(), 1)
    with pytest.raises(InputError, match=r"was saved by NVTLangevin, not by NVE"):
        load_checkpoint(path, NVE(Well()))
    with pytest.raises(InputError, match=r"saved with seed=1, but NVTLangevin has seed=2"):
        load_checkpoint(path, NVTLangevin(Well(), seed=2))
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "b.ckpt", NVE(Well()))
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not a checkpoint"):
        load_checkpoint(path, NVE(Well()))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.ckpt"]


def test_a_trajectory_of_other_systems_is_not_continued(tmp_path):
    path = tmp_path / "run.h5"
    dynamics = NVE(Well(), hooks=[HDF5Trajectory(path, 1)])
    dynamics.run(pair(), 1)
    with pytest.raises(InputError, match="holds another system as number 0"):
        dynamics.run(batch_of(atoms_in_well(4, 1)), 1)


def test_wrapping_changes_neither_forces_nor_energies_and_costs_no_call():
    atoms = argon(2)
    atoms.positions += [30.0, -50.0, 7.0]
    potential, plain = LennardJones(), batch_of(atoms, cluster(4))
    initialize_velocities(plain, 30.0)
    wrapped = plain.clone()
    NVE(potential, 4.0).run(plain, 10)
    potential.n_calls = 0
    dynamics = NVE(potential, 4.0, hooks=[WrapPositions(3)])
    dynamics.run(wrapped, 4)
    dynamics.run(wrapped, 6)
    assert potential.n_calls == 11
    torch.testing.assert_close(wrapped.energy, plain.energy, atol=1e-9, rtol=0)
    fractional = wrapped.positions[:32] @ torch.linalg.inv(wrapped.cell[0])
    assert fractional.min() > -0.01
    assert fractional.max() < 1.01
    torch.testing.assert_close(wrapped.positions[32:], plain.positions[32:], atol=1e-9, rtol=0)


def test_wrapping_a_slab_leaves_the_open_axis_alone():
    atoms = argon(1)
    atoms.positions += [30.0, -50.0, 70.0]
    atoms.pbc = (True, True, False)
    atoms.cell[2] = 0
    batch = batch_of(atoms)
    before = batch.positions.clone()
    NVE(LennardJones(), hooks=[WrapPositions()]).run(batch, 1)
    assert (batch.positions[:, :2] >= -0.01).all()
    assert (batch.positions[:, :2] < 5.5).all()
    torch.testing.assert_close(batch.positions[:, 2], before[:, 2], atol=0.01, rtol=0)


def test_energy_that_drifts_sets_a_system_aside():
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))
    monitor = EnergyDriftMonitor(interval=1, max_drift=0.05)
    NVE(Well(k=20.0), timestep=[1.0, 15.0], hooks=[monitor]).run(batch, 30)
    assert batch.outcome.tolist() == [Outcome.RUNNING, Outcome.FAILED]
    assert "total energy drifted" in batch.info[1]["failure"]
    assert float(monitor.drift[0].abs()) < 0.01
    with pytest.raises(InputError, match="max_drift"):
        EnergyDriftMonitor(max_drift=0.0)


def test_table_and_bar_speak_at_a_terminal_only():
    loud, quiet = (Console(file=io.StringIO(), force_terminal=flag, width=120) for flag in (True, False))
    for console in (loud, quiet):
        hooks = [LogTable(5, console), ProgressBar("NVE", console)]
        NVE(Well(), hooks=hooks).run(pair(), 10)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", loud.file.getvalue())
    assert "T/K" in text
    assert re.search(r"\s5 +0 +5\.00 ", text)
    assert re.search(r"\s5 +1 +5\.00 ", text)
    assert "10/10" in text
    assert "2 of 2 systems running" in text
    assert quiet.file.getvalue() == ""


def test_a_hook_at_the_event_knows_who_converged(tmp_path):
    seen = []

    def note(batch, dynamics):
        seen.extend(batch.system_id[dynamics.newly_converged].tolist())

    note.stages, note.frequency = (HookStageEnum.ON_CONVERGE,), 1
    FIRE(LennardJones(), hooks=[note], convergence_hook=0.01).run(batch_of(cluster(4), cluster(5)), 300)
    assert sorted(seen) == [0, 1]
