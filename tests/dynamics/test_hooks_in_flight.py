"""Hooks where systems come and go, and on the stages of a fused stage."""

import io
import re

import numpy as np
import pytest
import torch
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of, cluster
from rich.console import Console

from carryall.data import AtomicData, read_structures
from carryall.data.units import kB
from carryall.dynamics import (
    FIRE,
    NVE,
    Checkpoint,
    CSVLog,
    EnergyDriftMonitor,
    ExtXYZTrajectory,
    ForceGuard,
    HDF5Trajectory,
    HookStageEnum,
    LogTable,
    MemorySink,
    NVTLangevin,
    Outcome,
    ProgressBar,
    SizeAwareSampler,
    WrapPositions,
    initialize_velocities,
    load_checkpoint,
    read_csv_log,
    read_trajectory,
)
from carryall.dynamics.constraints import FixAtoms, FixCenterOfMass, FixSymmetry
from carryall.dynamics.hooks import BiasPotential, FreezeAtoms
from carryall.dynamics.thermo import kinetic_energy
from carryall.errors import InputError

SIZES = (4, 7, 3, 5, 2, 6, 4, 3)


def structures():
    # some far from their minimum, some near, so that they take different numbers of steps
    return [cluster(n, seed, spread=3.4 if seed % 2 else 3.7) for seed, n in enumerate(SIZES)]


def in_flight(hooks=(), make=FIRE, max_atoms=12, **options):
    """All structures through a batch that holds few of them at a time; what is in the sink by id."""
    sampler = SizeAwareSampler(structures(), max_atoms=max_atoms)
    engine = make(LennardJones(), sampler=sampler, hooks=hooks, refill_frequency=3, **options)
    found = engine.run()
    assert found.get("system_id").tolist() == list(range(len(SIZES)))
    return engine, found


def alone(index, n_steps):
    """Positions of one structure after each step of its own relaxation."""
    batch, seen = batch_of(structures()[index]), []

    def note(batch, dynamics):
        seen.append(batch.positions.clone())

    note.stages, note.frequency = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_STEP), 1
    dynamics = FIRE(LennardJones(), hooks=[note], convergence_hook=0.02)
    dynamics.run(batch, n_steps)
    return [structures()[index].positions, *seen[1::2]]


def test_files_in_flight_have_every_system_as_it_goes_alone(tmp_path):
    xyz, h5, log = tmp_path / "a.extxyz", tmp_path / "a.h5", tmp_path / "a.csv"
    hooks = [ExtXYZTrajectory(xyz, 2), HDF5Trajectory(h5, 2), CSVLog(log, 2)]
    engine, done = in_flight(hooks, convergence_hook=0.02, n_steps=60)
    steps = engine.steps(done).tolist()
    trajectory, frames, table = read_trajectory(h5), read_structures(xyz), read_csv_log(log)
    assert sorted(trajectory.system_ids) == list(range(len(SIZES)))
    assert (np.diff(trajectory.step) > 0).all()
    for index, n_atoms in enumerate(SIZES):
        one = trajectory.system(index)
        path = alone(index, 60)
        own = one.system_step.tolist()
        assert own == list(range(0, steps[index] + 1, 2))
        assert one.positions.shape == (one.n_frames, n_atoms, 3)
        for frame, step in enumerate(own):
            np.testing.assert_array_equal(one.positions[frame], path[step])
        # the same frames in the other files
        same = [data for data in frames if data.info["system_id"] == index]
        assert [data.info["system_step"] for data in same] == own
        assert [data.info["step"] for data in same] == one.step.tolist()
        assert all(torch.equal(a.positions, b.positions) for a, b in zip(same, one.structures(), strict=True))
        rows = table["system_id"] == index
        assert table["system_step"][rows].tolist() == own
        np.testing.assert_allclose(table["potential_energy"][rows], one.energy, rtol=1e-11)


