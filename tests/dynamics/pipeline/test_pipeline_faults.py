"""No rank waits for ever, and none hides what another one died of; what was done is kept, and the run can go on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from pipeline_nursery import Nursery, Run
from screening_samples import ledger_rows

from carryall.dynamics import ExtXYZSink, HDF5Sink
from carryall.dynamics.blobs import batch_from_bytes
from carryall.dynamics.pipeline.books import split_head

COUNT = 20
PLAN: dict[str, Any] = {"size": 2, "n_ranks": [1, 1], "count": COUNT, "room": 4, "frequency": 2}
BOUND = 30.0
"""Seconds in which the others end when a rank has died."""
STOPPED = 20.0
"""Seconds in which all end when they are asked to."""


def plan_at(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    return {**PLAN, "out": str(tmp_path / "out"), "folder": str(tmp_path / "run"), **settings}


def goes_on(nursery: Nursery, tmp_path: Path, **settings: Any) -> None:
    """Resumed without the trouble it ends with the results of an undisturbed run."""
    found = nursery.run(**{**plan_at(tmp_path, **settings), "out": str(tmp_path / "again"), "resume": True})
    whole = nursery.run(**{**plan_at(tmp_path, **settings), "out": str(tmp_path / "whole"), "folder": None, "sinks": []})
    assert found == whole
    assert [one["index"] for one in found] == list(range(COUNT))


def ended(run: Run, timeout: float) -> None:
    run.wait(timeout=timeout)
    assert 0 not in run.codes.values(), run.logs()


def last_line(run: Run, rank: int) -> str:
    return run.log(rank).strip().splitlines()[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_other_with_its_error(nursery: Nursery, tmp_path: Path, rank: int) -> None:
    trouble = {"rank": rank, "kind": "raise", "at": 12, "stage": rank}
    run = nursery.start(**plan_at(tmp_path, trouble=trouble))
    ended(run, BOUND)
    assert last_line(run, rank) == f"RuntimeError: the model of rank {rank} is broken"
    assert "PeerError" not in run.log(rank)
    name = ("FIRE", "NVE")[rank]
    assert last_line(run, 1 - rank).endswith(
        f"PeerError: rank {rank} (stage {rank}: {name}) failed: RuntimeError: the model of rank {rank} is broken"
    )
    goes_on(nursery, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(nursery: Nursery, tmp_path: Path, rank: int) -> None:
    run = nursery.start(**plan_at(tmp_path, trouble={"rank": rank, "kind": "SIGKILL", "at": 12, "stage": rank}))
    ended(run, BOUND)
    assert run.codes == {rank: -signal.SIGKILL, 1 - rank: 1}
    words = last_line(run, 1 - rank)
    if rank:
        assert "PeerError: the connection to rank 1 (stage 1: NVE, " in words
        assert "ended without a word: it was killed, or its machine is gone" in words
    else:
        assert "PeerError: rank 1: the connection to rank 0, which keeps the ledger, ended without a word" in words
    goes_on(nursery, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_other(nursery: Nursery, tmp_path: Path, rank: int) -> None:
    run = nursery.start(**plan_at(tmp_path, timeout=3.0, trouble={"rank": rank, "kind": "SIGSTOP", "at": 12, "stage": rank}))
    try:
        run.wait(1 - rank, timeout=BOUND)
        assert run.codes == {1 - rank: 1}
        words = last_line(run, 1 - rank)
        if rank:
            assert "PeerError: rank 0 heard nothing from rank 1 (stage 1: NVE) for 3 s while it waited" in words
        else:
            assert "PeerError: rank 1 heard nothing from rank 0, which keeps the ledger, for 3 s" in words
        assert "was stopped, or the network is cut" in words
    finally:
        run.kill_all()
    goes_on(nursery, tmp_path)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_asked_to_stop_all_save_and_end(nursery: Nursery, tmp_path: Path, ranks: list[int]) -> None:
    mark = {"rank": 1, "kind": "mark", "at": 12, "stage": 1}
    run = nursery.start(**plan_at(tmp_path, count=200, trouble=mark, slow={"0": 0.01}))
    run.wait_for(Path(run.plan["out"] + ".marker"))
    for rank in ranks:
        run.signal(rank, signal.SIGTERM)
    ended(run, STOPPED)
    assert [run.codes[rank] for rank in ranks] == [130] * len(ranks), run.logs()
    assert set(run.codes.values()) == {130}, run.logs()
    assert "StopRequested" in last_line(run, 0)
    rows = ledger_rows(tmp_path / "run")
    assert 0 < len(rows) == len({row[0] for row in rows}) < 200


def test_asked_to_stop_a_rank_saves_its_last_step(nursery: Nursery, tmp_path: Path) -> None:
    trouble = {"rank": 1, "kind": "SIGTERM", "at": 30, "stage": 1}
    run = nursery.start(**plan_at(tmp_path, n_steps=100_000, trouble=trouble, checkpoint_seconds=1e6))
    ended(run, STOPPED)
    saved = {rank: blob for rank, _, blob in ledger_rows(tmp_path / "run", "in_flight")}
    stage, primed, blob = split_head(saved[1])
    batch, _ = batch_from_bytes(blob)
    assert stage == 1
    assert any(primed)
    assert int(batch.nve_steps.max()) in (29, 30)  # the first call may have been for the forces at the start only


def test_after_a_stop_it_goes_on(nursery: Nursery, tmp_path: Path) -> None:
    run = nursery.start(**plan_at(tmp_path, trouble={"rank": 1, "kind": "SIGTERM", "at": 20, "stage": 1}))
    ended(run, STOPPED)
    goes_on(nursery, tmp_path)


def test_ranks_with_different_programs_end_at_once(nursery: Nursery, tmp_path: Path) -> None:
    run = nursery.start(**plan_at(tmp_path, other_program=1))
    ended(run, BOUND)
    for rank in range(2):
        assert "PeerError: rank 1 runs another program than rank 0: its stages are" in last_line(run, rank)
        assert "start the same script with the same settings on all ranks" in last_line(run, rank)


def test_a_wrong_number_of_ranks_ends_before_anyone_waits(nursery: Nursery, tmp_path: Path) -> None:
    run = nursery.start(**plan_at(tmp_path, n_ranks=[1, 2]))
    ended(run, BOUND)
    for rank in range(2):
        words = "InputError: the pipeline has 2 stages on 3 ranks, torchrun has started 2: start it with --nproc-per-node 3"
        assert words in last_line(run, rank)
    assert not (tmp_path / "run").exists()


def test_rank_0_that_cannot_begin_says_so_to_all(nursery: Nursery, tmp_path: Path) -> None:
    nursery.run(**plan_at(tmp_path, count=3))
    run = nursery.start(**plan_at(tmp_path, count=3))
    ended(run, BOUND)
    assert "InputError: " in last_line(run, 0)
    assert "holds a run already" in last_line(run, 0)
    assert "InputError: rank 0 could not begin: " in last_line(run, 1)
    assert "holds a run already" in last_line(run, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sinks": [["unwritable", None]]}, "OSError: no space left on device"),
        ({"source": "generator", "breaks_at": 15}, "OSError: the archive is damaged"),
    ],
    ids=["disk full", "data set breaks"],
)
def test_what_breaks_on_rank_0_ends_all_with_its_own_error(
    nursery: Nursery, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    run = nursery.start(**plan_at(tmp_path, **settings))
    ended(run, BOUND)
    assert last_line(run, 0) == words
    assert f"PeerError: rank 0 could not keep the ledger: {words}" in last_line(run, 1)
    goes_on(nursery, tmp_path)


def test_full_sinks_end_the_run_and_a_further_one_completes_it(nursery: Nursery, tmp_path: Path) -> None:
    sinks: list[list[Any]] = [["h5", 5], ["extxyz", 4]]
    failing = {"model": "failing", "sink_path": str(tmp_path / "sink")}
    run = nursery.start(**plan_at(tmp_path, sinks=sinks, **failing))
    ended(run, BOUND)
    for rank in range(2):
        assert "do not fit into the 2 sinks" in last_line(run, rank)
        assert "nothing is lost: give the run a further sink and resume it" in last_line(run, rank)
    again = nursery.start(**plan_at(tmp_path, sinks=sinks, resume=True, **failing))
    ended(again, BOUND)
    assert "nothing is lost" in last_line(again, 0)
    goes_on(nursery, tmp_path, sinks=[*sinks, ["h5", None]], **failing)
    ids = []
    for path in sorted(tmp_path.glob("sink.*")):
        with (HDF5Sink if path.suffix == ".h5" else ExtXYZSink)(path) as sink:
            ids.append(sink.read().system_id.tolist())
    assert sorted(map(len, ids)) == sorted([5, 4, COUNT - 9])
    assert sorted(index for one in ids for index in one) == list(range(COUNT))
