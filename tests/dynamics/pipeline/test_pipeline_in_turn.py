"""One process works in turn through all stages: what comes out is what the fused stages make of each system by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamics_samples import LennardJones, Well
from pipeline_samples import (
    Failing,
    Slow,
    bits,
    fused_alone,
    in_well,
    relax_and_move,
    stage,
    system,
    systems,
    well_batch,
)

from carryall.data import AtomicData, Batch, read_structures
from carryall.dynamics import (
    FIRE,
    NVE,
    DistributedPipeline,
    GradientDescent,
    HookStageEnum,
    MemorySink,
    NVTLangevin,
    Outcome,
    RelaxResult,
    SizeAwareSampler,
    Unreadable,
)
from carryall.dynamics.stopping import StopRequested

SAME = ("index", "outcome", "steps", "energy", "positions", "velocities", "atomic_numbers")


def run(pipeline: DistributedPipeline, structures: Any = None, **settings: Any) -> list[RelaxResult]:
    found = pipeline.run(structures, progress=False, **settings)
    assert found is not None
    return list(found)


def same(found: list[RelaxResult], expected: list[dict[str, Any]]) -> None:
    mine = [bits(one) for one in found]
    assert [{key: one[key] for key in SAME} for one in mine] == [{key: one[key] for key in SAME} for one in expected]


@pytest.mark.parametrize("comm_mode", ["sync", "async_recv", "fully_async"])
@pytest.mark.parametrize("velocities", [False, True])
def test_two_stages_are_the_fused_stage_bit_for_bit(comm_mode: str, velocities: bool) -> None:
    model, structures = LennardJones(), systems(17, velocities=velocities)
    relax, move = relax_and_move(model)
    found = run((stage(relax) | stage(move)).with_settings(comm_mode=comm_mode), structures)
    relax, move = relax_and_move(model)
    same(found, fused_alone(structures, relax + move))
    assert [one.structure.info["name"] for one in found if one.structure] == [f"input {index}" for index in range(17)]
    assert {one.structure.info["stages"][1]["steps"] for one in found if one.structure} == {20}
    assert {one.outcome for one in found} == {"step_budget"}


def test_each_stage_begins_afresh_and_has_its_own_budget() -> None:
    model, structures = LennardJones(), systems(9)

    def parts() -> list[Any]:
        return [
            FIRE(model, n_steps=7),
            NVTLangevin(model, timestep=1.0, temperature=30.0, n_steps=11, seed=2),
            FIRE(model, convergence_hook=0.005, n_steps=60),
        ]

    first, second, third = parts()
    found = run(stage(first, n_systems=3) | stage(second, n_systems=2) | stage(third, n_systems=4), structures)
    first, second, third = parts()
    same(found, fused_alone(structures, first + second + third))
    history = [one.structure.info["stages"] for one in found if one.structure]
    assert all([said["stage"] for said in one] == ["FIRE", "NVTLangevin", "FIRE 2"] for one in history)
    assert {(one[0]["steps"], one[1]["steps"]) for one in history} == {(7, 11)}
    assert all(one[0]["outcome"] == "step_budget" for one in history)
    assert {one.outcome for one in found} == {history[i][2]["outcome"] for i in range(9)} == {"converged"}


def test_a_batch_that_another_run_has_stepped_begins_afresh() -> None:
    model, batch = LennardJones(), Batch.from_data_list(systems(1))
    earlier = FIRE(model, n_steps=10)
    earlier.run(batch)
    found = run(stage(FIRE(model, n_steps=12)) | stage(NVE(model, n_steps=3)), batch.index_select([0]))
    (FIRE(model, n_steps=12) + NVE(model, n_steps=3)).run(batch)
    assert found[0].steps == 15
    assert torch.equal(found[0].structure.positions, batch.positions)  # type: ignore[union-attr]
    assert found[0].energy == float(batch.energy[0])


def test_a_fused_stage_is_one_stage() -> None:
    model, structures = LennardJones(), systems(8)
    a, b, c = FIRE(model, n_steps=4), NVE(model, n_steps=5), FIRE(model, n_steps=6)
    found = run(stage(a) | stage(b + c), structures)
    a, b, c = FIRE(model, n_steps=4), NVE(model, n_steps=5), FIRE(model, n_steps=6)
    same(found, fused_alone(structures, a + b + c))
    assert [said["steps"] for said in found[0].structure.info["stages"]] == [4, 11]  # type: ignore[union-attr]


def test_keys_of_every_dtype_survive_to_the_sink() -> None:
    batch, sink = well_batch([5, 2, 9, 0]), MemorySink()
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64, torch.bool):
        batch.set(f"of_system_{dtype}", torch.tensor([3, 0, 7, 1]).to(dtype), level="system")
        batch.set(f"of_atoms_{dtype}", (torch.arange(2 * batch.n_atoms).reshape(-1, 2) % 5).to(dtype), level="atom")
    well = Well()
    found = run((stage(FIRE(well, n_steps=3)) | stage(NVE(well, n_steps=2))).with_settings(sinks=[sink]), batch)
    assert [one.index for one in found] == [0, 2, 5, 9]
    written = sink.read()
    written = written.index_select(written.system_id.argsort())
    before = batch.index_select(batch.system_id.argsort())
    names = [key for key in before.keys() if key.startswith("of_")]  # noqa: SIM118
    assert len(names) == 10
    for name in names:
        assert written.get(name).dtype == before.get(name).dtype
        assert torch.equal(written.get(name), before.get(name)), name
    assert torch.equal(written.atomic_numbers, before.atomic_numbers)


def test_velocities_of_some_do_not_harm_the_others() -> None:
    well = Well()
    resting = AtomicData(in_well(1).positions, in_well(1).atomic_numbers)
    structures = [in_well(0), resting, in_well(2)]
    found = run(stage(GradientDescent(well, n_steps=3)) | stage(NVE(well, n_steps=4)), structures)
    same(found, fused_alone(structures, GradientDescent(well, n_steps=3) + NVE(well, n_steps=4)))


def test_init_fn_of_each_stage_sees_each_system_once() -> None:
    well = Well()
    seen: dict[str, list[int]] = {"first": [], "second": []}

    def noting(name: str) -> Any:
        def init(batch: Batch) -> None:
            seen[name] += batch.system_id.tolist()
            batch.velocities = torch.full_like(batch.positions, 0.01 * len(name))

        return init

    first, second = FIRE(well, n_steps=3, init_fn=noting("first")), NVE(well, n_steps=1, init_fn=noting("second"))
    found = run(stage(first, n_systems=3) | stage(second, n_systems=2), [in_well(index) for index in range(8)])
    assert {name: sorted(one) for name, one in seen.items()} == {"first": list(range(8)), "second": list(range(8))}
    batch = well_batch([0])
    FIRE(well, n_steps=3).run(batch)
    batch.velocities = torch.full_like(batch.positions, 0.06)
    NVE(well, n_steps=1).run(batch)
    assert torch.equal(found[0].structure.velocities, batch.velocities)  # type: ignore[union-attr]


@pytest.mark.parametrize("place", [0, 1])
def test_systems_that_fail_are_told_with_their_stage(place: int) -> None:
    """The others have their bits; a failed one has its reason, and its input's keys."""
    bad, good = Failing(), LennardJones()
    models = [bad, good] if place == 0 else [good, bad]
    structures = systems(20, failing=(4, 14))
    sink = MemorySink()
    pipeline = stage(FIRE(models[0], n_steps=5), n_systems=4) | stage(NVE(models[1], n_steps=5), n_systems=4)
    found = run(pipeline.with_settings(sinks=[sink]), structures)
    expected = fused_alone(structures, FIRE(good, n_steps=5) + NVE(good, n_steps=5))
    for one, other in zip(found, expected, strict=True):
        if one.index in (4, 14):
            assert (one.outcome, one.energy, one.fmax) == ("failed", None, None)
            assert one.reason == f"in stage {place} ({('FIRE', 'NVE')[place]}): energy or forces are not finite"
            assert one.structure is not None
            assert one.structure.atomic_numbers.tolist() == structures[one.index].atomic_numbers.tolist()
            assert len(one.structure.info["stages"]) == place + 1
        else:
            same([one], [other])
    written = sink.read()
    assert sorted(written.system_id.tolist()) == list(range(20))
    failed = {index for index, one in zip(written.system_id.tolist(), written.outcome.tolist(), strict=True) if one == 3}
    assert failed == {4, 14}