def test_a_restarted_run_in_flight_writes_the_same_files(tmp_path):
    def hooks(stem):
        return [CSVLog(tmp_path / f"{stem}.csv", 3), HDF5Trajectory(tmp_path / f"{stem}.h5", 3)]

    whole = in_flight(hooks("whole"), convergence_hook=0.02, n_steps=60)[1]

    # killed at step 20; the checkpoint is of step 16
    sampler, sink = SizeAwareSampler(structures(), max_atoms=12), MemorySink()
    path = tmp_path / "a.ckpt"
    saved = {}

    class Note(Checkpoint):
        def __call__(self, batch, dynamics):
            if dynamics.completed_steps == 16:
                super().__call__(batch, dynamics)
                done = sink.read().get("system_id").tolist() if len(sink) else []
                saved["taken"] = {*done, *batch.get("system_id").tolist()}

    first = FIRE(
        LennardJones(), sampler=sampler, sinks=[sink], hooks=[*hooks("parts"), Note(path, 16)], refill_frequency=3,
        convergence_hook=0.02, n_steps=60,
    )  # fmt: skip
    first.run(n_steps=20)
    rest = SizeAwareSampler(structures(), max_atoms=12, skip=saved["taken"])
    again = FIRE(LennardJones(), sampler=rest, hooks=hooks("parts"), refill_frequency=3, convergence_hook=0.02, n_steps=60)
    batch = load_checkpoint(path, again)
    left = again.run(batch)
    a, b = read_trajectory(tmp_path / "whole.h5"), read_trajectory(tmp_path / "parts.h5")
    assert sorted(a.system_ids) == sorted(b.system_ids) == list(range(len(SIZES)))
    for index in a.system_ids:
        assert a.system(index).system_step.tolist() == b.system(index).system_step.tolist()
        np.testing.assert_array_equal(a.system(index).positions, b.system(index).positions)
    for index in left.get("system_id").tolist():
        here, there = (found.index_select([found.get("system_id").tolist().index(index)]) for found in (left, whole))
        assert torch.equal(here.positions, there.positions)


def test_drift_is_counted_from_each_systems_own_beginning():
    monitor = EnergyDriftMonitor(interval=1)
    _, done = in_flight([monitor], make=NVE, timestep=4.0, n_steps=12, init_fn=lambda batch: initialize_velocities(batch, 60.0))
    assert done.get("outcome").tolist() == [Outcome.STEP_BUDGET] * len(SIZES)
    ends = total_energy(done)
    for index, n_atoms in enumerate(SIZES):
        one = batch_of(structures()[index])
        one.set("system_id", torch.tensor([index]), level="system")
        initialize_velocities(one, 60.0)
        NVE(LennardJones()).run(one, 0)
        expected = (float(ends[index]) - float(total_energy(one))) / n_atoms
        assert float(done.get("nve_drift")[index]) == pytest.approx(expected, abs=1e-14)
        assert float(done.get("nve_largest_drift")[index]) >= abs(expected) - 1e-14
        assert expected != 0


def total_energy(batch):
    return batch.energy + kinetic_energy(batch)


def test_a_stage_entered_again_counts_its_drift_anew():
    well = Well()

    def make():
        return NVE(well, n_steps=3, hooks=[EnergyDriftMonitor(interval=1)]) + NVE(well, n_steps=4)

    batch = batch_of(atoms_in_well(3, 1))
    make().run(batch)
    before = float(batch.get("nve_reference_energy"))
    batch.velocities = batch.velocities * 2.0
    batch.set("status", torch.zeros(1, dtype=torch.int64))
    batch.set("nve_steps", torch.zeros(1, dtype=torch.int64))
    make().run(batch)
    assert float(batch.get("nve_reference_energy")) > before + 1e-6
    assert float(batch.get("nve_largest_drift")) < 1e-3


def test_guards_set_systems_of_their_own_stage_aside_only():
    hot = atoms_in_well(3, 1)
    hot = hot.replace(positions=hot.positions * 50)
    batch = batch_of(atoms_in_well(3, 2), hot, hot)
    batch.set("status", torch.tensor([0, 0, 1]), level="system")
    well = Well()
    first, second = NVE(well, n_steps=20, hooks=[ForceGuard(10.0)]), NVE(well, n_steps=20)
    (first + second).run(batch, 5)
    assert batch.outcome.tolist() == [Outcome.RUNNING, Outcome.FAILED, Outcome.RUNNING]


