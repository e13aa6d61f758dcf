"""Whatever order ranks speak in, and whoever dies when: each input ends once, with the same result."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamics_samples import Well
from hub_plans import LEFT_OVER, NEEDS, Killed, Play, Stage, expected, needs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_samples import in_well

from carryall.data import Batch
from carryall.dynamics import MemorySink
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.ledger import Ledger
from carryall.dynamics.pipeline.books import Books
from carryall.dynamics.pipeline.hub import Hub, Rules
from carryall.dynamics.pipeline.settlement import Sinks
from carryall.dynamics.pipeline.source import source_of
from carryall.dynamics.status import OUTCOME, SYSTEM_ID


class Frail(MemorySink):
    """Outlives those who write to it, some of whom are killed right after or before they have written."""

    def __init__(self, capacity: int | None, kills: set[int]) -> None:
        super().__init__(capacity)
        self.kills, self.calls = kills, 0

    def write(self, batch: Batch, mask: Any = None) -> None:
        self.calls += 1
        if 2 * self.calls in self.kills:
            raise Killed
        super().write(batch, mask)
        if 2 * self.calls + 1 in self.kills:
            raise Killed


def played(ids: list[int], n_stages: int, failing: set[int]) -> Batch:
    """Systems with what players need."""
    batch = moving_batch([in_well(index) for index in ids], ids)
    batch.set("energy", torch.zeros(len(ids), dtype=torch.float64), level="system")
    batch.set("forces", torch.zeros_like(batch.positions), level="atom")
    batch.set("x", torch.ones(len(ids), dtype=torch.float64), level="system")
    batch.set(LEFT_OVER, torch.zeros(len(ids), dtype=torch.int64), level="system")
    needs = [needs_of(index, n_stages, index in failing) for index in ids]
    batch.set(NEEDS, torch.tensor(needs), level="system")
    return batch


def session(folder: Path, play: Play, batch: Batch, sinks: list[Frail], seed: int, trouble: dict[int, str]) -> str | None:
    """One run until it ends, however it does; what the hub says of it."""
    n_stages = len(play.n_ranks)
    with Ledger(folder, {}, resume=True) as ledger, Sinks(sinks) as opened:
        books = Books(ledger, n_stages)
        source = source_of(batch, None, [Well()], books)
        stage = Stage(play, seed, trouble.get)
        rules = Rules(
            tuple(f"stage {place}" for place in range(n_stages)), play.n_ranks, play.helping, 1e9, 1e9, program="a play"
        )
        hub = Hub(books, source, opened, rules, stage.desks())
        hub.inbox = stage  # type: ignore[assignment]
        try:
            hub.serve(lambda counts, seconds: None)
        except Killed:
            return "killed"
        return hub.error or ("stopped" if hub.stopped else None)


def check(folder: Path, n_stages: int, n_inputs: int, failing: set[int], sinks: list[Frail]) -> None:
    """Each input once in the ledger and once in a sink, with the number that any undisturbed run gives it."""
    batches = [sink.read() for sink in sinks if len(sink)]
    ids = [index for batch in batches for index in batch.get(SYSTEM_ID).tolist()]
    assert sorted(ids) == list(range(n_inputs))
    ends = {
        index: (x, bool(outcome == 3))
        for batch in batches
        for index, x, outcome in zip(
            batch.get(SYSTEM_ID).tolist(), batch.get("x").tolist(), batch.get(OUTCOME).tolist(), strict=True
        )
    }
    with Ledger(folder, {}, resume=True) as ledger:
        results = list(ledger.results())
        assert ledger.rows("SELECT count(*) FROM travelling") == [(0,)]
        failed, passed = Books(ledger, n_stages).counts()
    assert [one.index for one in results] == list(range(n_inputs))
    stages = [0] * n_stages
    for one in results:
        x, steps, fails_in = expected(needs_of(one.index, n_stages, one.index in failing))
        assert ends[one.index] == (x, fails_in is not None)
        assert (one.steps, one.outcome) == (steps, "converged" if fails_in is None else "failed")
        if fails_in is not None:
            stages[fails_in] += 1
            assert one.reason == f"in stage {fails_in} (stage {fails_in}): drawn by chance"
    assert failed == stages
    assert passed == [n_inputs - sum(stages[: place + 1]) for place in range(n_stages)]


PLAYS = st.builds(
    Play,
    n_ranks=st.lists(st.integers(1, 2), min_size=2, max_size=3).map(tuple),
    helping=st.booleans(),
    comm_mode=st.sampled_from(["sync", "async_recv", "fully_async"]),
    synchronized=st.booleans(),
    n_systems=st.integers(1, 4),
    n_atoms=st.none() | st.integers(3, 12),
    ahead=st.integers(0, 3),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(PLAYS, st.integers(0, 12), st.sets(st.integers(0, 11), max_size=3), st.integers(0, 2**32))
def test_an_undisturbed_run_ends_with_each_input_once(play: Play, n_inputs: int, failing: set[int], seed: int) -> None:
    n_inputs = max(n_inputs, 1)
    batch, sinks = played(list(range(n_inputs)), len(play.n_ranks), failing), [Frail(None, set())]
    with tempfile.TemporaryDirectory() as folder:
        assert session(Path(folder), play, batch, sinks, seed, {}) is None
        check(Path(folder), len(play.n_ranks), n_inputs, failing, sinks)


TROUBLE = st.dictionaries(st.integers(1, 250), st.sampled_from(["kill", "die", "stop"]), max_size=2)
DISTURBED = st.tuples(
    PLAYS,
    st.integers(1, 10),
    st.sets(st.integers(0, 9), max_size=2),
    st.integers(0, 2**32),
    st.lists(TROUBLE, max_size=5),
    st.lists(st.integers(0, 4), max_size=2),
    st.sets(st.integers(2, 12), max_size=2),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(DISTURBED)
def test_a_disturbed_run_ends_with_each_input_once(plan: tuple) -> None:
    """Ranks die, all are killed, between sink and ledger too, sinks are full: it is resumed with a further sink."""
    play, n_inputs, failing, seed, troubles, capacities, kills = plan
    n_stages, chance = len(play.n_ranks), random.Random(seed)
    batch = played(list(range(n_inputs)), n_stages, failing)
    sinks = [Frail(capacity, kills if not place else set()) for place, capacity in enumerate(capacities)]
    sinks = sinks or [Frail(None, kills)]
    with tempfile.TemporaryDirectory() as folder:
        for trouble in [*troubles, *[{}] * 40]:
            end = session(Path(folder), play, batch, sinks, chance.randint(0, 2**32), trouble)
            if end is None:
                break
            if "nothing is lost" in end:
                sinks.append(Frail(None, set()))
            else:
                assert trouble or end == "killed", end
        assert end is None
        check(Path(folder), n_stages, n_inputs, failing, sinks)


def test_a_play_can_fail() -> None:
    """A hub that forgets a system is found out."""
    play, batch = Play((1, 1)), played([0, 1, 2], 2, set())
    with tempfile.TemporaryDirectory() as folder:
        sinks = [Frail(None, set())]
        assert session(Path(folder), play, batch.index_select([0, 1]), sinks, 1, {}) is None
        with pytest.raises(AssertionError):
            check(Path(folder), 2, 3, set(), sinks)
