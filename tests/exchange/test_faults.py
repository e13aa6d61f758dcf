"""A rank that raises, is killed or sends NaN ends every rank soon, with its own message and an exit code that is not 0."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

PEER = Path(__file__).with_name("fault_peer.py")
MPIRUN = Path(sys.executable).parent / "mpirun"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SOON = 10.0  # seconds
needs_mpi = pytest.mark.skipif(
    not MPIRUN.exists() or find_spec("mpi4py") is None, reason="mpi4py or mpirun is absent: pip install mpi4py mpich"
)


def failing(kind: str, case: str, folder: Path) -> str:
    """What a job of two ranks says before it ends, soon after its rank 1 failed."""
    launcher = [str(MPIRUN), "-n", "2", sys.executable] if kind == "mpi" else list(TORCHRUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "10"}
    command = [*launcher, str(PEER), kind, case, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    ended = time.time()
    assert done.returncode != 0
    assert (folder / "failed").exists(), done.stderr
    assert ended - float((folder / "failed").read_text()) < SOON, done.stderr
    return done.stderr + done.stdout


@needs_mpi
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("raise", "carryall: rank 1 of 2: atom 7 has no type"),
        ("bug", "carryall: rank 1 of 2: KeyError: 'atom 7'"),
        ("nan", "carryall: rank 0 of 2: features of atom 1 are not finite at step 5"),
        ("kill", "Killed (signal 9)"),
    ],
)
def test_mpirun_ends_every_rank(case: str, message: str, tmp_path: Path) -> None:
    said = failing("mpi", case, tmp_path)
    assert message in said
    assert ("Traceback" in said) == (case == "bug"), "only errors that are not carryall's own need one"


@pytest.mark.parametrize(("case", "message"), [("raise", "atom 7 has no type"), ("kill", "Signal 9 (SIGKILL) received")])
def test_torchrun_ends_every_rank(case: str, message: str, tmp_path: Path) -> None:
    assert message in failing("gloo", case, tmp_path)
