"""Settings: one number, one for each system, or a ramp over steps."""

import math

import numpy as np
import pytest
import torch
from dynamics_samples import atoms_in_well, batch_of
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data.units import kB
from carryall.dynamics.parameters import Parameter, Ramp
from carryall.errors import InputError

NUMBERS = st.floats(0.0, 1e4, allow_subnormal=False)


def batch_with_ids(ids):
    batch = batch_of(*(atoms_in_well(1) for _ in ids))
    batch.set("system_id", torch.tensor(ids), level="system")
    return batch


@st.composite
def ramps(draw):
    """A ramp, the ids of a batch, and the steps that each system has taken."""
    steps = sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=5)))
    count = draw(st.integers(1, 4))
    per_system = st.one_of(NUMBERS, st.lists(NUMBERS, min_size=count, max_size=count))
    values = [draw(per_system) for _ in steps]
    ids = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    taken = [draw(st.integers(0, 400)) for _ in ids]
    return Ramp(steps, values), ids, taken


@settings(max_examples=60, deadline=None)
@given(ramps())
def test_a_ramp_is_a_linear_interpolation_for_each_system(case):
    ramp, ids, taken = case
    found = Parameter.of("temperature", ramp, kB).at(batch_with_ids(ids), torch.tensor(taken))
    assert found.dtype == torch.float64
    for one, system, step in zip(found.tolist(), ids, taken, strict=True):
        line = [value[system] if isinstance(value, list) else value for value in ramp.values]
        assert one == pytest.approx(kB * np.interp(step, ramp.steps, line), rel=1e-12, abs=1e-15)


def test_before_its_first_and_after_its_last_step_a_ramp_is_exactly_its_end():
    parameter = Parameter.of("temperature", Ramp((10, 17), (0.2, 0.9)))
    assert not parameter.constant
    found = parameter.at(batch_with_ids([0, 1, 2, 3]), torch.tensor([0, 10, 17, 10**9]))
    assert found.tolist() == [0.2, 0.2, 0.9, 0.9]


def test_one_number_goes_for_all_and_a_list_by_system_id():
    batch = batch_with_ids([2, 0, 2])
    assert Parameter.of("timestep", 2).at(batch).tolist() == [2.0] * 3
    for many in ([1.0, 2.0, 3.0], np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])):
        assert Parameter.of("timestep", many, 10.0).at(batch).tolist() == [30.0, 10.0, 30.0]
    without_ids = batch_of(atoms_in_well(1), atoms_in_well(1))
    assert Parameter.of("timestep", [1.0, 2.0]).at(without_ids).tolist() == [1.0, 2.0]


def test_a_row_is_the_same_bits_in_any_batch():
    ramp = Parameter.of("temperature", Ramp((0, 7, 90), (300.0, [1.0, 2.0, 3.0], 77.7)), kB)
    ids, taken = [0, 1, 2] * 7, list(range(21))
    whole = ramp.at(batch_with_ids(ids), torch.tensor(taken))
    for i, (system, step) in enumerate(zip(ids, taken, strict=True)):
        assert torch.equal(ramp.at(batch_with_ids([system]), torch.tensor([step])), whole[i : i + 1])


def test_what_it_shows_makes_it_again():
    batch, steps = batch_with_ids([0, 1]), torch.tensor([3, 4])
    for setting in (3.0, [1.0, 2.0], Ramp((0, 5), (1.0, 2.0)), Ramp((0, 5), (1.0, [2.0, 3.0]))):
        parameter = Parameter.of("pressure", setting)
        shown = parameter.shown()
        again = Parameter.of("pressure", Ramp(shown["steps"], shown["values"]) if isinstance(shown, dict) else shown)
        assert torch.equal(again.at(batch, steps), parameter.at(batch, steps))
        assert again == parameter


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (-1.0, {}, "pressure must be zero or more and finite, got -1"),
        (0.0, {"positive": True}, "pressure must be positive and finite, got 0"),
        ([1.0, math.inf], {}, "pressure must be zero or more and finite, got inf"),
        (math.nan, {"signed": True}, "pressure must be finite, got nan"),
        ("1", {}, "pressure must be a number, or one number for each system, got '1'"),
        (True, {}, "pressure must be a number"),
        ([], {}, "pressure must be a number"),
        ([[1.0]], {}, "pressure must be a number"),
        (Ramp((0, 1), (1.0, -1.0)), {}, "pressure must be zero or more"),
        (Ramp((0, 1), ([1.0, 2.0], [1.0, 2.0, 3.0])), {}, "the values of a Ramp for pressure have \\[2, 3\\] numbers"),
    ],
)
def test_a_setting_out_of_range_is_named(value, options, message):
    with pytest.raises(InputError, match=message):
        Parameter.of("pressure", value, **options)


def test_negative_numbers_are_allowed_where_they_mean_something():
    assert Parameter.of("pressure", -1.5, signed=True).at(batch_with_ids([0])).tolist() == [-1.5]


@pytest.mark.parametrize("steps", [(), (0, 0), (5, 3), (-1, 3), (0.0, 3.0), (False, True)])
def test_steps_of_a_ramp_ascend_from_zero(steps):
    with pytest.raises(InputError, match="steps of a Ramp must be ascending whole numbers"):
        Ramp(steps, (1.0,) * len(steps))


def test_a_ramp_needs_a_value_for_each_step():
    with pytest.raises(InputError, match="one value for each of its 2 steps, got 3"):
        Ramp((0, 1), (1.0, 2.0, 3.0))


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0]])
def test_a_system_without_a_value_is_named(ids):
    stranger = next(one for one in ids if one)
    with pytest.raises(InputError, match=f"friction has 2 values but there is a system with the id {stranger}"):
        Parameter.of("friction", [1.0, 2.0]).at(batch_with_ids(ids))
