"""Drift, logs as tables, speed."""

import numpy as np
import pytest

from carryall.cli.inputs import face_centered_cubic
from carryall.models import EagerPotential, LennardJones
from carryall.properties import energy_drift, measure_speed
from carryall.properties.timeseries import by_system


def test_drift_of_a_line():
    time = np.linspace(0.0, 2.0, 21)
    assert energy_drift(time, 5.0 + 0.03 * time, 10) == pytest.approx(3.0)
    assert np.isnan(energy_drift(time[:1], time[:1], 10))


def test_by_system_leaves_gaps():
    log = {
        "step": np.array([0, 0, 10]),
        "system_id": np.array([3, 5, 5]),
        "time": np.array([0.0, 0.0, 20.0]),
        "temperature": np.array([1.0, 2.0, 4.0]),
    }
    time, values = by_system(log, "temperature")
    np.testing.assert_allclose(time, [0.0, 0.02])
    np.testing.assert_array_equal(values, [[1.0, 2.0], [np.nan, 4.0]])


def test_speed():
    found = measure_speed("lj", EagerPotential(LennardJones.argon()), [face_centered_cubic("Ar", 5.26, 2)] * 2, budget_s=0.0)
    assert found.n_atoms == 64
    assert found.microseconds_per_atom == pytest.approx(1e6 * found.seconds / 64)
    assert found.nanoseconds_per_day(2.0) == pytest.approx(86400 / found.seconds * 2e-6)
