"""What only compiled files have: a C++ reader, other thread counts than at packing, other CPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from carryall import evaluate, inspect, write_structures
from carryall.models import DPA1, EagerPotential
from carryall.package.compile import code_for
from carryall.package.cpu import LEVELS, cpu_level, level_misfit, level_of_isa, machine
from structures import structure

pytestmark = pytest.mark.compile

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
TYPES = ("O", "H")


def sources(path: Path) -> str:
    """The C++ that the file was compiled from; torch keeps it beside the code."""
    with zipfile.ZipFile(path) as archive:
        return "\n".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))


# -- C++


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    command = ["make", "-C", str(EXAMPLE), f"PYTHON={sys.executable}", f"BUILD={folder}", f"{folder}/evaluate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "evaluate"


@pytest.mark.parametrize("name", ["tilted", "open", "tiny_triclinic", "one_atom_periodic", "one_atom"])
def test_a_cpp_program_gives_the_same_numbers(name: str, program: Path, dpa1: DPA1, dpa1_pt2: Path, tmp_path: Path) -> None:
    assert len((EXAMPLE / "evaluate.cpp").read_text().splitlines()) < 100
    data = structure(name, TYPES)
    write_structures(tmp_path / "one.xyz", [data])
    done = subprocess.run([program, dpa1_pt2, tmp_path / "one.xyz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    energy, *forces = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith(("energy", "force"))]
    (expected,) = evaluate(EagerPotential(dpa1), data)
    assert abs(energy - float(expected["energy"])) <= 1e-12 * max(1.0, abs(energy))
    assert len(forces) == 3 * data.n_atoms
    assert np.abs(np.reshape(forces, (-1, 3)) - expected["forces"]).max() <= 1e-12


# -- threads

TIME_IT = """
import os, sys, time
import torch
from carryall import load
from carryall.data import AtomicData
from carryall.graph import graph_from_structures
potential = load(sys.argv[1])
box = 12.0
positions = torch.rand(216, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.6
grid = torch.cartesian_prod(*[torch.arange(6, dtype=torch.float64)] * 3) * (box / 6)
data = AtomicData(grid + positions, [8] * 216, torch.eye(3, dtype=torch.float64) * box)
graph = graph_from_structures([data], potential.spec.cutoff, potential.spec.type_map)
potential.evaluate_whole(graph)
begin = time.perf_counter()
for _ in range(5):
    potential.evaluate_whole(graph)
print(len(os.listdir("/proc/self/task")), torch.get_num_threads(), (time.perf_counter() - begin) / 5)
"""


def ranks(path: Path, count: int, threads: int) -> list[list[float]]:
    """Threads of each of `count` processes that evaluate the file at the same time, threads that torch has, seconds a call."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = [
        subprocess.Popen([sys.executable, "-c", TIME_IT, str(path)], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    return [[float(word) for word in one.communicate(timeout=120)[0].split()] for one in running]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_a_file_follows_the_callers_threads(dpa1_pt2: Path) -> None:
    """It was packed under two threads (see conftest.py)."""
    assert "#pragma omp parallel" in sources(dpa1_pt2)
    assert not re.findall(r"num_threads\(\d+\)", sources(dpa1_pt2))
    alone, pair = ranks(dpa1_pt2, 1, 1), ranks(dpa1_pt2, 2, 1)
    # no rank of one thread has started another for the second core
    assert [(one[0], one[1]) for one in pair] == [(alone[0][0], 1.0)] * 2
    print(f"1 rank {alone[0][2] * 1e3:.2f} ms a call, 2 ranks {pair[0][2] * 1e3:.2f} and {pair[1][2] * 1e3:.2f} ms")
    (two,) = ranks(dpa1_pt2, 1, 2)
    assert two[1] == 2.0
    assert two[0] > alone[0][0]


# -- CPUs


@pytest.mark.skipif(machine() != "x86_64", reason="levels are those of x86-64")
@pytest.mark.parametrize("level", LEVELS)
def test_code_for_a_level(level: str) -> None:
    from torch._inductor import cpp_builder, cpu_vec_isa

    if level_misfit(level, "x86_64"):
        pytest.skip(f"this CPU has no {level}")
    with code_for(level):
        flags, _ = cpp_builder._get_optimization_cflags("g++")
        vectors = str(cpu_vec_isa.pick_vec_isa())
    assert [flag for flag in flags if flag.startswith("march")] == [f"march={level}"]
    assert vectors == {"x86-64-v2": "INVALID_VEC_ISA", "x86-64-v3": "avx2", "x86-64-v4": "avx512"}[level]
    flags, _ = cpp_builder._get_optimization_cflags("g++")
    assert "march=native" in flags


@pytest.mark.skipif(machine() != "x86_64", reason="levels are those of x86-64")
def test_a_file_says_which_cpus_it_is_for(dpa1_pt2: Path) -> None:
    facts = inspect(dpa1_pt2)["metadata"]
    assert (facts["cpu_level"], facts["machine"], facts["device"]) == (cpu_level(), "x86_64", "cpu")
    assert facts["compiler"]
    with zipfile.ZipFile(dpa1_pt2) as archive:
        names = [name for name in archive.namelist() if name.endswith("wrapper_metadata.json")]
        isa = json.loads(archive.read(names[0]))["AOTI_CPU_ISA"].lower()
    assert level_of_isa(isa) == cpu_level()
    assert isa in ("avx512", "avx2", "invalid_vec_isa")  # and not what only this very CPU has
