"""A run that is asked to stop ends between two steps, with a checkpoint from which it goes on exactly."""

import os
import signal

import numpy as np
import pytest
import torch

import carryall
from carryall.data import AtomicData
from carryall.dynamics import HookStageEnum


def argon():
    grid = torch.cartesian_prod(*[torch.arange(3, dtype=torch.float64)] * 3) * 3.8
    return AtomicData(positions=grid, atomic_numbers=[18] * 27, cell=torch.eye(3, dtype=torch.float64) * 11.4)


class SignalAt:
    """Sends a signal to this process in the middle of a step."""

    stage = HookStageEnum.AFTER_COMPUTE
    frequency = 1

    def __init__(self, number, step):
        self.number, self.step = number, step

    def __call__(self, batch, dynamics):
        if dynamics.step_count == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_between_steps_and_resumes_bit_for_bit(tmp_path, number):
    settings = {"n_steps": 12, "temperature": 40.0, "timestep": 2.0, "seed": 3, "progress": False}
    potential = carryall.load("lj-argon")
    whole = carryall.md([argon()], potential, **settings)
    file = tmp_path / "state.h5"
    with pytest.raises(KeyboardInterrupt):
        carryall.md([argon()], potential, checkpoint=file, hooks=[SignalAt(number, 5)], **settings)
    assert file.exists()
    resumed = carryall.md([argon()], potential, checkpoint=file, resume=True, **settings)
    assert np.array_equal(resumed.structures[0].positions, whole.structures[0].positions)
    assert np.array_equal(resumed.structures[0].velocities, whole.structures[0].velocities)
