"""Criteria of convergence."""

import math

import pytest
import torch
from dynamics_samples import LennardJones, atoms_in_well, batch_of, cluster

from carryall.data import AtomicData, Batch
from carryall.dynamics import FIRE, ConvergenceCriterion, ConvergenceHook
from carryall.errors import InputError


def with_forces(*sizes, energy=0.0):
    """One system for each list of forces' x components."""
    structures = []
    for row in sizes:
        forces = torch.zeros(len(row), 3, dtype=torch.float64)
        forces[:, 0] = torch.tensor(row, dtype=torch.float64)
        structures.append(AtomicData(torch.zeros(len(row), 3), [18] * len(row), atom_extras={"given": forces}))
    batch = Batch.from_data_list(structures)
    batch.forces = batch.get("given")
    batch.energy = torch.full((len(sizes),), energy, dtype=torch.float64)
    return batch


def test_criteria_combine_with_and_and_equal_is_converged():
    batch = with_forces([0.05, 0.01], [0.06, 0.0], [0.05])
    batch.energy = torch.tensor([1.0, -5.0, 3.0], dtype=torch.float64)
    hook = ConvergenceHook([{"key": "fmax", "threshold": 0.05}, ConvergenceCriterion("energy", 2.0)])
    assert hook.num_criteria == 2
    assert hook.evaluate(batch).tolist() == [0]
    assert ConvergenceHook.from_fmax(0.05).evaluate(batch).tolist() == [0, 2]
    assert ConvergenceHook.from_forces(0.06).evaluate(batch).tolist() == [0, 1, 2]
    assert ConvergenceHook.from_forces(1e-3).evaluate(batch) is None


def test_the_default_is_fmax():
    assert repr(ConvergenceHook()) == "ConvergenceHook(fmax <= 0.05)"


def test_a_missing_key_lists_what_there_is():
    with pytest.raises(KeyError, match=r"no key 'enery'.*perhaps you meant 'energy'.*positions"):
        ConvergenceHook({"key": "enery", "threshold": 1.0}).evaluate(with_forces([1.0]))
    bare = Batch.from_data_list([atoms_in_well()])
    with pytest.raises(KeyError, match="no key 'fmax'"):
        ConvergenceHook().evaluate(bare)


@pytest.mark.parametrize("reduce_op", [None, "max", "min", "mean", "sum", "norm"])
def test_signs_of_forces_do_not_count(reduce_op):
    batch = with_forces([-50.0, -50.0])
    batch.forces = torch.full_like(batch.forces, -50.0)
    assert ConvergenceHook({"key": "forces", "threshold": 0.05, "reduce_op": reduce_op}).evaluate(batch) is None


def test_batches_of_single_atoms():
    batch = with_forces([0.1], [0.01], [3.0])
    assert ConvergenceHook.from_forces(0.05).evaluate(batch).tolist() == [1]
    assert ConvergenceHook.from_fmax(0.2).evaluate(batch).tolist() == [0, 1]


def test_nan_and_no_atoms_never_converge():
    batch = with_forces([0.0, math.nan], [0.0, 0.0])
    hook = ConvergenceHook([ConvergenceCriterion("fmax", math.inf), ConvergenceCriterion("energy", math.inf)])
    assert hook.evaluate(batch).tolist() == [1]
    batch.energy = torch.tensor([0.0, math.nan], dtype=torch.float64)
    assert hook.evaluate(batch) is None
    empty = Batch.from_data_list([AtomicData(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), forces=torch.zeros(0, 3))])
    assert ConvergenceHook().evaluate(empty) is None


def test_reductions():
    batch = with_forces([0.0], [0.0])
    batch.set("tensor", torch.tensor([[[3.0, 4.0]], [[-6.0, 1.0]]]), level="system")
    for op, threshold, expected in (("norm", 5.0, [0]), ("max", 1.0, [1]), ("sum", -5.0, [1]), ("mean", 3.5, [0, 1])):
        hook = ConvergenceHook({"key": "tensor", "threshold": threshold, "reduce_op": op})
        assert hook.evaluate(batch).tolist() == expected
    one = ConvergenceHook({"key": "tensor", "threshold": 3.0, "reduce_op": "min", "reduce_dims": -1})
    assert one.evaluate(batch).tolist() == [0, 1]
    with pytest.raises(InputError, match="counts systems or atoms"):
        ConvergenceHook({"key": "tensor", "threshold": 3.0, "reduce_dims": 0}).evaluate(batch)


def test_a_custom_test_gets_the_tensor_and_gives_one_bool_a_system():
    batch = with_forces([1.0, 2.0], [3.0])
    seen = []
    hook = ConvergenceHook(
        {"key": "forces", "threshold": 0, "custom_op": lambda x: seen.append(x) or torch.tensor([False, True])}
    )
    assert hook.evaluate(batch).tolist() == [1]
    assert seen[0].shape == (3, 3)
    with pytest.raises(InputError, match=r"returned \(3,\) of torch.bool, expected \(2,\)"):
        ConvergenceHook({"key": "forces", "threshold": 0, "custom_op": lambda x: x[:, 0] > 0}).evaluate(batch)


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({"key": "fmax"}, "needs threshold"),
        ({"key": "fmax", "treshold": 1}, "perhaps you meant 'threshold'"),
        ({"key": "fmax", "threshold": 1, "reduce_op": "maximum"}, "reduce_op must be one of"),
        ({"key": "fmax", "threshold": math.nan}, "must be a number"),
        ([], "empty list of criteria"),
    ],
)
def test_criteria_that_make_no_sense_are_refused(criteria, message):
    with pytest.raises(InputError, match=message):
        ConvergenceHook(criteria)
    with pytest.raises(InputError, match="frequency"):
        ConvergenceHook(frequency=0)


def test_energy_changes_compare_with_the_step_before():
    batch = batch_of(cluster(5, 1), cluster(7, 2))
    FIRE(LennardJones(), convergence_hook={"key": "energy_change_per_atom", "threshold": 1e-6}).run(batch, 500)
    assert batch.outcome.tolist() == [1, 1]
    assert (batch.fire_steps > 2).all()
    change = (batch.energy - batch.previous_energy).abs() / torch.tensor([5, 7])
    assert (change <= 1e-6).all()


def test_a_criterion_is_looked_at_every_frequency_steps():
    batch = batch_of(cluster(5, 1))
    FIRE(LennardJones(), convergence_hook=ConvergenceHook.from_fmax(0.02, frequency=7)).run(batch, 500)
    assert int(batch.fire_steps[0]) % 7 == 0


def test_a_run_without_a_criterion_has_no_hidden_one():
    batch = batch_of(AtomicData(torch.zeros(1, 3), [18]))
    FIRE(LennardJones(), n_steps=4).run(batch)
    assert batch.fire_steps.tolist() == [4]
