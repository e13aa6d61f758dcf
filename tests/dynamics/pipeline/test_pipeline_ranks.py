"""Ranks of gloo: every input once, with its numbers, ids and bits, whatever the mode, the source and the room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_cases import batch_of, given, stages_of
from pipeline_nursery import Nursery
from pipeline_samples import bits, fused_alone

from carryall.dynamics import DistributedPipeline, FusedStage, read_hdf5

COUNT = 24
SAME = ("outcome", "steps", "energy", "positions", "velocities", "atomic_numbers")
NO_BUFFER = {"num_systems": 0, "num_nodes": 0, "num_edges": 0}
TINY = {"num_systems": 1, "num_nodes": 6, "num_edges": 0}
ROOMY = {"num_systems": 64, "num_nodes": 500, "num_edges": 0}
CASES: dict[str, dict[str, Any]] = {
    "two": {"n_ranks": [1, 1]},
    "two, sampler, sync, no buffer": {"n_ranks": [1, 1], "source": "sampler", "comm_mode": "sync", "buffer_config": NO_BUFFER},
    "two, sampler, async, no buffer": {"n_ranks": [1, 1], "source": "sampler", "buffer_config": NO_BUFFER},
    "two, batch, fully async, buffer of one": {
        "n_ranks": [1, 1], "source": "batch", "comm_mode": "fully_async", "buffer_config": TINY,
    },
    "two, generator, synchronized": {"n_ranks": [1, 1], "source": "generator", "synchronized": True, "velocities": True},
    "two, float32": {"n_ranks": [1, 1], "model": "single", "source": "sampler", "buffer_config": ROOMY},
    "two, float32, batch, sync": {"n_ranks": [1, 1], "model": "single", "source": "batch", "comm_mode": "sync"},
    "two, one in ten fails": {"n_ranks": [1, 1], "model": "failing", "comm_mode": "fully_async"},
    "two, one in ten fails, helping": {"n_ranks": [1, 1], "model": "failing", "helping": True, "frequency": 1},
    "two, slow first, helping": {"n_ranks": [1, 1], "slow": {"0": 0.005}, "helping": True, "comm_mode": "fully_async"},
    "two, slow last": {"n_ranks": [1, 1], "slow": {"1": 0.005}, "buffer_config": TINY, "comm_mode": "sync"},
    "two, slow last, helping": {"n_ranks": [1, 1], "slow": {"1": 0.005}, "helping": True, "synchronized": True},
    "three": {"n_ranks": [1, 1, 1], "source": "sampler", "buffer_config": TINY},
    "three, fully async, synchronized": {"n_ranks": [1, 1, 1], "comm_mode": "fully_async", "synchronized": True},
    "three, helping": {"n_ranks": [1, 1, 1], "comm_mode": "fully_async", "helping": True, "source": "batch", "frequency": 1},
    "two on the first": {"n_ranks": [2, 1], "source": "sampler", "slow": {"0": 0.003}, "comm_mode": "sync"},
    "two on the last, one in ten fails": {"n_ranks": [1, 2], "model": "failing", "room": 3, "buffer_config": NO_BUFFER},
}  # fmt: skip


def alone(plan: dict[str, Any], ids: list[int]) -> list[dict[str, Any]]:
    """Each system by itself through the stages, one model call a step, in the order of the ids."""
    parts = [one.engine for one in stages_of({**plan, "slow": {}, "source": "list"}, -1)]
    for part in parts[1:]:
        part.model = parts[0].model
    return sorted(fused_alone(given(plan), FusedStage(parts), ids), key=lambda one: one["index"])


@pytest.mark.parametrize("name", CASES)
def test_every_input_comes_out_once_bit_for_bit(nursery: Nursery, tmp_path: Path, name: str) -> None:
    plan = {"count": COUNT, "out": str(tmp_path / "out"), "sinks": [["h5", None]], **CASES[name]}
    found = nursery.run(size=sum(plan["n_ranks"]), **plan)
    ids = [100 - index if plan.get("source") == "batch" else index for index in range(COUNT)]
    expected = alone(plan, ids)
    assert [one["index"] for one in found] == sorted(ids)
    for one, other in zip(found, expected, strict=True):
        if other["outcome"] == "failed":
            assert (one["outcome"], one["energy"], one["fmax"]) == ("failed", None, None)
            assert one["reason"].startswith("in stage 0 (FIRE): ")
            assert one["atomic_numbers"] == other["atomic_numbers"]
        else:
            assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}
            assert [said["stage"] for said in one["stages"]] == ["FIRE", "NVE", "NVTLangevin"][: len(plan["n_ranks"])]
            assert sum(said["steps"] for said in one["stages"]) == one["steps"]
    assert [one["outcome"] for one in found].count("failed") == (2 if plan.get("model") == "failing" else 0)
    check_sink(plan, found, ids)


def check_sink(plan: dict[str, Any], found: list[dict[str, Any]], ids: list[int]) -> None:
    """Each system once, as in the ledger, with the keys that it came with."""
    batch = read_hdf5(f"{plan['out']}.None.h5")
    assert sorted(batch.system_id.tolist()) == sorted(ids)
    batch = batch.index_select(batch.system_id.argsort())
    for place, one in enumerate(found):
        rows = slice(int(batch.ptr[place]), int(batch.ptr[place + 1]))
        assert batch.atomic_numbers[rows].numpy().tobytes().hex() == one["atomic_numbers"][1]
        if one["outcome"] != "failed":
            assert batch.positions[rows].numpy().tobytes().hex() == one["positions"][1]
            assert batch.velocities[rows].numpy().tobytes().hex() == one["velocities"][1]
            assert batch.energy[place].double().numpy().tobytes().hex() == one["energy"]
    if plan.get("source") == "batch":
        before = batch_of(plan)
        before = before.index_select(before.system_id.argsort())
        names = [key for key in before.keys() if key.startswith(("system_", "atom_"))]  # noqa: SIM118
        assert len(names) == 11
        for name in names:
            assert batch.get(name).dtype == before.get(name).dtype
            assert torch.equal(batch.get(name), before.get(name)), name


def test_one_process_in_turn_gives_the_same(nursery: Nursery, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"count": COUNT, "out": str(tmp_path / "out"), "n_ranks": [1, 1, 1]}
    here = DistributedPipeline(stages_of(plan, -1)).run(given(plan), progress=False)
    assert here is not None
    found = nursery.run(size=3, **plan)
    for one, other in zip(here, found, strict=True):
        mine = bits(one)
        assert mine == {key: other[key] for key in mine}
