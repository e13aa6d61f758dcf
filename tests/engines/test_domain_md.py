"""`carryall md --ranks`: the same run as without, gone on with by another number of ranks, stopped on all ranks together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from carryall import pack
from carryall.cli.main import main
from carryall.data import AtomicData, read_structures, write_structures
from carryall.dynamics import read_csv_log
from carryall.dynamics.hooks.checkpoint import read_checkpoint
from carryall.dynamics.hooks.trajectory import _frame_texts
from structures import fcc, small_alloy

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
RUN = ("--ensemble", "nve", "--timestep", "2", "--temperature", "1500", "--log-interval", "5", "--trajectory-interval", "25")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start and a packed file."""
    folder = tmp_path_factory.mktemp("ranks")
    pack(small_alloy(), folder / "model.pte", check=False)
    positions, cell = fcc((2, 2, 3), a=3.7, jitter=0.02)
    data = AtomicData(positions, [29, 79] * (len(positions) // 2), cell)
    write_structures(folder / "start.extxyz", [data])
    write_structures(folder / "two.extxyz", [data, data])
    return folder


def arguments(folder: Path, out: str, *more: str, start: str = "start.extxyz") -> list[str]:
    return ["md", str(folder / start), "--model", str(folder / "model.pte"), "-o", str(folder / out), *RUN, *more]


def frame_steps(path: Path) -> list[int]:
    with path.open() as file:
        return [step for step, _, _ in _frame_texts(file)]


def test_a_run_over_ranks_is_that_of_one_process(folder: Path) -> None:
    assert main(arguments(folder, "plain", "--n-steps", "50")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "carryall"]
    command = [*launcher, *arguments(folder, "ranks", "--n-steps", "30", "--ranks", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("NVE, last state") == 1
    assert main(arguments(folder, "ranks", "--n-steps", "50", "--resume", "--ranks", "1")) == 0
    states = [read_checkpoint(folder / name / "checkpoint.pt") for name in ("plain", "ranks")]
    assert [one.step_count for one in states] == [50, 50]
    assert set(states[0].batch.keys()) == set(states[1].batch.keys())
    for key in ("positions", "velocities", "forces", "energy", "virial"):
        assert float((states[0].batch.get(key) - states[1].batch.get(key)).abs().max()) < 1e-10, key
    logs = [read_csv_log(folder / name / "log.csv") for name in ("plain", "ranks")]
    assert logs[0]["step"].tolist() == logs[1]["step"].tolist() == list(range(0, 51, 5))
    for name, column in logs[0].items():
        assert np.abs(column - logs[1][name]).max() < 1e-8, name
    ends = [read_structures(folder / name / "final.extxyz")[0] for name in ("plain", "ranks")]
    assert float((ends[0].positions - ends[1].positions).abs().max()) < 1e-7
    assert frame_steps(folder / "ranks" / "trajectory.extxyz") == [0, 25, 50]


def test_a_signal_stops_all_ranks_with_a_checkpoint(folder: Path) -> None:
    command = [sys.executable, "-m", "carryall", *arguments(folder, "stopped", "--n-steps", "1000000", "--ranks", "2")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = folder / "stopped" / "log.csv"
    try:
        deadline = time.monotonic() + 200
        while not (log.exists() and log.read_text().count("\n") > 4):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "carryall: interrupted: add --resume to go on from the last checkpoint" in words
    saved = read_checkpoint(folder / "stopped" / "checkpoint.pt")
    assert saved.batch.n_atoms == 48
    assert saved.step_count >= 10
    last = read_csv_log(log)["step"].tolist()[-1]
    assert saved.step_count - last < 5
    assert main(arguments(folder, "stopped", "--n-steps", str(saved.step_count + 2), "--resume")) == 0


@pytest.mark.parametrize(
    ("more", "start", "words"),
    [
        (("--ranks", "1"), "two.extxyz", "--ranks is for one structure, 2 were given"),
        (("--ranks", "0"), "start.extxyz", "ranks must be at least 1, got 0"),
        (("--ranks", "1", "--constraints", "fix_symmetry"), "start.extxyz", "FixSymmetry cannot be kept over ranks"),
    ],
)
def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], start: str, words: str) -> None:
    assert main(arguments(folder, "refused", "--n-steps", "1", *more, start=start)) == 2
    assert words in capsys.readouterr().err


def test_torchrun_without_ranks_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(folder, "refused", "--n-steps", "1")) == 2
    assert "torchrun started 2 processes: give --ranks 2" in capsys.readouterr().err
    assert main(arguments(folder, "refused", "--n-steps", "1", "--ranks", "3")) == 2
    assert "torchrun started 2 processes for --ranks 3: give the same number to both" in capsys.readouterr().err
