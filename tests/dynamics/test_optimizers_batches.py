"""Optimizers in batches: the same bits alone, in company, after restarts, in flight and in stages; histories and settings."""

import numpy as np
import pytest
import torch
from ase.optimize import LBFGS as AseLBFGS
from dynamics_samples import batch_of, cluster
from optimizer_samples import OURS, ase_calculator, batch_and_references, crystals, potential

from carryall.data import AtomicData
from carryall.dynamics import SizeAwareSampler, WrapPositions, load_checkpoint, save_checkpoint
from carryall.dynamics.optimizers import FIRE, LBFGS, GradientDescent
from carryall.dynamics.status import OUTCOME, Outcome
from carryall.errors import InputError

KINDS = [None, "unit_cell", "frechet"]
SETTINGS = {"fire": {"dtmax": 3.0}, "lbfgs": {"alpha": 5.0, "memory": 4}, "descent": {"step_size": 0.8}}
OPTIMIZERS = [(name, kind) for name in SETTINGS for kind in KINDS]


def make(name, kind, model=None, **options):
    return OURS[name](model or potential(), **SETTINGS[name], cell_filter=kind, **options)


def assert_same_system(batch, i, other, j):
    """Every key of the batch, bit for bit."""
    one, two = batch.index_select([i]), other.index_select([j])
    assert sorted(one.keys()) == sorted(two.keys())
    for key in one.keys():  # noqa: SIM118
        if key != "system_id":
            torch.testing.assert_close(one.get(key), two.get(key), rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize(("name", "kind"), OPTIMIZERS)
def test_a_system_takes_the_same_steps_alone_and_in_any_batch(name, kind):
    images = crystals()
    together = batch_of(images[2], images[0], images[1], images[0])
    make(name, kind, convergence_hook=0.004).run(together, 40)
    assert len(set(together.get(f"{OURS[name].prefix}_steps").tolist())) > 1
    for place, image in enumerate([2, 0, 1, 0]):
        alone = batch_of(images[image])
        make(name, kind, convergence_hook=0.004).run(alone, 40)
        assert_same_system(together, place, alone, 0)


@pytest.mark.parametrize(("name", "kind"), OPTIMIZERS)
def test_systems_outside_the_mask_stay_bit_for_bit(name, kind):
    batch, optimizer = batch_of(*crystals()), make(name, kind)
    optimizer.run(batch, 1)
    for mask in ([False, True, False], [False, True, False], [True, False, True]):
        before = batch.clone()
        optimizer.pre_update(batch, torch.tensor(mask))
        for index, moves in enumerate(mask):
            if moves:
                assert not torch.equal(before.get_data(index).positions, batch.get_data(index).positions)
                assert torch.equal(before.cell[index], batch.cell[index]) == (kind is None)
            else:
                assert_same_system(before, index, batch, index)


@pytest.mark.parametrize(("name", "kind"), OPTIMIZERS)
def test_a_run_in_two_parts_and_one_from_a_checkpoint_are_the_run(name, kind, tmp_path):
    whole, parts, first = (batch_of(*crystals()) for _ in range(3))
    make(name, kind).run(whole, 12)
    optimizer = make(name, kind)
    optimizer.run(parts, 5)
    optimizer.run(parts, 7)
    stopped = make(name, kind)
    stopped.run(first, 5)
    save_checkpoint(tmp_path / "state.pt", first, stopped)
    again = make(name, kind)
    resumed = load_checkpoint(tmp_path / "state.pt", again)
    again.run(resumed, 7)
    for index in range(3):
        assert_same_system(whole, index, parts, index)
        assert_same_system(whole, index, resumed, index)


@pytest.mark.parametrize("name", ["fire", "lbfgs"])
def test_systems_in_flight_end_where_they_end_alone(name):
    images = [crystals()[i] for i in (0, 1, 2, 1, 0, 2)]
    sampler = SizeAwareSampler([AtomicData.from_ase(atoms) for atoms in images], max_atoms=9)
    model = potential()
    found = make(
        name, "frechet", model, convergence_hook=0.01, sampler=sampler, refill_frequency=2, pressure=[0.1 * i for i in range(6)]
    ).run()
    assert found.get("system_id").tolist() == list(range(6))
    for index, atoms in enumerate(images):
        alone = batch_of(atoms)
        make(name, "frechet", model, convergence_hook=0.01, pressure=0.1 * index).run(alone, 500)
        for key in ("positions", "cell", "energy", "fmax", f"{name}_steps", f"{name}_reference_cell"):
            assert torch.equal(found.index_select([index]).get(key), alone.get(key)), key


def test_a_stage_starts_afresh_from_the_cell_at_hand():
    model, batch = potential(), batch_of(*crystals())
    stages = make("fire", "frechet", model, n_steps=4) + make("lbfgs", "frechet", model, n_steps=6)
    stages.run(batch)
    two = batch_of(*crystals())
    make("fire", "frechet", model).run(two, 4)
    cell = two.cell.clone()
    make("lbfgs", "frechet", model).run(two, 6)
    assert torch.equal(batch.get("lbfgs_reference_cell"), cell)
    assert torch.equal(batch.positions, two.positions)
    assert torch.equal(batch.cell, two.cell)
    assert not torch.equal(batch.get("fire_reference_cell"), cell)


@pytest.mark.parametrize(("name", "kind"), [("lbfgs", None), ("lbfgs", "frechet"), ("fire", "unit_cell")])
def test_wrapping_positions_changes_no_step(name, kind):
    images = crystals()
    for atoms in images:
        atoms.positions -= atoms.positions[0] - 0.01
    wrapped, free = batch_of(*images), batch_of(*images)
    one, other = make(name, kind, hooks=[WrapPositions()]), make(name, kind)
    for _ in range(20):
        one.run(wrapped, 1)
        other.run(free, 1)
        torch.testing.assert_close(wrapped.energy, free.energy, rtol=0, atol=1e-10)
        torch.testing.assert_close(wrapped.cell, free.cell, rtol=0, atol=1e-10)
    assert float((wrapped.positions - free.positions).abs().max()) > 1.0


def test_a_system_without_atoms_does_not_stop_the_others():
    for name, kind in OPTIMIZERS:
        empty = AtomicData(np.zeros((0, 3)), [], cell=5 * np.eye(3), pbc=True)
        batch = batch_of(crystals()[0], empty, crystals()[1])
        make(name, kind).run(batch, 3)
        assert batch.get(OUTCOME).tolist() == [Outcome.RUNNING, Outcome.FAILED, Outcome.RUNNING]
        assert batch.get(f"{OURS[name].prefix}_steps").tolist() == [3, 0, 3]


# -- L-BFGS


def test_the_default_memory_of_100_pairs_is_ase_s():
    atoms = crystals()[1]
    batch, ours, (reference,) = batch_and_references("lbfgs", [atoms], {}, maxstep=5e-4)
    for step in range(130):
        ours.run(batch, 1)
        reference.step()
        np.testing.assert_allclose(batch.positions, atoms.positions, atol=1e-8, rtol=0, err_msg=f"step {step}")
    assert ours.settings.memory == reference.state.memory == 100
    assert len(reference.state.s) == 100


def test_pairs_of_negative_curvature_count_as_in_ase():
    # between the inflection point and the cutoff the pair's curvature is negative
    pair = AtomicData([[0.0, 0, 0], [4.9, 0, 0]], [18, 18]).to_ase()
    batch, ours, (reference,) = batch_and_references("lbfgs", [pair], {}, alpha=1.0, maxstep=0.05)
    signs = []
    for _ in range(6):
        ours.run(batch, 1)
        reference.step()
        signs.append(float(batch.get("lbfgs_inverse_curvature")[0, 0]) < 0)
        np.testing.assert_allclose(batch.positions, pair.positions, atol=1e-8, rtol=0)
    assert any(signs)


def test_a_system_without_forces_stays_and_is_not_lost():
    # ASE divides by y · s = 0 there
    single = AtomicData([[0.0, 0, 0]], [18])
    batch = batch_of(single, cluster(4))
    for optimizer in (make("lbfgs", None), make("fire", None), make("descent", None)):
        optimizer.run(batch, 10)
        assert batch.get(OUTCOME).tolist() == [Outcome.RUNNING] * 2
        assert torch.equal(batch.positions[0], torch.zeros(3, dtype=torch.float64))
    atoms = single.to_ase()
    atoms.calc = ase_calculator()
    reference = AseLBFGS(atoms, logfile=None)
    with np.errstate(all="ignore"):
        for _ in range(3):
            reference.step()
    assert np.isnan(atoms.positions).any()


def test_history_takes_the_memory_that_is_asked_for():
    batch = batch_of(*crystals())
    LBFGS(potential(), memory=7, cell_filter="frechet").run(batch, 2)
    assert batch.get("lbfgs_displacements").shape == (batch.n_atoms, 7, 3)
    assert batch.get("lbfgs_cell_changes").shape == (3, 7, 3, 3)
    assert int((batch.get("lbfgs_inverse_curvature") != 0).sum()) == 3


# -- settings


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda model: LBFGS(model, maxstep=1.5), "maxstep of LBFGS must be at most 1 Å"),
        (lambda model: LBFGS(model, memory=0), "memory of LBFGS must be a positive integer"),
        (lambda model: LBFGS(model, alpha=-1.0), "alpha of LBFGS must be positive"),
        (lambda model: LBFGS(model, damping=float("nan")), "damping of LBFGS must be positive"),
        (lambda model: GradientDescent(model, step_size=0.0), "step_size of GradientDescent must be positive"),
        (lambda model: FIRE(model, fdec=0.0), "fdec of FIRE must be positive"),
    ],
)
def test_settings_are_checked(make_one, message):
    with pytest.raises(InputError, match=message):
        make_one(potential())


def test_what_a_step_needs_and_changes():
    assert "virial" not in LBFGS(potential()).__needs_keys__
    assert LBFGS(potential(), cell_filter="frechet").__needs_keys__ == {"energy", "forces", "virial"}
    assert FIRE(potential(), cell_filter="unit_cell").__provides_keys__ == {"positions", "cell"}
    assert FIRE.__needs_keys__ == {"energy", "forces"}
