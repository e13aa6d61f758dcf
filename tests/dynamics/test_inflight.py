"""Systems that come and go: forces before the first step, names, budgets, results, failures."""

import pytest
import torch
from dynamics_samples import LennardJones, Well, atoms_in_well, batch_of, cluster, record

from carryall.data import AtomicData
from carryall.dynamics import (
    FIRE,
    NVE,
    ConvergenceHook,
    HookStageEnum,
    MemorySink,
    NVTLangevin,
    Outcome,
    SizeAwareSampler,
    initialize_velocities,
)
from carryall.errors import InputError


def wells(*sizes):
    return [atoms_in_well(n, seed) for seed, n in enumerate(sizes)]


def alone(make, data, index, steps=None):
    batch = batch_of(data)
    batch.set("system_id", torch.tensor([index]), level="system")
    make().run(batch, steps)
    return batch


def test_each_input_comes_out_once_in_order_with_its_own_number():
    sizes, potential = [2, 5, 3, 1, 4, 2, 5, 1], Well()
    structures = wells(*sizes)
    engine = NVE(potential, n_steps=4, sampler=SizeAwareSampler(structures, max_atoms=6), refill_frequency=1)
    found = engine.run()
    assert found.get("system_id").tolist() == list(range(len(sizes)))
    assert found.atom_counts == sizes
    assert found.outcome.tolist() == [Outcome.STEP_BUDGET] * len(sizes)
    assert found.get("nve_steps").tolist() == [4] * len(sizes)
    assert engine.done
    for index, data in enumerate(structures):
        one = alone(lambda: NVE(potential), data, index, 4)
        assert torch.equal(found.index_select([index]).positions, one.positions)
        assert torch.equal(found.index_select([index]).forces, one.forces)


def test_three_systems_of_which_two_fill_the_room():
    engine = NVE(Well(), n_steps=2, sampler=SizeAwareSampler(wells(2, 5, 5), max_atoms=5))
    assert engine.run().atom_counts == [2, 5, 5]


def test_a_new_system_has_forces_before_its_first_step_and_costs_no_call_of_its_own():
    potential = Well(k=5.0)
    structures = [one.replace(forces=torch.zeros_like(one.positions)) for one in wells(2, 2, 2, 2)]
    found = NVE(potential, n_steps=3, sampler=SizeAwareSampler(structures, max_atoms=4), refill_frequency=1).run()
    # two pairs of systems: one call for the forces at the start, three steps
    assert potential.n_calls == 8
    for index, data in enumerate(structures):
        one = alone(lambda: NVE(potential), data, index, 3)
        assert torch.equal(found.index_select([index]).velocities, one.velocities)


def test_systems_enter_beside_others_that_go_on():
    potential, structures = Well(), [atoms_in_well(2, 1), atoms_in_well(2, 2), atoms_in_well(2, 3), atoms_in_well(2, 4)]

    def fire():
        return FIRE(potential, convergence_hook=1e-3)

    found = FIRE(potential, convergence_hook=1e-3, sampler=SizeAwareSampler(structures, max_atoms=4), refill_frequency=2).run()
    assert found.outcome.tolist() == [Outcome.CONVERGED] * 4
    for index, data in enumerate(structures):
        one = alone(fire, data, index, 1000)
        mine = found.index_select([index])
        assert mine.get("fire_steps").tolist() == one.get("fire_steps").tolist()
        assert torch.equal(mine.positions, one.positions)


def test_init_fn_sees_every_new_system_once():
    seen = []

    def heat(batch):
        seen.extend(batch.get("system_id").tolist())
        initialize_velocities(batch, 30.0, seed=2)

    structures = [one.replace(velocities=None) for one in wells(2, 3, 2, 3, 2)]
    potential = Well()
    found = NVTLangevin(
        potential, 30, n_steps=5, seed=1, init_fn=heat, sampler=SizeAwareSampler(structures, max_atoms=5), refill_frequency=1
    ).run()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    batch = batch_of(structures[3])
    batch.set("system_id", torch.tensor([3]), level="system")
    initialize_velocities(batch, 30.0, seed=2)
    NVTLangevin(potential, 30, seed=1).run(batch, 5)
    assert torch.equal(found.index_select([3]).velocities, batch.velocities)


def test_energy_changes_of_a_new_system_are_its_own():
    potential = Well()
    structures = wells(3, 1, 3, 1, 2)
    hook = {"key": "energy_change_per_atom", "threshold": 1e-6}
    found = FIRE(potential, convergence_hook=hook, sampler=SizeAwareSampler(structures, max_atoms=4), refill_frequency=1).run()
    for index, data in enumerate(structures):
        one = alone(lambda: FIRE(potential, convergence_hook=hook), data, index, 1000)
        assert found.get("fire_steps")[index] == one.get("fire_steps")[0]


