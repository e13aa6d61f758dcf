"""`a | b | c`, `stage * 4`, and every way in which a pipeline says no before anyone waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dynamics_samples import LennardJones, Well
from pipeline_samples import in_well, stage, systems, well_batch

from carryall.dynamics import (
    FIRE,
    NVE,
    BufferConfig,
    DistributedPipeline,
    FusedStage,
    MemorySink,
    PipelineStage,
    Room,
    SizeAwareSampler,
)
from carryall.dynamics.pipeline.stages import as_stage, checked, program_of
from carryall.errors import InputError

WELL = Well()


def fire(**settings: Any) -> FIRE:
    return FIRE(WELL, **{"n_steps": 3, **settings})


def nve(**settings: Any) -> NVE:
    return NVE(WELL, **{"n_steps": 2, **settings})


def test_operators_make_one_row_of_stages() -> None:
    a, b, c, d = fire(), nve(), nve(), nve()
    pipeline = a | b | (c + d) * 3
    assert [one.engine for one in pipeline.stages[:2]] == [a, b]
    assert isinstance(pipeline.stages[2].engine, FusedStage)
    assert [one.n_ranks for one in pipeline.stages] == [1, 1, 3]
    assert pipeline.n_ranks == 5
    assert [pipeline.stage_of(rank) for rank in range(5)] == [0, 1, 2, 2, 2]
    assert repr(pipeline) == "DistributedPipeline(FIRE | NVE | NVE+NVE * 3, comm_mode='async_recv')"


def test_a_stage_on_many_ranks() -> None:
    a = fire()
    assert (a * 4).n_ranks == (4 * a).n_ranks == (PipelineStage(a, 2) * 2).n_ranks == 4
    named = PipelineStage(a, limits=Room(3), name="relax") * 2
    assert (named.name, named.limits, named.n_ranks) == ("relax", Room(3), 2)
    for bad in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="ranks must be a positive integer"):
            a * bad


@pytest.mark.parametrize("group", ["left", "right", "flat", "halves"])
def test_a_row_is_the_same_however_it_is_put_together(group: str) -> None:
    a, b, c, d = nve(), nve(), nve(), nve()
    made = {
        "left": lambda: ((a | b) | c) | d,
        "right": lambda: a | (b | (c | d)),
        "flat": lambda: DistributedPipeline([a, b, c, d]),
        "halves": lambda: (a | b) | (c | d),
    }[group]()
    assert [one.engine for one in made.stages] == [a, b, c, d]
    names = [one.name for one in made.stages]
    assert len(set(names)) == 4
    assert names == ["NVE", "NVE 2", "NVE 3", "NVE 4"]
    assert len({one.engine.parts[0].prefix for one in made.stages}) == 4
    assert program_of(made.stages) == program_of(DistributedPipeline([a, b, c, d]).stages)


def test_a_mapping_is_taken_in_the_order_of_its_keys() -> None:
    a, b = fire(), nve()
    assert [one.engine for one in DistributedPipeline({1: b, 0: a}).stages] == [a, b]


def test_settings_of_a_pipeline_stay() -> None:
    sink = MemorySink()
    settings: dict[str, Any] = {
        "comm_mode": "sync",
        "buffer_config": BufferConfig(1, 2, 0),
        "synchronized": True,
        "helping": True,
        "sinks": (sink,),
        "timeout": 7.0,
        "step_timeout": 8.0,
    }
    left = (fire() | nve()).with_settings(**settings)
    for made in (left | nve(), nve() | left, left | (nve() | fire()), left.with_settings(timeout=7.0)):
        assert {name: getattr(made, name) for name in settings} == settings
    assert ((nve() | fire()) | left).comm_mode == "async_recv"  # of two the left one's
    assert (fire() | nve(sinks=[sink])).sinks == (sink,)
    given = (fire() | nve()).with_settings(buffer_config={"num_systems": 3, "num_nodes": 4, "num_edges": 0})
    assert given.buffer_config == BufferConfig(3, 4, 0)


def test_a_sampler_gives_its_limits_to_stages_without() -> None:
    sampler = SizeAwareSampler(systems(3), max_atoms=50, max_batch_size=4)
    pipeline = fire(sampler=sampler) | stage(nve(), n_systems=2) | nve()
    assert [one.limits for one in pipeline.stages] == [Room(4, 50), Room(2, 400), Room(4, 50)]
    assert (fire() | nve()).stages[0].limits is None


A = fire()
NO = {
    "one stage": (lambda: DistributedPipeline([fire()]), "at least two stages, got 1"),
    "none": (lambda: DistributedPipeline({}), "at least two stages, got 0"),
    "no dynamics": (lambda: DistributedPipeline([fire(), "relax"]), "must be a dynamics or a fused stage, got 'relax'"),
    "with something else": (lambda: fire() | 3, "must be a dynamics or a fused stage, got 3"),
    "twice the same": (lambda: A | A, "the same dynamics is in two stages"),
    "twice the same, fused": (lambda: A | (nve() + A), "the same dynamics is in two stages"),
    "no steps": (lambda: fire() | nve(n_steps=0), r"NVE of stage 1 \(NVE\) has n_steps=0"),
    "no end": (lambda: fire() | NVE(WELL), r"no system ever leaves stage 1 \(NVE\): give NVE a convergence_hook or n_steps"),
    "no end in the middle": (lambda: fire() | (nve() + NVE(WELL)) | nve(), r"no system ever leaves stage 1 \(NVE\+NVE\)"),
    "a later sampler": (
        lambda: fire() | nve(sampler=SizeAwareSampler(systems(1))),
        r"stage 1 \(NVE\) has a sampler, but takes its systems from the stage before",
    ),
    "sinks in the middle": (
        lambda: fire(sinks=[MemorySink()]) | nve(),
        r"stage 0 \(FIRE\) has sinks, but hands its systems on",
    ),
    "mode": (
        lambda: (fire() | nve()).with_settings(comm_mode="async"),
        "comm_mode must be one of sync, async_recv, fully_async",
    ),
    "timeout": (lambda: (fire() | nve()).with_settings(timeout=0), "timeout must be more than 0 s, got 0"),
    "step_timeout": (lambda: (fire() | nve()).with_settings(step_timeout=-1.0), "step_timeout must be more than 0 s"),
    "timeout of NaN": (lambda: (fire() | nve()).with_settings(timeout=float("nan")), "timeout must be more than 0 s, got nan"),
    "buffer": (
        lambda: (fire() | nve()).with_settings(buffer_config={"num_systems": 1}),
        "BufferConfig lacks num_nodes, num_edges",
    ),
    "buffer, no dict": (
        lambda: (fire() | nve()).with_settings(buffer_config=5),
        "described by a BufferConfig or a dict, got 5",
    ),
    "buffer below 0": (
        lambda: (fire() | nve()).with_settings(buffer_config={"num_systems": -1, "num_nodes": 0, "num_edges": 0}),
        "num_systems of BufferConfig must be an integer of at least 0",
    ),
    "ranks": (lambda: PipelineStage(fire(), 0), "n_ranks must be a positive integer"),
}


@pytest.mark.parametrize("name", NO)
def test_what_cannot_work_is_refused_when_it_is_made(name: str) -> None:
    make, words = NO[name]
    with pytest.raises(InputError, match=words):
        make()


def other_potential(folder: Path) -> None:
    first = FIRE(LennardJones(), n_steps=2) | NVE(LennardJones(), n_steps=2)
    first.run(systems(2), out=folder, progress=False)
    (FIRE(LennardJones(), n_steps=2) | NVE(LennardJones(epsilon=0.02), n_steps=2)).run(
        systems(2), out=folder, resume=True, progress=False
    )


def other_inputs(folder: Path) -> None:
    (fire() | nve()).run(well_batch([0, 1]), out=folder, progress=False)
    (fire() | nve()).run(well_batch([1, 0]).index_select([1, 0]), out=folder, resume=True, progress=False)
    moved = well_batch([0, 1])
    moved.positions = moved.positions + 1.0
    (fire() | nve()).run(moved, out=folder, resume=True, progress=False)


def other_stages(folder: Path) -> None:
    (fire() | nve()).run(well_batch([0, 1]), out=folder, progress=False)
    (fire() | nve(n_steps=3)).run(well_batch([0, 1]), out=folder, resume=True, progress=False)


def twice(folder: Path) -> None:
    (fire() | nve()).run(well_batch([0, 1]), out=folder, progress=False)
    (fire() | nve()).run(well_batch([0, 1]), out=folder, progress=False)


def with_ids(ids: list[int]) -> Any:
    batch = well_batch([0, 1])
    batch.set("system_id", torch.tensor(ids), level="system")
    return batch


RUNS = {
    "resume without a folder": (lambda folder: (fire() | nve()).run([in_well(0)], resume=True), "resume=True needs out="),
    "checkpoint_seconds": (
        lambda folder: (fire() | nve()).run([in_well(0)], checkpoint_seconds=-1),
        "checkpoint_seconds must be 0",
    ),
    "nothing": (lambda folder: (fire() | nve()).run(), "nothing to work on"),
    "no structures": (lambda folder: (fire() | nve()).run([]), "no structures: give at least one"),
    "a path": (lambda folder: (fire() | nve()).run("in.xyz"), "structures must be AtomicData"),
    "a sampler and structures": (
        lambda folder: (fire(sampler=SizeAwareSampler([in_well(0)])) | nve()).run([in_well(0)]),
        "the first stage has a sampler: run",
    ),
    "an id twice": (lambda folder: (fire() | nve()).run(with_ids([3, 3])), "two systems of the batch have the same system_id"),
    "an id below 0": (lambda folder: (fire() | nve()).run(with_ids([3, -5])), "system_id -5"),
    "no sink": (
        lambda folder: (fire() | nve()).with_settings(sinks=["file.h5"]).run([in_well(0)]),
        "a sink must be a DataSink",
    ),
    "another potential": (other_potential, "begun with another potential in stage NVE"),
    "other inputs": (other_inputs, "system 0 of the batch is not the structure that this run had there before"),
    "other stages": (other_stages, "was begun with stages ="),
    "a folder that is taken": (twice, "holds a run already"),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_cannot_run_is_refused_at_once(name: str, tmp_path: Path) -> None:
    run, words = RUNS[name]
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run")


def test_checked_takes_what_it_gave() -> None:
    once = checked([as_stage(nve()), as_stage(nve()), as_stage(fire())])
    assert [one.name for one in checked(once)] == [one.name for one in once] == ["NVE", "NVE 2", "FIRE"]
