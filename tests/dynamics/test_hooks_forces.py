"""Hooks that change forces or hold atoms: bias, clamp, freeze."""

import numpy as np
import pytest
import torch
from dynamics_samples import LennardJones, Well, argon, atoms_in_well, batch_of, cluster

from carryall.data import AtomicData
from carryall.dynamics import (
    FIRE,
    NVE,
    Checkpoint,
    ConvergenceHook,
    CSVLog,
    HookStageEnum,
    NVTLangevin,
    Outcome,
    load_checkpoint,
    read_csv_log,
)
from carryall.dynamics.constraints import FixAtoms
from carryall.dynamics.hooks import BiasPotential, FreezeAtoms, MaxForceClamp
from carryall.errors import InputError


def spring(k, center=(0.0, 0.0, 0.0)):
    """k (r - center)² / 2 for every atom, with its virial."""

    def function(batch):
        away = batch.positions - torch.tensor(center, dtype=torch.float64)
        energy = torch.zeros(batch.n_systems, dtype=torch.float64).index_add(0, batch.system, 0.5 * k * away.square().sum(1))
        outer = (-k * away)[:, :, None] * batch.positions[:, None, :]
        virial = torch.zeros(batch.n_systems, 3, 3, dtype=torch.float64).index_add(0, batch.system, outer)
        return {"energy": energy, "forces": -k * away, "virial": virial}

    return function


def pair():
    return batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))


def test_a_well_with_a_bias_is_a_stiffer_well_from_the_first_step_on():
    biased, stiff = pair(), pair()
    bias = NVE(Well(k=1.0), 2.0, hooks=[BiasPotential(spring(0.5))])
    plain = NVE(Well(k=1.5), 2.0)
    for n_steps in (0, 1, 20):
        bias.run(biased, n_steps)
        plain.run(stiff, n_steps)
        for key in ("positions", "velocities", "forces", "energy"):
            torch.testing.assert_close(biased.get(key), stiff.get(key), atol=1e-13, rtol=0)
    # the bias alone, and what is conserved with it
    expected = torch.zeros(2).double().index_add(0, biased.system, 0.25 * biased.positions.square().sum(1))
    torch.testing.assert_close(biased.get("bias_energy"), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(bias.conserved_energy(biased), plain.conserved_energy(stiff), atol=1e-13, rtol=0)


def test_convergence_and_logs_see_the_sum(tmp_path):
    batch = pair()
    path = tmp_path / "log.csv"
    center = (0.3, -0.2, 0.1)
    hooks = [BiasPotential(spring(3.0, center)), CSVLog(path, 1)]
    FIRE(Well(k=1.0), hooks=hooks, convergence_hook=1e-3).run(batch, 300)
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 2
    torch.testing.assert_close(batch.positions, 0.75 * torch.tensor(center).double().expand(5, 3), atol=1e-3 / 4, rtol=0)
    assert read_csv_log(path)["potential_energy"][-1] == pytest.approx(float(batch.energy[1]), abs=1e-9)


def test_forces_of_the_bias_and_the_model_are_the_gradient_of_the_sum():
    batch = batch_of(argon(1))
    dynamics = NVE(LennardJones(), hooks=[BiasPotential(spring(0.2))])
    dynamics.run(batch, 0)
    step = 1e-5
    for atom, axis in ((0, 0), (2, 1)):
        energies = []
        for sign in (1, -1):
            moved = batch_of(argon(1))
            moved.positions[atom, axis] += sign * step
            NVE(LennardJones(), hooks=[BiasPotential(spring(0.2))]).run(moved, 0)
            energies.append(float(moved.energy))
        assert float(batch.forces[atom, axis]) == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-8)


def test_the_stress_has_the_bias_in_it():
    batch, plain = batch_of(argon(1)), batch_of(argon(1))
    NVE(LennardJones(), hooks=[BiasPotential(spring(0.2))]).run(batch, 0)
    NVE(LennardJones()).run(plain, 0)
    virial = spring(0.2)(plain)["virial"]
    torch.testing.assert_close(batch.stress, plain.stress - virial / 5.4**3, atol=1e-15, rtol=1e-12)


def test_two_biases_add_up_and_constraints_come_last():
    batch = pair()
    hooks = [BiasPotential(spring(0.5)), BiasPotential(spring(0.25), name="second")]
    dynamics = NVE(Well(), hooks=hooks, constraints=[FixAtoms([0])])
    dynamics.run(batch, 3)
    free = torch.tensor([False, True, True, False, True])
    torch.testing.assert_close(batch.forces[free], -1.75 * batch.positions[free], atol=1e-14, rtol=0)
    assert (batch.forces[~free] == 0).all()
    torch.testing.assert_close(batch.get("second_energy"), 0.5 * batch.get("bias_energy"), atol=1e-14, rtol=0)


