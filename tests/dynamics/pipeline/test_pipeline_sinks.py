"""A crash between the sink and the ledger: each result ends once in the sink and once in the ledger, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline_samples import COPPER, Failing, bits, relax_and_move, stage, systems
from screening_samples import ledger_rows

from carryall.data import Batch
from carryall.dynamics import DistributedPipeline, ExtXYZSink, HDF5Sink, MemorySink, RelaxResult

COUNT, FAILING = 14, (3, 9)


class Crash(BaseException):
    """The process has ended."""


def crashing(kind: type, when: str, at: int) -> type:
    """A sink that ends the process at one of its writes: before anything is written, or before the ledger is told."""

    class Crashing(kind):  # type: ignore[misc, valid-type]
        calls = 0

        def write(self, batch: Batch, mask: Any = None) -> None:
            self.calls += 1
            if self.calls == at and when == "before":
                raise Crash
            super().write(batch, mask)
            if self.calls == at and when == "after":
                raise Crash

    return Crashing


def run(folder: Path | None, sinks: list[Any], resume: bool = False) -> list[RelaxResult]:
    relax, move = relax_and_move(Failing(), n_steps=6)
    pipeline = DistributedPipeline([stage(relax, n_systems=4), stage(move, n_systems=4)], sinks=sinks)
    found = pipeline.run(systems(COUNT, FAILING), out=folder, resume=resume, progress=False)
    assert found is not None
    return list(found)


KINDS: dict[str, list[tuple[type, str, int | None]]] = {
    "h5": [(HDF5Sink, "a.h5", None)],
    "extxyz": [(ExtXYZSink, "a.extxyz", None)],
    "h5, then extxyz": [(HDF5Sink, "a.h5", 3), (ExtXYZSink, "b.extxyz", None)],
    "extxyz, then h5": [(ExtXYZSink, "a.extxyz", 5), (HDF5Sink, "b.h5", None)],
}


def opener(kind: type, path: Path, capacity: int | None) -> Callable[[], Any]:
    return lambda: kind(path, capacity)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", KINDS)
def test_a_crash_between_sink_and_ledger_is_healed(tmp_path: Path, name: str, when: str) -> None:
    kinds, folder = KINDS[name], tmp_path / "run"
    healthy = [opener(kind, tmp_path / file, capacity) for kind, file, capacity in kinds]
    for place, at in ((0, 1), (len(kinds) - 1, 1), (len(kinds) - 1, 2)):
        sinks = list(healthy)
        kind, file, capacity = kinds[place]
        sinks[place] = opener(crashing(kind, when, at), tmp_path / file, capacity)
        with pytest.raises(Crash):
            run(folder, sinks, resume=True)
    rows = ledger_rows(folder)
    n_finished = sum(row[1] == "finished" for row in rows)
    stored = [len(one()) for one in (opened(healthy[place]) for place in range(len(kinds)))]
    assert sum(stored) > n_finished if when == "after" else sum(stored) == n_finished
    found, whole = run(folder, healthy, resume=True), run(None, [])
    assert [bits(one) for one in found] == [bits(one) for one in whole]
    assert [one.reason for one in found] == [one.reason for one in whole]
    assert [one.index for one in found if one.outcome == "failed"] == list(FAILING)
    ids, numbers = [], {}
    for kind, file, _ in kinds:
        with kind(tmp_path / file) as sink:
            batch = sink.read()
        ids += batch.system_id.tolist()
        for data, index in zip(batch.to_data_list(), batch.system_id.tolist(), strict=True):
            numbers[index] = data.atomic_numbers.tolist()
    assert sorted(ids) == list(range(COUNT))
    assert numbers == {index: data.atomic_numbers.tolist() for index, data in enumerate(systems(COUNT, FAILING))}
    assert {index for index, one in numbers.items() if COPPER in one} == set(FAILING)


def opened(make: Callable[[], Any]) -> Callable[[], list[int]]:
    def ids() -> list[int]:
        with make() as sink:
            return list(range(len(sink)))

    return ids


def test_results_that_are_in_the_sink_are_no_work(tmp_path: Path) -> None:
    """A sink that holds systems of another run gives none of them to this one."""
    sink = MemorySink()
    first = run(tmp_path / "one", [sink])
    second = run(tmp_path / "two", [sink])
    assert [bits(one) for one in first] == [bits(one) for one in second]
    assert len(sink) == 2 * COUNT
    assert sorted(sink.read().system_id.tolist()) == sorted([*range(COUNT), *range(COUNT)])


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    sink = MemorySink()
    first = run(tmp_path / "run", [sink])
    before = ledger_rows(tmp_path / "run")
    again = run(tmp_path / "run", [sink], resume=True)
    assert [bits(one) for one in first] == [bits(one) for one in again]
    assert (len(sink), ledger_rows(tmp_path / "run")) == (COUNT, before)
