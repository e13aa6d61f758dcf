"""What the hub answers, line by line: words that cross on the way, ranks that never come, that are silent or hang."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamics_samples import Well
from test_pipeline_plans import played

from carryall.dynamics import MemorySink, Outcome
from carryall.dynamics.blobs import batch_from_bytes, batch_to_bytes
from carryall.dynamics.ledger import Ledger
from carryall.dynamics.pipeline import hub as module
from carryall.dynamics.pipeline.books import Books
from carryall.dynamics.pipeline.hub import Desk, Hub, Rules
from carryall.dynamics.pipeline.messages import Message, decode, encode
from carryall.dynamics.pipeline.outcome import HISTORY
from carryall.dynamics.pipeline.settlement import Sinks
from carryall.dynamics.pipeline.source import source_of

Lines = Generator[tuple[int, Message], None, None]


class Table:
    """A hub, and what it has said to each rank."""

    def __init__(self, books: Books, n_ranks: tuple[int, ...], count: int, **rules: Any) -> None:
        self.said: dict[int, list[Message]] = {}
        self.silence: dict[int, float] = {}
        own = [stage for stage, ranks in enumerate(n_ranks) for _ in range(ranks)]
        desks = []
        for rank, stage in enumerate(own):
            self.said[rank], self.silence[rank] = [], 0.0
            desks.append(Desk(rank, stage, self.said[rank].append, lambda rank=rank: self.silence[rank], here=rank == 0))
        names = tuple(f"stage {place}" for place in range(len(n_ranks)))
        settings = {"helping": False, "timeout": 1e9, "step_timeout": 1e9, "program": "this", **rules}
        source = source_of(played(list(range(count)), len(n_ranks), set()), None, [Well()], books)
        self.hub = Hub(books, source, Sinks([MemorySink()]), Rules(names, n_ranks, **settings), desks)

    def serve(self, lines: Callable[[], Lines]) -> None:
        """Serve what ranks say; the run must have ended when they have said all."""
        script = lines()

        class Inbox:
            def get(self, timeout: float) -> tuple[int, Message]:
                rank, message = next(script)
                if message.kind == "nothing":
                    raise queue.Empty
                return rank, decode(encode(message))

        self.hub.inbox = Inbox()  # type: ignore[assignment]
        self.hub.serve(lambda counts, seconds: None)

    def last(self, rank: int) -> Message:
        return self.said[rank][-1]


@pytest.fixture
def books(tmp_path: Path) -> Any:
    with Ledger(tmp_path, {}) as ledger:
        yield Books(ledger, 2)


def claim(stage: int | None, n_systems: int = 9, must: bool = True, wait: bool = True) -> Message:
    return Message("claim", {"stage": stage, "n_systems": n_systems, "n_atoms": None, "must": must, "wait": wait})


HELLO = Message("hello", {"program": "this"})
LEFT = Message("left", {"asked": False})
NOTHING = Message("nothing")


def ids(message: Message) -> list[int]:
    assert message.kind == "systems"
    return list(message.facts["ids"])


def deliver(stage: int, message: Message, places: list[int], number: int = 1) -> Message:
    facts = {"stage": stage, "number": number, "failed": [False] * len(places)}
    facts |= {name: [message.facts[name][place] for place in places] for name in ("ids", "n_atoms")}
    return Message("deliver", facts, [done(message.blobs[place]) for place in places])


def done(blob: bytes) -> bytes:
    batch, _ = batch_from_bytes(blob)
    batch.set("outcome", torch.tensor([int(Outcome.CONVERGED)]), level="system")
    batch.info[0][HISTORY] = [*batch.info[0].get(HISTORY, []), {"stage": "some", "outcome": "converged", "steps": 1}]
    return batch_to_bytes(batch, {})


def give_back(stage: int, ids: list[int], sizes: dict[int, int], half: bool) -> Message:
    untouched = [(index, sizes[index]) for index in ids]
    return Message("give_back", {"stage": stage, "ids": [], "n_atoms": [], "primed": [], "untouched": untouched, "half": half})


def test_words_that_cross_bring_no_system_into_another_stage(books: Books) -> None:
    """A rank that helps is called back while it shares: what it says before it hears of it gets it nothing of the old stage."""
    table = Table(books, (2, 1), 24, helping=True)
    sizes = dict.fromkeys(range(24), 1)

    def lines() -> Lines:
        yield 1, HELLO
        yield 2, HELLO
        yield 2, claim(1)
        assert table.last(2).kind == "assign"
        yield 2, give_back(1, [], sizes, half=False)
        yield 2, claim(0)
        helping = ids(table.last(2))
        assert len(helping) == 8
        yield 0, claim(0)
        first = table.last(0)
        while len(table.hub.queues[0]):
            yield 0, claim(0, 99)
        yield 2, claim(0, 1, must=False)  # it has room, and waits
        n_said = len(table.said[2])
        yield 1, claim(0)  # rank 1 has nothing: rank 0 has more, and is asked to share
        assert "share" in (table.last(0).kind, table.last(2).kind)
        yield 0, deliver(0, first, [0])  # a system waits for stage 1 now: rank 2 is called back
        assert [one.kind for one in table.said[2][n_said:] if one.kind != "share"] == ["assign"]
        n_said = len(table.said[2])
        yield 2, give_back(0, helping[-4:], sizes, half=True)  # it shares, and has not heard yet
        assert len(table.hub.queues[0])
        yield 2, claim(0)  # nor now
        assert all(one.kind != "systems" or one.facts["stage"] == 1 for one in table.said[2][n_said:])
        yield 2, give_back(0, helping[:-4], sizes, half=False)
        yield 2, claim(1)
        assert table.last(2).facts["stage"] == 1
        assert ids(table.last(2)) == [first.facts["ids"][0]]
        yield 0, Message("left", {"asked": True})
        yield 1, LEFT
        yield 2, LEFT

    table.serve(lines)
    assert table.hub.stopped


def test_systems_on_their_way_to_a_rank_are_held_by_it(books: Books) -> None:
    """What was sent to a rank and crosses with its giving back is not forgotten: the run does not end without it."""
    table = Table(books, (1, 1), 2)

    def lines() -> Lines:
        yield 1, HELLO
        yield 0, claim(0, 1)
        first = table.last(0)
        yield 0, claim(0, 1)
        second = table.last(0)
        sizes = dict.fromkeys(range(2), 1)
        yield 0, give_back(0, ids(first), sizes, half=True)
        yield 1, claim(1)
        yield 0, claim(0, 1)
        third = table.last(0)
        assert ids(third) == ids(first)
        yield 0, deliver(0, third, [0])
        assert ids(table.last(1)) == ids(first)
        yield 1, deliver(1, table.last(1), [0])
        assert all(one.kind != "end" for one in table.said[1])
        yield 1, claim(1)
        yield 0, deliver(0, second, [0], 2)
        yield 1, deliver(1, table.last(1), [0], 2)
        assert table.last(1).kind == "end"
        yield 0, LEFT
        yield 1, LEFT

    table.serve(lines)
    assert len(books) == 2


def test_a_rank_that_never_came_is_not_waited_for_when_the_run_ends(books: Books) -> None:
    table = Table(books, (1, 1), 2)

    def lines() -> Lines:
        yield 0, claim(0)
        yield 0, Message("left", {"asked": True})
        raise AssertionError("it still waits")

    table.serve(lines)
    assert table.hub.stopped


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("silent", r"rank 0 heard nothing from rank 1 \(stage 1: stage 1\) for 5 s while it waited for its next word"),
        (
            "hangs",
            r"rank 0 waited 60 s for rank 1 \(stage 1: stage 1\) to end step 8 with 0 systems: it hangs, or step_timeout",
        ),
        ("absent", r"rank 0 waited \d+ s for rank 1, which has never come"),
    ],
)
def test_a_rank_that_says_nothing_is_named(books: Books, monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    monkeypatch.setattr(module, "TICK", 0.0)
    table = Table(books, (1, 1), 2, timeout=5.0, step_timeout=60.0)

    def lines() -> Lines:
        if kind != "absent":
            yield 1, HELLO
            yield 1, Message("alive", {"step": 7})
        yield 0, NOTHING
        assert table.hub.error is None
        if kind == "silent":
            table.silence[1] = 5.1
        elif kind == "hangs":
            table.hub.desks[1].spoke -= 60.1
        else:
            table.hub._began -= 601.0
        yield 0, NOTHING
        assert table.last(0).kind == "stop"
        assert table.last(0).facts["error"] == table.hub.error
        yield 0, LEFT

    table.serve(lines)
    assert re.match(words, table.hub.error or "")


def test_who_does_not_leave_is_left_behind(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK", 0.0)
    monkeypatch.setattr(module, "LEAVING", 0.0)
    table = Table(books, (1, 1), 2)

    def lines() -> Lines:
        yield 1, HELLO
        yield 0, Message("left", {"asked": True})
        yield 1, NOTHING
        raise AssertionError("it waits for a rank that does not leave")

    table.serve(lines)
    assert table.hub.stopped
