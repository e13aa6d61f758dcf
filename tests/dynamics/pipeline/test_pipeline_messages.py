"""Messages come through as they are, and a stage's queue loses nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carryall.dynamics import Room
from carryall.dynamics.pipeline.books import Waiting
from carryall.dynamics.pipeline.messages import Message, decode, encode
from carryall.dynamics.pipeline.queues import LOOK_AHEAD, StageQueue

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.text(max_size=9), st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), st.lists(st.binary(max_size=40), max_size=5)
)
def test_a_message_comes_through(kind: str, facts: dict, blobs: list[bytes]) -> None:
    found = decode(encode(Message(kind, facts, blobs)))
    assert (found.kind, found.facts, list(found.blobs)) == (kind, facts, blobs)


def test_empty_blobs_and_infinity_come_through() -> None:
    found = decode(encode(Message("claim", {"room": math.inf, "none": None}, [b"", b"x", b""])))
    assert (found.facts, list(found.blobs)) == ({"room": math.inf, "none": None}, [b"", b"x", b""])


LIMIT = st.none() | st.integers(0, 12)
TAKES = st.lists(st.tuples(LIMIT, LIMIT, st.booleans(), LIMIT, st.lists(st.integers(1, 9), max_size=4)), max_size=12)


@given(st.lists(st.integers(1, 9), max_size=12), TAKES)
def test_a_queue_gives_each_system_once_and_what_fits(sizes: list[int], takes: list) -> None:
    came = [Waiting(index, size) for index, size in enumerate(sizes)]
    queue, given = StageQueue(came), []
    for n_systems, n_atoms, must, most, more in takes:
        before = [one for one in came if one not in given]
        assert len(queue) == len(before)
        found = queue.take(Room(n_systems, n_atoms), must, most)
        fits = all(limit is None or len(found) <= limit for limit in (n_systems, most))
        fits = fits and (n_atoms is None or sum(one.n_atoms for one in found) <= n_atoms)
        assert fits or (must and found == before[:1])
        assert not (must and before and not found)
        assert found == [one for one in before if one in found]  # the oldest first
        if fits and (n_systems, n_atoms, most) == (None, None, None):
            assert found == before
        given += found
        new = [Waiting(len(came) + place, size) for place, size in enumerate(more)]
        came += new
        queue.add(new)
    left = queue.take(Room(), False)
    assert sorted(one.id for one in [*given, *left]) == [one.id for one in came]
    assert not len(queue)


def test_a_queue_takes_what_fits_past_what_does_not() -> None:
    queue = StageQueue([Waiting(0, 9), Waiting(1, 2), Waiting(2, 9), Waiting(3, 3), Waiting(4, 1)])
    assert [one.id for one in queue.take(Room(None, 5), False)] == [1, 3]
    assert [one.id for one in queue.take(Room(None, 5), True)] == [4]
    assert queue.take(Room(None, 5), False) == []
    assert [one.id for one in queue.take(Room(None, 5), True)] == [0]  # the oldest, beyond the room
    assert [one.id for one in queue.take(Room(None, None), False)] == [2]
    assert queue.take(Room(), True) == []


@pytest.mark.parametrize(("ahead", "found"), [(LOOK_AHEAD - 1, True), (LOOK_AHEAD, False)])
def test_a_queue_looks_a_bounded_way_ahead_and_keeps_the_order(ahead: int, found: bool) -> None:
    queue = StageQueue([*(Waiting(index, 9) for index in range(ahead)), Waiting(ahead, 1)])
    assert bool(queue.take(Room(None, 3), False)) == found
    assert [one.id for one in queue.take(Room(), False)] == list(range(ahead + (not found)))


def test_systems_that_are_done_leave_a_queue() -> None:
    queue = StageQueue(Waiting(index, 1) for index in range(5))
    queue.drop({1, 3})
    assert [one.id for one in queue.take(Room(), False)] == [0, 2, 4]
