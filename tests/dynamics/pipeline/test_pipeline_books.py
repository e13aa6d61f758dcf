"""The books of a pipeline: whatever happens, each input is in exactly one place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_samples import in_well, taken_up, well_batch

from carryall.dynamics import RelaxResult
from carryall.dynamics.blobs import batch_from_bytes, batch_to_bytes
from carryall.dynamics.ledger import FINISHED, IN_STAGE, Ledger
from carryall.dynamics.pipeline.books import Books, State, Waiting, batch_head, split_head
from carryall.errors import CarryallError

N_STAGES = 3


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    with Ledger(tmp_path, {"stages": "some"}) as ledger:
        yield Books(ledger, N_STAGES)


def places(books: Books) -> dict[int, int | str]:
    """The stage of each input, or what it is; fails unless it is in one place only."""
    rows = books.ledger.rows("SELECT id, state, stage FROM systems")
    travelling = dict(books.ledger.rows("SELECT id, stage FROM travelling"))
    assert len(rows) == len({index for index, _, _ in rows})
    assert {index for index, state, _ in rows if state != FINISHED} == set(travelling)
    assert {state for _, state, _ in rows} <= {FINISHED, IN_STAGE}
    for index, state, stage in rows:
        assert state == FINISHED or stage == travelling[index]
    waiting = [one.id for stage in range(N_STAGES + 1) for one in books.waiting(stage)]
    assert sorted(waiting) == sorted(travelling)
    assert books.known == {index for index, _, _ in rows}
    return {index: FINISHED if state == FINISHED else stage for index, state, stage in rows}


def result(index: int, outcome: str = "converged") -> RelaxResult:
    return RelaxResult(index, outcome, None, 3, -1.0, 0.1, in_well(index))


def state(index: int, positions: float) -> State:
    return State(index, in_well(index).n_atoms, batch_to_bytes(marked([index], positions), {}))


def marked(ids: list[int], positions: float):
    batch = well_batch(ids)
    batch.positions = torch.full_like(batch.positions, positions)
    return batch


def mark(books: Books, index: int) -> float:
    """What `marked` wrote into a system's state."""
    (found,) = books.states([index])
    return float(batch_from_bytes(found.blob)[0].positions[0, 0])


def test_a_system_goes_through_all_stages(books: Books) -> None:
    books.take_up([taken_up(0), taken_up(1)])
    assert places(books) == {0: 0, 1: 0}
    books.move([state(1, 5.0)], 0, 1)
    assert (places(books), mark(books, 1)) == ({0: 0, 1: 1}, 5.0)
    assert books.waiting(0) == [Waiting(0, in_well(0).n_atoms)]
    books.finish([result(1)], [N_STAGES], {"sinks": [1]})
    assert places(books) == {0: 0, 1: FINISHED}
    assert (len(books), books.ledger.fact("sinks"), 1 in books, 2 in books) == (1, [1], True, False)
    assert (books.hash_of(0), books.hash_of(1), books.hash_of(7)) == (b"hash 0", b"hash 1", None)
    original, _, _ = books.original(0)
    assert torch.equal(original.positions, in_well(0).positions)


def test_nothing_goes_twice_or_from_where_it_is_not(books: Books) -> None:
    books.take_up([taken_up(0), taken_up(1), taken_up(2)])
    books.move([state(0, 1.0)], 0, 1)
    with pytest.raises(CarryallError, match="system 0 that came from stage 0"):
        books.move([state(1, 1.0), state(0, 1.0)], 0, 1)
    assert places(books) == {0: 1, 1: 0, 2: 0}  # nothing of it was done
    assert mark(books, 1) != 1.0
    with pytest.raises(CarryallError, match="system 9 that came from stage 0"):
        books.move([state(9, 1.0)], 0, 1)
    books.finish([result(2)], [0], {})
    with pytest.raises(CarryallError, match="system 2 that is done"):
        books.finish([result(1), result(2)], [0, 0], {"sinks": [9]})
    with pytest.raises(CarryallError, match="system 2 that came from stage"):
        books.move([state(2, 1.0)], 0, 1)
    assert places(books) == {0: 1, 1: 0, 2: FINISHED}
    assert books.ledger.fact("sinks") is None
    with pytest.raises(Exception, match="UNIQUE"):
        books.take_up([taken_up(5), taken_up(2)])
    assert set(places(books)) == {0, 1, 2}


def test_a_refused_input_is_done(books: Books) -> None:
    books.refuse(result(4, "failed"), b"content")
    books.refuse(result(5, "failed"), None)
    assert places(books) == {4: FINISHED, 5: FINISHED}
    assert (books.hash_of(4), books.hash_of(5)) == (b"content", None)
    assert books.counts() == ([2, 0, 0], [0, 0, 0])