def test_systems_that_are_done_keep_what_they_have():
    batch = batch_of(cluster(4, 1), cluster(7, 2))
    FIRE(LennardJones(), hooks=[BiasPotential(spring(0.05))], convergence_hook=0.01).run(batch, 300)
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 2
    assert batch.fire_steps[0] != batch.fire_steps[1]
    for index in (0, 1):
        one, alone = batch.index_select([index]), batch_of(cluster(4, 1) if index == 0 else cluster(7, 2))
        FIRE(LennardJones(), hooks=[BiasPotential(spring(0.05))], convergence_hook=0.01).run(alone, 300)
        for key in ("energy", "bias_energy", "virial", "stress", "forces"):
            assert torch.equal(one.get(key), alone.get(key)), key


def test_a_bias_in_one_stage_stays_there():
    well = Well(k=1.0)
    batch = pair()
    (NVE(well, n_steps=2, hooks=[BiasPotential(spring(0.5))]) + NVE(well, n_steps=3)).run(batch)
    # the first half kick of the second stage is with its own forces already
    expected = NVE(Well(k=1.0)).run(NVE(Well(k=1.5)).run(pair(), 2), 3)
    torch.testing.assert_close(batch.positions, expected.positions, atol=1e-13, rtol=0)
    torch.testing.assert_close(batch.forces, -batch.positions, atol=1e-14, rtol=0)
    both = pair()
    fused = NVE(well, n_steps=2) + NVE(well, n_steps=3)
    fused.register_fused_hook(BiasPotential(spring(0.5)))
    fused.run(both)
    torch.testing.assert_close(both.positions, NVE(Well(k=1.5)).run(pair(), 5).positions, atol=1e-13, rtol=0)


def test_biases_that_are_none_are_refused():
    def run(function):
        NVE(Well(), hooks=[BiasPotential(function)]).run(pair(), 1)

    with pytest.raises(InputError, match="needs a function"):
        BiasPotential(3)
    with pytest.raises(InputError, match=r'must return "energy", "forces" and perhaps "virial", got \[.energy.\]'):
        run(lambda batch: {"energy": batch.energy})
    with pytest.raises(InputError, match=r"got 0\.0"):
        run(lambda batch: 0.0)
    with pytest.raises(InputError, match=r"energy of shape \(5,\), expected \(2,\)"):
        run(lambda batch: {"energy": batch.positions[:, 0], "forces": batch.positions})


def test_a_bias_that_is_not_finite_sets_its_system_aside():
    def bad(batch):
        energy = torch.where(batch.system_id == 1, torch.nan, 0.0).double()
        return {"energy": energy, "forces": torch.zeros_like(batch.positions)}

    batch = pair()
    NVE(Well(), hooks=[BiasPotential(bad)]).run(batch, 3)
    assert batch.outcome.tolist() == [Outcome.RUNNING, Outcome.FAILED]
    assert "energy or forces of bias are not finite" in batch.info[1]["failure"]
    assert batch.nve_steps.tolist() == [3, 0]


def test_clamped_forces_keep_their_direction_and_small_ones_their_bits():
    batch = pair()
    plain = pair()
    NVE(Well(k=10.0)).run(plain, 0)
    NVE(Well(k=10.0), hooks=[MaxForceClamp(4.0)]).run(batch, 0)
    size = plain.forces.norm(dim=1)
    large = size > 4.0
    assert 0 < int(large.sum()) < 5
    assert torch.equal(batch.forces[~large], plain.forces[~large])
    torch.testing.assert_close(batch.forces[large].norm(dim=1), torch.full((int(large.sum()),), 4.0).double())
    unit = plain.forces[large] / size[large][:, None]
    torch.testing.assert_close(batch.forces[large] / 4.0, unit, atol=1e-14, rtol=0)
    with pytest.raises(InputError, match="max_force must be positive"):
        MaxForceClamp(0.0)


def test_a_clamp_in_one_stage_stays_there():
    well = Well(k=10.0)
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(3, 1))
    batch.set("status", torch.tensor([0, 1]), level="system")
    (NVE(well, n_steps=9, hooks=[MaxForceClamp(4.0)]) + NVE(well, n_steps=9)).run(batch, 0)
    assert batch.forces[:3].norm(dim=1).max() < 4.0 + 1e-12
    assert batch.forces[3:].norm(dim=1).max() > 4.5


def test_a_clamp_gets_a_bad_start_past_what_would_end_it():
    close = AtomicData([[0.0, 0.0, 0.0], [1.2, 0.0, 0.0], [0.0, 4.0, 0.0]], [18] * 3)
    batch = batch_of(close)
    FIRE(LennardJones(), hooks=[MaxForceClamp(2.0)], convergence_hook=0.01).run(batch, 400)
    assert batch.outcome.tolist() == [Outcome.CONVERGED]
    assert float(batch.energy) < -0.0103  # at least one bond