def test_what_a_later_stage_does_not_know_fails_before_it_starts() -> None:
    wide, narrow = Well(), LennardJones()  # H, Ar, Cu and Ar, Cu
    structures = [system(0), in_well(1, numbers=1), system(2), Unreadable("the file is cut short"), in_well(3, numbers=26)]
    found = run(stage(FIRE(wide, n_steps=2)) | stage(NVE(narrow, n_steps=2)), structures)
    assert [one.outcome for one in found] == ["step_budget", "failed", "step_budget", "failed", "failed"]
    assert "H (Z = 1), which the potential does not know: it knows Ar, Cu" in (found[1].reason or "")
    assert "Fe (Z = 26)" in (found[4].reason or "")
    assert found[3].reason == "the file is cut short"
    assert [one.steps for one in found] == [4, 0, 4, 0, 0]
    assert found[3].structure is None
    assert found[1].structure is not None
    assert "stages" not in found[1].structure.info


@pytest.mark.parametrize("numbers", [[26], [26, 26, 26], [18, 26], [26, 18, 18]])
@pytest.mark.parametrize("limits", [True, False])
def test_a_batch_with_systems_that_cannot_start_ends(numbers: list[int], limits: bool) -> None:
    batch = Batch.from_data_list([in_well(index, one) for index, one in enumerate(numbers)])
    well = Well()
    parts: list[Any] = [FIRE(well, n_steps=2), NVE(well, n_steps=2)]
    found = run(DistributedPipeline([stage(one) for one in parts] if limits else parts), batch)
    assert [one.outcome == "failed" for one in found] == [one == 26 for one in numbers]
    assert all("Fe (Z = 26)" in (one.reason or "") for one in found if one.outcome == "failed")


