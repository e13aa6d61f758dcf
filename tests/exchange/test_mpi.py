"""Ranks of MPI: rows, sums, models and their derivatives are those of one process, with real messages."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_cases import Case, cases, expected, graph_of, kinds, parameter_gradients, whole

pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install mpi4py mpich", exc_type=ImportError)
MPIRUN = Path(sys.executable).parent / "mpirun"
if not MPIRUN.exists():
    pytest.skip("mpirun is not in this environment: pip install mpich", allow_module_level=True)
HERE = Path(__file__).parent


def mpirun(
    ranks: int, arguments: Sequence[str | Path], timeout: float = 400, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Python on so many ranks, which wait for messages without taking the processor from each other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "10"}
    command = [MPIRUN, "-n", str(ranks), sys.executable, *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def run_peers(folder: Path, ranks: int, what: str) -> list[dict[int, Any]]:
    """What each rank of the world found, by size of the group."""
    done = mpirun(ranks, [HERE / "mpi_peer.py", folder, what], options=["-W", "error"])
    assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def found(tangled_pte: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    """Of four ranks, for the eager models and a `.pte`."""
    folder = tmp_path_factory.mktemp("mpi")
    shutil.copy(tangled_pte, folder / "model.pte")
    return run_peers(folder, 4, "rows")


def check(case: Case, name: str, model: str, found: list[dict[int, Any]]) -> None:
    parts = [found[rank][case.size][f"{name}, {case.name}"] for rank in range(case.size)]
    values, reference = whole(case, parts), expected(case, model)
    assert values.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.allclose(values[key], value, rtol=0, atol=1e-10), key
    calls = [part["calls"] for part in parts]
    assert calls == [calls[0]] * case.size
    assert len(calls[0]) == (16 if model == "tangled" else 4)
    # with the exchange switched off it would fail
    if any(kind in ("both", "ghosts") for kind in kinds(case)):
        assert abs(sum(part["off"] for part in parts) - float(reference["energy"])) > 1e-4


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ranks_give_what_one_process_gives(case: Case, found: list[dict[int, Any]]) -> None:
    for name, model in (("example", "example"), ("tangled", "tangled"), ("model.pte", "tangled")):
        check(case, name, model, found)


def test_every_kind_of_rank_is_among_the_cases() -> None:
    assert {kind for case in cases() for kind in kinds(case)} == {"both", "local", "ghosts", "nothing"}
    assert {case.size for case in cases()} == {1, 2, 3, 4}


@pytest.mark.compile
def test_compiled_ranks_give_what_one_process_gives(tangled_pt2: Path, tmp_path: Path) -> None:
    shutil.copy(tangled_pt2, tmp_path / "model.pt2")
    found = run_peers(tmp_path, 2, "packed")
    for case in cases():
        if case.size <= 2:
            check(case, "model.pt2", "tangled", found)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_are_the_same_bits_on_every_rank(size: int, found: list[dict[int, Any]]) -> None:
    sums = [found[rank][size]["sums"] for rank in range(size)]
    assert sums == [sums[0]] * size


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_training_on_forces_across_ranks_gives_the_gradients_of_one(size: int, found: list[dict[int, Any]]) -> None:
    for index, value in enumerate(parameter_gradients(graph_of("tilted"))):
        total = sum(torch.as_tensor(found[rank][size]["gradients"][index]) for rank in range(size))
        assert torch.allclose(total, value, rtol=0, atol=1e-10 * float(value.abs().max())), index


def test_messages_of_other_exchanges_are_refused(found: list[dict[int, Any]]) -> None:
    first, second = (found[rank][2]["refusals"] for rank in range(2))
    assert second["too short"].startswith("rank 1 expected 12 bytes of exchange ")
    assert "from rank 0 and got 9 of exchange " in second["too short"]
    assert second["too long"].startswith("rank 1: the exchange of 4 bytes from rank 0 failed: Message truncated")
    assert first["too short"] == first["too long"] == ""
    assert first["crossed"].startswith("rank 0 expected 9 bytes of exchange ")
    assert first["crossed"].endswith("every rank has to make the same exchanges")
    assert first["misfit"] == second["misfit"]
    assert first["misfit"].startswith("rank 0: the exchange plan is for 1 local and 1 ghost atoms, but the graph has 8 and 0")


def test_too_long_messages_for_an_old_mpi_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from carryall.errors import InputError
    from carryall.exchange import mpi

    monkeypatch.setattr(mpi, "_INT_BYTES", 7)
    assert len(mpi._sendable(torch.zeros(8, dtype=torch.uint8))) == 8
    monkeypatch.setattr(mpi.MPI, "VERSION", 3)
    with pytest.raises(InputError, match=r"a message of 8 bytes is more than this MPI can send \(7 bytes before MPI 4\)"):
        mpi._sendable(torch.zeros(8, dtype=torch.uint8))


def test_absent_packages_are_named(tmp_path: Path) -> None:
    code = """
import sys
if sys.argv[1] == "absent":
    sys.modules["mpi4py"] = None
from carryall.errors import MissingDependencyError
try:
    import carryall.exchange.mpi
except MissingDependencyError as error:
    print(error)
"""
    broken = {**os.environ, "MPI4PY_LIBMPI": str(tmp_path / "libmpi.so.12")}
    for what, message in (("absent", "import of mpi4py"), ("broken", "(cannot load MPI library)")):
        done = subprocess.run(
            [sys.executable, "-c", code, what], capture_output=True, text=True, timeout=200, env=broken, check=False
        )
        assert message in done.stdout, done.stderr
        assert "pip install mpi4py mpich, both into the environment that runs this" in done.stdout
