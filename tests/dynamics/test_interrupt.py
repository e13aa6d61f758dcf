"""A run that is asked to stop ends between two steps, with a checkpoint from which it goes on exactly."""

import os
import signal

import numpy as np
import pytest
import torch
from screening_samples import argon_structures, ledger_rows

import carryall
from carryall.cli.main import main
from carryall.data import AtomicData, write_structures
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_relaxation_that_is_asked_to_stop_saves_every_step(tmp_path, number):
    structures, potential = argon_structures(12), carryall.load("lj-argon")
    settings = {"fmax": 0.002, "max_atoms_per_batch": 150, "progress": False}
    steps = []
    whole = carryall.relax(structures, potential, out=tmp_path / "whole", hooks=[count_steps(steps)], **settings)
    first, second = [], []
    hooks = [SignalAt(number, 40), count_steps(first)]
    with pytest.raises(KeyboardInterrupt):
        carryall.relax(structures, potential, out=tmp_path / "parts", hooks=hooks, **settings)
    assert len(first) == 41  # the step under way is finished
    parts = carryall.relax(structures, potential, out=tmp_path / "parts", resume=True, hooks=[count_steps(second)], **settings)
    assert len(parts) == len(whole) == 12
    assert ledger_rows(tmp_path / "parts") == ledger_rows(tmp_path / "whole")
    assert len(first) + len(second) <= len(steps) + 10  # nothing of the work is lost; refills may fall differently


def count_steps(steps):
    def hook(batch, dynamics):
        steps.append(batch.n_systems)

    hook.stage, hook.frequency = HookStageEnum.AFTER_STEP, 1
    return hook


def test_the_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in.extxyz", tmp_path / "out"
    write_structures(source, argon_structures(6))
    flags = ["relax", str(source), "--model", "lj-argon", "-o", str(out), "--fmax", "0.002", "--max-atoms-per-batch", "60"]
    monkeypatch.setattr("carryall.dynamics.screening.StateSaver.__call__", stop_at_once)
    assert main(flags) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(flags) == 2
    assert "holds a run already: go on with --resume" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    assert len(ledger_rows(out)) == 6


def stop_at_once(saver, batch, dynamics):
    saver.save(batch, dynamics)
    raise KeyboardInterrupt
