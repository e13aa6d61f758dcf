"""Ranks that are processes, over torch.distributed: the same file gives the same numbers by the same exchanges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carryall import pack
from carryall.errors import InputError
from carryall.exchange.distributed import DistributedTransport
from carryall.graph import graph_from_structures
from carryall.models import EagerPotential
from message_passing import Tangled
from structures import CUTOFF, structure

PEER = Path(__file__).with_name("gloo_peer.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes writes, about the eager model and its `.pte`."""
    folder = tmp_path_factory.mktemp("gloo")
    pack(Tangled(), folder / "model.pte", check=False)
    return run_peers(folder)


def run_peers(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error", str(PEER)]
    peers = [subprocess.Popen([*command, str(rank), "2", str(folder)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        errors = [peer.communicate(timeout=120)[1] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    assert [peer.returncode for peer in peers] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def check_numbers_and_exchanges(found: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    graph = graph_from_structures([structure("tilted", ("Cu", "Au"))], CUTOFF, ("Cu", "Au"))
    expected = EagerPotential(Tangled())(graph, atomic_virial=True)
    for key in [f"{name}, {spread}" for name in names for spread in ("two", "first has none")]:
        parts = [one[key] for one in found]
        assert parts[0]["calls"] == parts[1]["calls"] == found[0]["eager, two"]["calls"]
        assert len(parts[0]["calls"]) == 16
        for name, value in expected.items():
            mine = [torch.tensor(part["out"][name], dtype=torch.float64) for part in parts]
            if name not in ("energy", "virial"):
                rows = torch.zeros_like(value)
                for part, values in zip(parts, mine, strict=True):
                    rows[part["ids"]] = values.reshape(-1, *value.shape[1:])
                mine = [rows]
            assert torch.allclose(sum(mine), value, rtol=0, atol=1e-12 * max(1.0, float(value.abs().max()))), (key, name)
        # the same test without the exchange would fail
        assert abs(sum(part["off"] for part in parts) - float(expected["energy"])) > 1e-3


def test_processes_give_what_one_gives(found: list[dict[str, Any]]) -> None:
    check_numbers_and_exchanges(found, ("eager", ".pte"))


@pytest.mark.compile
def test_compiled_processes_give_what_one_gives(tangled_pt2: Path, tmp_path: Path) -> None:
    shutil.copy(tangled_pt2, tmp_path / "model.pt2")
    check_numbers_and_exchanges(run_peers(tmp_path), ("eager", ".pt2"))


def test_rows_of_every_dtype_and_of_many_megabytes_travel(found: list[dict[str, Any]]) -> None:
    assert [one["rows"] for one in found] == [[True] * 5] * 2
    assert all(one["big"] for one in found)


def test_every_process_gets_the_error_of_one(found: list[dict[str, Any]]) -> None:
    assert found[0]["error"] == found[1]["error"]
    assert found[0]["error"].startswith("rank 1: the exchange plan is for 4 local")


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    with pytest.raises(InputError, match=r"call torch\.distributed\.init_process_group"):
        DistributedTransport()