def test_a_guard_meets_systems_that_come_later_before_they_move():
    far = AtomicData([[30.0, 0.0, 0.0], [-30.0, 0.0, 0.0]], [18, 18])
    given = [atoms_in_well(2, 1), far, atoms_in_well(2, 2), far]
    sampler = SizeAwareSampler(given, max_atoms=4)
    done = NVE(Well(), sampler=sampler, hooks=[ForceGuard(10.0)], n_steps=4, refill_frequency=1).run()
    assert done.outcome.tolist() == [Outcome.STEP_BUDGET, Outcome.FAILED] * 2
    assert done.nve_steps.tolist() == [4, 0, 4, 0]
    for index in (1, 3):
        assert torch.equal(done.get_data(index).positions, far.positions)
        assert "exceeds the limit of 10 eV/Å" in done.info[index]["failure"]


def test_a_log_of_a_fused_stage_knows_stages_and_their_steps(tmp_path):
    path, own = tmp_path / "all.csv", tmp_path / "second.csv"
    well = Well(k=0.5)
    first = FIRE(well, n_steps=4)
    second = NVTLangevin(well, temperature=50.0, timestep=2.0, n_steps=6, hooks=[CSVLog(own, 1)])
    fused = first + second
    fused.register_fused_hook(CSVLog(path, 1))
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))
    fused.run(batch)
    table = read_csv_log(path)
    one = table["system_id"] == 1
    assert table["step"][one].tolist() == list(range(11))
    assert table["stage"][one].tolist() == [0] * 5 + [1] * 6
    # the state after the fourth step is reported once, as the stage's that brought it there
    assert table["system_step"][one].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert np.isnan(table["time"][one][:5]).all()
    np.testing.assert_allclose(table["time"][one][5:], 2.0 * np.arange(1, 7))
    assert (table["temperature"][one][:5] == 0).all()
    assert (table["temperature"][one][5:] > 0).all()
    assert np.isnan(table["conserved_energy"][one][:5]).all()
    assert np.isfinite(table["conserved_energy"][one][5:]).all()
    kinetic = float(table["kinetic_energy"][one][-1])
    assert table["temperature"][one][-1] == pytest.approx(2 * kinetic / (kB * 6), rel=1e-9)
    sub = read_csv_log(own)
    assert set(sub["stage"].tolist()) == {1}
    assert sub["system_step"][sub["system_id"] == 0].tolist() == list(range(7))


def test_a_checkpoint_belongs_to_the_fused_stage(tmp_path):
    path = tmp_path / "a.ckpt"
    well = Well()
    fused = FIRE(well, n_steps=4, hooks=[Checkpoint(path, 1)]) + NVE(well, n_steps=4)
    with pytest.raises(InputError, match=r"FIRE is a stage of a FusedStage.*register_fused_hook"):
        fused.run(batch_of(atoms_in_well(3, 1)))

    def make(hooks=()):
        fused = FIRE(well, n_steps=4) + NVTLangevin(well, n_steps=8, seed=3, friction=30.0)
        for hook in hooks:
            fused.register_fused_hook(hook)
        return fused

    whole = make().run(batch_of(atoms_in_well(3, 1), atoms_in_well(4, 2)))
    make([Checkpoint(path, 5)]).run(batch_of(atoms_in_well(3, 1), atoms_in_well(4, 2)), 8)
    again = make()
    batch = load_checkpoint(path, again)
    again.run(batch)
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(batch.get(key), whole.get(key)), key


def test_constraints_hold_in_flight(tmp_path):
    pytest.importorskip("spglib")
    given = [argon(1, rattle=0.0, a=5.3 + 0.02 * i) for i in range(5)]
    constraints = [FixCenterOfMass(), FixSymmetry(), FixAtoms(where=lambda batch: batch.positions[:, 0] > 2.0)]
    sampler = SizeAwareSampler(given, max_atoms=8)
    engine = NVE(LennardJones(), sampler=sampler, constraints=constraints, n_steps=6, refill_frequency=2)

    done = engine.run()
    assert done.get("system_id").tolist() == list(range(5))
    assert done.get("outcome").tolist() == [Outcome.STEP_BUDGET] * 5
    assert done.get("move_mask").reshape(5, 4).tolist() == [[True, True, False, False]] * 5
    assert len(constraints[1]._known) <= 2