def test_counts_of_passed_and_failed(books: Books) -> None:
    books.take_up([taken_up(index) for index in range(4)])
    books.finish([result(0, "failed"), result(1)], [1, N_STAGES], {})
    books.move([state(2, 0.0)], 0, 2)
    assert books.counts() == ([0, 1, 0], [3, 2, 1])


def test_a_saved_state_counts_only_in_its_own_stage(tmp_path: Path) -> None:
    with Ledger(tmp_path, {}) as ledger:
        books = Books(ledger, N_STAGES)
        books.take_up([taken_up(index) for index in range(4)])
        # saved in stage 0 by rank 0; then 1 goes on, and 2 is done
        books.save(0, 0, [True, False, True], batch_to_bytes(marked([0, 1, 2], 7.0), {}), 12)
        books.move([state(1, 3.0)], 0, 1)
        books.finish([result(2)], [0], {})
        before = places(books)
    with Ledger(tmp_path, {}, resume=True) as ledger:
        books = Books(ledger, N_STAGES)
        assert places(books) == before == {0: 0, 1: 1, 2: FINISHED, 3: 0}
        zero, one, three = books.states([0, 1, 3])
        assert (mark(books, 0), zero.fresh, zero.primed) == (7.0, False, True)
        assert (mark(books, 1), one.fresh, one.primed) == (3.0, True, False)
        assert (three.fresh, three.primed) == (True, False)
        assert ledger.rows("SELECT * FROM in_flight") == []


def test_the_last_save_of_a_rank_counts_and_a_forgotten_one_does_not(tmp_path: Path) -> None:
    with Ledger(tmp_path, {}) as ledger:
        books = Books(ledger, N_STAGES)
        books.take_up([taken_up(index) for index in range(3)])
        books.save(0, 0, [True], batch_to_bytes(marked([0], 1.0), {}), 1)
        books.save(0, 0, [False], batch_to_bytes(marked([0], 2.0), {}), 2)
        books.save(1, 0, [True], batch_to_bytes(marked([1], 3.0), {}), 2)
        books.save(2, 0, [True], batch_to_bytes(marked([2], 4.0), {}), 2)
        books.forget(1)
        before = mark(books, 1)
        books.settle()
        assert [mark(books, index) for index in range(3)] == [2.0, before, 4.0]
        assert [(one.fresh, one.primed) for one in books.states([0, 1, 2])] == [(False, False), (True, False), (False, True)]


@given(st.integers(0, 2**31), st.lists(st.booleans(), max_size=20), st.binary(max_size=30))
def test_the_head_of_a_saved_batch_comes_through(stage: int, primed: list[bool], rest: bytes) -> None:
    assert split_head(batch_head(stage, primed) + rest) == (stage, primed, rest)


MOVES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, N_STAGES)), max_size=25)


@settings(max_examples=25, deadline=None)
@given(MOVES)
def test_each_input_is_in_one_place_after_any_moves(moves: list[tuple[int, int, int]]) -> None:
    """What is not allowed changes nothing; what is allowed changes the one system that it names."""
    with tempfile.TemporaryDirectory() as folder, Ledger(folder, {}) as ledger:
        books, model, stamps = Books(ledger, N_STAGES), {}, {}
        for number, (index, kind, stage) in enumerate(moves):
            allowed = True
            try:
                if kind == 0:
                    books.take_up([taken_up(index)])
                elif kind == 1:
                    books.move([state(index, float(number))], stage, min(stage + 1, N_STAGES))
                elif kind == 2:
                    books.finish([result(index)], [stage], {})
                elif kind == 3:
                    books.save(stage, stage, [True], batch_to_bytes(marked([index], float(number)), {}), number)
                    stamps[stage] = (index, stage, float(number))
                elif kind == 4:
                    books.forget(stage)
                    stamps.pop(stage, None)
                else:
                    before = {one: mark(books, one) for one, at in model.items() if at != FINISHED}
                    books = Books(ledger, N_STAGES)  # as after a kill
                    expected = before | {one: value for one, at, value in stamps.values() if model.get(one) == at}
                    assert {one: mark(books, one) for one in before} == expected
                    stamps = {}
            except Exception:
                allowed = False
            known = index in model
            if kind == 0:
                assert allowed != known
                model.setdefault(index, 0)
            elif kind == 1:
                assert allowed == (model.get(index) == stage)
                if allowed:
                    model[index] = min(stage + 1, N_STAGES)
            elif kind == 2:
                assert allowed == (known and model[index] != FINISHED)
                if allowed:
                    model[index] = FINISHED
            else:
                assert allowed
            assert places(books) == model