FROZEN = torch.tensor([True, False, False, True, False])


@pytest.mark.parametrize("make", [lambda **k: NVE(Well(), 3.0, **k), lambda **k: NVTLangevin(Well(), friction=50.0, **k)])
def test_frozen_atoms_keep_positions_and_velocities_for_their_span(make):
    batch = pair()
    seen, pulled = [], []

    def note(batch, dynamics):
        if dynamics.current_hook_stage is HookStageEnum.BEFORE_STEP:
            seen.append((batch.positions.clone(), batch.velocities.clone()))
        else:
            pulled.append((batch.forces != 0).any(1).tolist())

    note.stages, note.frequency = (HookStageEnum.BEFORE_STEP, HookStageEnum.BEFORE_PRE_UPDATE), 1
    make(hooks=[note, FreezeAtoms([0], start=2, stop=6)]).run(batch, 9)
    assert pulled[2:6] == [(~FROZEN).tolist()] * 4
    assert pulled[1] == [True] * 5
    for step in range(8):
        (x, v), (y, w) = seen[step], seen[step + 1]
        same = (x == y).all(1) & (v == w).all(1)
        assert same.tolist() == (FROZEN.tolist() if 2 <= step < 6 else [False] * 5), step


def test_what_is_not_frozen_goes_as_if_it_were_alone_and_the_thawed_go_on_where_they_were():
    batch, free = pair(), pair()
    potential = Well()
    NVE(potential, 3.0, hooks=[FreezeAtoms([0], start=0, stop=4)]).run(batch, 4)
    NVE(Well(), 3.0).run(free, 4)
    assert torch.equal(batch.positions[~FROZEN], free.positions[~FROZEN])
    # atoms in a well do not feel each other: the thawed ones do now what they would have done at the start
    batch, early = pair(), pair()
    dynamics = NVE(potential, 3.0, hooks=[FreezeAtoms([0], start=0, stop=4)])
    potential.n_calls = 0
    dynamics.run(batch, 7)
    assert potential.n_calls == 1 + 7 + 1
    NVE(Well(), 3.0).run(early, 3)
    assert torch.equal(batch.positions[FROZEN], early.positions[FROZEN])
    assert torch.equal(batch.forces, -batch.positions)


def test_a_relaxation_converges_beside_frozen_atoms():
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))
    start = batch.positions.clone()
    FIRE(Well(), hooks=[FreezeAtoms([0])], convergence_hook=ConvergenceHook.from_fmax(1e-5)).run(batch, 300)
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 2
    assert torch.equal(batch.positions[FROZEN], start[FROZEN])
    assert batch.positions[~FROZEN].abs().max() < 1e-4
    fixed = batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))
    FIRE(Well(), constraints=[FixAtoms([0])], convergence_hook=ConvergenceHook.from_fmax(1e-5)).run(fixed, 300)
    assert torch.equal(fixed.positions, batch.positions)
    assert fixed.fire_steps.tolist() == batch.fire_steps.tolist()


def test_a_frozen_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    def make(hooks=()):
        return NVTLangevin(Well(), friction=30.0, hooks=[FreezeAtoms(elements=[18], start=3, stop=8), *hooks])

    whole = make().run(pair(), 12)
    for step in (3, 5, 8):
        path = tmp_path / f"{step}.ckpt"
        make([Checkpoint(path, step)]).run(pair(), step)
        again = make()
        batch = load_checkpoint(path, again)
        again.run(batch, 12 - step)
        for key in ("positions", "velocities", "forces", "energy"):
            assert torch.equal(batch.get(key), whole.get(key)), (step, key)


def test_spans_that_make_no_sense_are_refused():
    for arguments in ({"start": -1}, {"start": 3, "stop": 3}, {"stop": 2.5}):
        with pytest.raises(InputError, match="0 <= start < stop"):
            FreezeAtoms([0], **arguments)
    with pytest.raises(InputError, match="FreezeAtoms needs one of"):
        FreezeAtoms()


def test_a_restraint_is_sampled_as_boltzmann_says():
    # one atom in a spring of 2 eV/Å^2 (well and bias, half each): <x²> = kT / k
    batch = batch_of(*(AtomicData([[0.0, 0.0, 0.0]], [18], velocities=[[0.0, 0.0, 0.0]]) for _ in range(100)))
    dynamics = NVTLangevin(Well(k=1.0), 300.0, timestep=8.0, friction=20.0, seed=5, hooks=[BiasPotential(spring(1.0))])
    dynamics.run(batch, 60)
    squares = []
    for _ in range(12):
        dynamics.run(batch, 40)
        squares.append(batch.positions.square().mean(1))
    values = torch.cat(squares).numpy()
    expected = 8.617330337e-5 * 300 / 2.0
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - expected) < 3 * error
