"""The ranks of real torchrun: results, a rank that fails, and a scheduler that asks to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline_cases import given, stages_of
from pipeline_samples import bits
from screening_samples import ledger_rows

from carryall.dynamics import DistributedPipeline

PEER = Path(__file__).with_name("pipeline_torchrun_peer.py")
COUNT = 20


def start(folder: Path, size: int, plans: list[dict[str, Any]]) -> subprocess.Popen[str]:
    path = folder / "plans.json"
    path.write_text(json.dumps(plans))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
        str(PEER),
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str], timeout: float) -> str:
    """What it wrote to stderr."""
    try:
        return process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise AssertionError(process.communicate(timeout=60)[1]) from None


def in_turn(plan: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """The results of one process."""
    pipeline = DistributedPipeline(stages_of({**plan, "source": "list", "slow": {}}, -1))
    found = pipeline.run(given(plan), progress=False, **settings)
    assert found is not None
    return [bits(one) for one in found]


def results(plan: dict[str, Any]) -> list[dict[str, Any]]:
    found = json.loads(Path(plan["out"] + ".json").read_text())
    return [{key: one[key] for key in one if key not in ("reason", "stages")} for one in found]


def test_three_ranks_with_and_without_a_group_of_their_own(tmp_path: Path) -> None:
    plans: list[dict[str, Any]] = [
        {"n_ranks": [1, 1, 1], "source": "sampler", "room": 4},
        {"n_ranks": [2, 1], "model": "single", "comm_mode": "fully_async", "helping": True},
        {"n_ranks": [1, 2], "model": "failing", "comm_mode": "sync", "sinks": [["h5", None]]},
    ]
    plans = [{"count": COUNT, "out": str(tmp_path / str(place)), **plan} for place, plan in enumerate(plans)]
    process = start(tmp_path, 3, plans)
    errors = ended(process, 100.0)
    assert process.returncode == 0, errors
    assert len(list(tmp_path.glob("plans.*.done"))) == 3
    for plan in plans:
        assert results(plan) == in_turn(plan)


def test_a_rank_that_fails_ends_torchrun_with_its_error(tmp_path: Path) -> None:
    trouble = {"rank": 1, "kind": "raise", "at": 12, "stage": 1}
    plan = {"n_ranks": [1, 1], "count": 200, "out": str(tmp_path / "out"), "folder": str(tmp_path / "run"), "trouble": trouble}
    process = start(tmp_path, 2, [plan])
    errors = ended(process, 100.0)
    assert process.returncode != 0
    assert "RuntimeError: the model of rank 1 is broken" in errors
    theirs, others = errors.find("RuntimeError: the model of rank 1 is broken"), errors.find("PeerError")
    assert others == -1 or "rank 1 (stage 1: NVE) failed: RuntimeError: the model of rank 1 is broken" in errors[others:]
    assert theirs >= 0


def test_asked_to_stop_torchrun_ends_in_time_and_one_process_goes_on(tmp_path: Path) -> None:
    mark = {"rank": 1, "kind": "mark", "at": 12, "stage": 1}
    plan = {"n_ranks": [1, 1], "count": 60, "room": 4, "out": str(tmp_path / "out"), "folder": str(tmp_path / "run")}
    process = start(tmp_path, 2, [{**plan, "trouble": mark, "slow": {"0": 0.02}}])
    end = time.monotonic() + 60.0
    while not (tmp_path / "out.marker").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    errors = ended(process, 60.0)
    assert time.monotonic() - asked < 20.0
    assert process.returncode != 0
    assert "StopRequested" in errors
    n_known = len(ledger_rows(tmp_path / "run"))
    assert 0 < n_known < 60
    assert in_turn(plan, out=tmp_path / "run", resume=True) == in_turn(plan)