def test_systems_that_failed_before_stay_failed() -> None:
    well, batch = Well(), Batch.from_data_list([in_well(0), in_well(1)])
    earlier = FIRE(well, n_steps=2)
    earlier.run(batch)
    earlier.set_aside(batch, 1, "it was bad")
    for chosen in ([1], [0, 1]):
        found = run(stage(FIRE(well, n_steps=2)) | stage(NVE(well, n_steps=2)), batch.index_select(chosen))
        assert [one.index for one in found] == chosen
        assert [one.outcome for one in found] == ["step_budget", "failed"][2 - len(chosen) :]
        assert (found[-1].reason or "").endswith("it was bad")


def test_a_generator_is_read_as_far_as_is_needed_and_once() -> None:
    read = []

    def given() -> Iterator[AtomicData]:
        for index in range(12):
            read.append(index)
            yield system(index)

    relax, move = relax_and_move(LennardJones(), n_steps=3)
    found = run(stage(relax, n_systems=2) | stage(move, n_systems=2), given())
    assert read == list(range(12))
    relax, move = relax_and_move(LennardJones(), n_steps=3)
    same(found, fused_alone(systems(12), relax + move))


class Measuring(LennardJones):
    """Notes how many systems and atoms a call has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, graph: Any, **options: Any) -> dict[str, torch.Tensor]:
        self.sizes.append((graph.n_systems, graph.n_atoms))
        return super().__call__(graph, **options)


@pytest.mark.parametrize("source", ["sampler", "list"])
def test_limits_hold_in_every_stage(source: str) -> None:
    first, second = Measuring(), Measuring()
    sampler = SizeAwareSampler(systems(15), max_atoms=13, max_batch_size=3) if source == "sampler" else None
    a, b = FIRE(first, n_steps=6, sampler=sampler, refill_frequency=2), NVE(second, n_steps=4, refill_frequency=2)
    pipeline = a | b if sampler else stage(a, n_systems=3, n_atoms=13) | stage(b, n_systems=3, n_atoms=13)
    found = run(pipeline, None if sampler else systems(15))
    model = LennardJones()
    same(found, fused_alone(systems(15), FIRE(model, n_steps=6) + NVE(model, n_steps=4)))
    for one in (first, second):
        batches = one.sizes[2:]  # the first ones know the potential by its energy
        assert max(systems for systems, _ in batches) == 3
        assert max(atoms for _, atoms in batches) <= 13


def test_a_structure_beyond_the_limits_has_a_batch_of_its_own() -> None:
    model = Measuring()
    a, b = FIRE(model, n_steps=6), NVE(model, n_steps=4)
    structures = [system(0), system(4), system(5)]  # 2, 6 and 2 atoms
    found = run(stage(a, n_atoms=4) | stage(b, n_atoms=4), structures)
    assert [one.outcome for one in found] == ["step_budget"] * 3
    assert {sizes for sizes in model.sizes if sizes[1] > 4} == {(1, 6)}


def test_a_stage_can_be_used_alone_afterwards() -> None:
    well, batch = Well(), well_batch([0, 1])
    a, b = NVE(well, n_steps=3), FIRE(well, n_steps=3)
    pipeline = stage(a) | stage(b)
    first = run(pipeline, batch)
    assert [bits(one) for one in run(pipeline, batch)] == [bits(one) for one in first]
    alone, other = well_batch([0, 1]), well_batch([0, 1])
    a.run(alone, 6)
    NVE(well).run(other, 6)
    assert torch.equal(alone.positions, other.positions)
    assert alone.outcome.tolist() == [Outcome.RUNNING] * 2


def test_the_folder_has_all_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    relax, move = relax_and_move(Failing(), n_steps=3)
    found = run(stage(relax) | stage(move), systems(6, failing=[2]), out=tmp_path)
    frames = read_structures(tmp_path / "finished.extxyz")
    assert [one.info["index"] for one in frames] == [0, 1, 3, 4, 5]
    assert [float(one.energy) for one in frames] == [one.energy for one in found if one.energy is not None]  # type: ignore[arg-type]
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[2:]] == [str(index) for index in range(6)]


class SignalAt:
    """Sends a signal to this process in the middle of a step."""

    stage = HookStageEnum.AFTER_COMPUTE
    frequency = 1

    def __init__(self, step: int) -> None:
        self.step, self.count = step, 0

    def __call__(self, batch: Batch, dynamics: Any) -> None:
        self.count += 1
        if self.count == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("place", "step"), [(0, 9), (1, 5)])
def test_asked_to_stop_it_saves_and_goes_on(tmp_path: Path, place: int, step: int) -> None:
    structures = systems(10)

    def stages() -> tuple[Any, Any]:
        return relax_and_move(LennardJones(), n_steps=9)

    parts = stages()
    parts[place].register_hook(SignalAt(step))
    with pytest.raises(StopRequested):
        run(stage(parts[0], n_systems=3) | stage(parts[1], n_systems=3), structures, out=tmp_path)
    parts = stages()
    found = run(stage(parts[0], n_systems=3) | stage(parts[1], n_systems=3), structures, out=tmp_path, resume=True)
    relax, move = stages()
    same(found, fused_alone(structures, relax + move))


def test_an_error_of_the_data_set_is_raised_as_it_is(tmp_path: Path) -> None:
    def broken(count: int) -> Iterator[AtomicData]:
        yield from systems(count)
        raise OSError("the archive is damaged")

    relax, move = relax_and_move(Slow(0.0), n_steps=3)
    with pytest.raises(OSError, match=r"^the archive is damaged$"):
        run(stage(relax, n_systems=2) | stage(move), broken(5), out=tmp_path)
    relax, move = relax_and_move(Slow(0.0), n_steps=3)
    found = run(stage(relax, n_systems=2) | stage(move), systems(7), out=tmp_path, resume=True)
    relax, move = relax_and_move(LennardJones(), n_steps=3)
    same(found, fused_alone(systems(7), relax + move))