def test_systems_that_cannot_be_worked_on_are_set_aside_and_come_out():
    twins = AtomicData([[0, 0, 0], [0, 0, 1e-9]], [18, 18])
    gold = AtomicData([[0, 0, 0], [0, 0, 3.0]], [79, 79])
    structures = [cluster(4), twins, gold, cluster(3, 1), cluster(2, 3), cluster(2, 2)]

    def spoil(batch):
        bad = (batch.system_id == 4)[batch.system]
        batch.positions = torch.where(bad[:, None], torch.nan, batch.positions)

    sampler = SizeAwareSampler(structures, max_atoms=6)
    fire = FIRE(LennardJones(), convergence_hook=0.01, n_steps=400, sampler=sampler, init_fn=spoil, refill_frequency=1)
    found = fire.run()
    assert found.get("system_id").tolist() == [0, 1, 2, 3, 4, 5]
    failed = int(Outcome.FAILED)
    assert [int(one) for one in found.outcome] == [1, failed, failed, 1, failed, 1]
    assert "coincide" in found.info[1]["failure"]
    assert "Au" in found.info[2]["failure"]
    assert "finite" in found.info[4]["failure"]


def test_sinks_get_all_and_the_run_says_that_nothing_is_left():
    first, second = MemorySink(capacity=2), MemorySink()
    engine = NVE(Well(), n_steps=2, sampler=SizeAwareSampler(wells(2, 3, 2, 3), max_atoms=5), sinks=[first, second])
    assert engine.run() is None
    assert (len(first), len(second)) == (2, 2)
    assert sorted(first.read().system_id.tolist() + second.read().system_id.tolist()) == [0, 1, 2, 3]


def test_a_full_sink_loses_nothing():
    engine = NVE(Well(), n_steps=2, sampler=SizeAwareSampler(wells(2, 3), max_atoms=5), sinks=[MemorySink(capacity=1)])
    with pytest.raises(InputError, match="fit"):
        engine.run()
    assert engine.active_batch.system_id.tolist() == [0, 1]
    assert (engine.active_batch.status == 1).all()


def test_a_run_cut_short_gives_back_what_is_on_its_way():
    engine = NVE(Well(), n_steps=10, sampler=SizeAwareSampler(wells(2, 3, 2), max_atoms=5))
    left = engine.run(n_steps=4)
    assert left.system_id.tolist() == [0, 1]
    assert not engine.done
    rest = engine.run(left)
    assert rest.system_id.tolist() == [0, 1, 2]
    assert rest.get("nve_steps").tolist() == [10, 10, 10]
    assert engine.done


def test_stages_in_flight():
    potential, events = LennardJones(), []

    def note(batch, dynamics):
        events.extend(batch.system_id[dynamics.newly_converged].tolist())

    note.stage, note.frequency = HookStageEnum.ON_CONVERGE, 1
    structures = [cluster(4 + seed % 3, seed) for seed in range(7)]
    fused = FIRE(potential, convergence_hook=0.01) + NVTLangevin(potential, 20, n_steps=6, seed=4, hooks=[note])
    fused = fused + NVE(potential, n_steps=3)
    sampler = SizeAwareSampler(structures, max_atoms=12)
    stages = [(status, part) for status, part in fused.sub_stages]
    found = type(fused)(stages, sampler=sampler, refill_frequency=2).run()
    assert found.system_id.tolist() == list(range(7))
    assert sorted(events) == list(range(7))
    for index in (0, 3, 6):
        batch = batch_of(structures[index])
        batch.set("system_id", torch.tensor([index]), level="system")
        parts = (
            FIRE(potential, convergence_hook=0.01) + NVTLangevin(potential, 20, n_steps=6, seed=4) + NVE(potential, n_steps=3)
        )
        parts.run(batch)
        assert torch.equal(found.index_select([index]).positions, batch.positions)


def test_hooks_never_see_a_system_without_forces():
    potential, seen = Well(), []

    def look(batch, dynamics):
        mask = dynamics.running(batch)
        rows = slice(None) if mask is None else mask
        seen.append(bool(torch.isfinite(batch.energy[rows]).all()))

    look.stages, look.frequency = tuple(stage for stage in HookStageEnum if stage.name != "ON_CONVERGE"), 1
    NVE(potential, n_steps=3, hooks=[look], sampler=SizeAwareSampler(wells(2, 3, 2, 3), max_atoms=5), refill_frequency=1).run()
    assert len(seen) > 8
    assert all(seen)


def test_no_steps_are_asked_for_and_the_batch_may_be_given():
    potential, calls = Well(), []
    hook = ConvergenceHook.from_fmax(1e-2)
    sampler = SizeAwareSampler(wells(2, 3), max_atoms=9, skip={0})
    engine = FIRE(potential, hooks=[record(HookStageEnum.AFTER_STEP, calls)], convergence_hook=hook, sampler=sampler)
    found = engine.run(batch_of(atoms_in_well(2, 0)))
    assert found.system_id.tolist() == [0, 1]
    assert calls


def test_how_often_the_criterion_is_looked_at_counts_each_systems_own_steps():
    potential, structures = Well(), wells(3, 1, 2, 3, 1)
    hook = ConvergenceHook.from_fmax(0.2, frequency=3)
    engine = FIRE(potential, convergence_hook=hook, sampler=SizeAwareSampler(structures, max_atoms=4), refill_frequency=1)
    found = engine.run()
    for index, data in enumerate(structures):
        one = alone(lambda: FIRE(potential, convergence_hook=hook), data, index, 1000)
        assert found.get("fire_steps")[index] == one.get("fire_steps")[0]
        assert torch.equal(found.index_select([index]).positions, one.positions)