def test_a_bias_and_a_freeze_reach_systems_that_come_later():
    def pull(batch):
        energy = 0.1 * batch.positions[:, 0]
        forces = torch.zeros_like(batch.positions)
        forces[:, 0] = -0.1
        return {"energy": torch.zeros(batch.n_systems).double().index_add(0, batch.system, energy), "forces": forces}

    def run(index=None):
        given = structures() if index is None else [structures()[index]]
        sampler = SizeAwareSampler(given, max_atoms=12)
        hooks = [BiasPotential(pull), FreezeAtoms([0], start=2, stop=5)]
        return NVE(LennardJones(), timestep=5.0, sampler=sampler, hooks=hooks, n_steps=9, refill_frequency=2).run()

    done = run()
    for index in (0, 4, 7):
        one = run(index)
        rows = slice(int(done.ptr[index]), int(done.ptr[index + 1]))
        assert torch.equal(done.positions[rows], one.positions)
        assert float(one.get("bias_energy")) == float(done.get("bias_energy")[index])


def test_table_and_bar_in_flight_and_with_many_systems():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    in_flight([LogTable(5, console), ProgressBar("relax", console)], convergence_hook=0.02, n_steps=60)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "8/8" in text

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    batch = batch_of(*(atoms_in_well(2, seed) for seed in range(1000)))
    NVE(Well(), hooks=[LogTable(10, console)]).run(batch, 20)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [str(step), f"{name}/1000"] for step in (0, 10, 20) for name in ("min", "mean", "max")
    ]
    least, mean, most = (float(line.split()[3]) for line in lines[-3:])
    heat = 2 * (0.5 * batch.masses * batch.velocities.square().sum(1)).reshape(1000, 2).sum(1) / (kB * 3)
    assert (least, mean, most) == pytest.approx((float(heat.min()), float(heat.mean()), float(heat.max())), abs=0.051)
    assert lines[-1].split()[6] == "-"  # no cell, no pressure


def test_wrapping_in_a_stage_moves_its_own_systems_only():
    far = argon(1)
    far.positions += 20.0
    batch = batch_of(far, far)
    batch.set("status", torch.tensor([0, 1]), level="system")
    potential = LennardJones()
    (NVE(potential, n_steps=9, hooks=[WrapPositions()]) + NVE(potential, n_steps=9)).run(batch, 2)
    assert batch.positions[:4].max() < 6.0
    assert batch.positions[4:].min() > 15.0


def test_one_hook_in_two_runs_loses_no_rows(tmp_path):
    paths = [tmp_path / "a.csv", tmp_path / "a.extxyz", tmp_path / "a.h5"]
    hooks = [CSVLog(paths[0], 1), ExtXYZTrajectory(paths[1], 1), HDF5Trajectory(paths[2], 1)]
    for index in (0, 1):
        batch = batch_of(atoms_in_well(3, index))
        batch.set("system_id", torch.tensor([index]), level="system")
        NVE(Well(), hooks=hooks).run(batch, 2)
    assert read_csv_log(paths[0])["system_id"].tolist() == [0, 0, 0, 1, 1, 1]
    assert [one.info["system_id"] for one in read_structures(paths[1])] == [0, 0, 0, 1, 1, 1]
    assert read_trajectory(paths[2]).system(1).step.tolist() == [0, 1, 2]
    # another hook begins the file anew
    NVE(Well(), hooks=[CSVLog(paths[0], 1), HDF5Trajectory(paths[2], 1)]).run(batch_of(atoms_in_well(3, 5)), 1)
    assert read_csv_log(paths[0])["step"].tolist() == [0, 1]
    assert read_trajectory(paths[2]).system_ids == [0]
