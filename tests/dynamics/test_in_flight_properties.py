"""In flight, whatever the sizes, budgets, stages, sinks and failures: nothing is lost, duplicated, mixed up or changed.

Hypothesis draws whole runs. Each system must come out exactly once, with its own atoms, and bit for bit as when it is alone.
CARRYALL_HYPOTHESIS_MINUTES=10 runs new random examples for that long; without it a few fixed ones are run.
"""

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.dynamics import ConvergenceHook, FusedStage, HookStageEnum, Outcome
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.integrators import NVE, NVTLangevin, NVTVelocityRescaling
from carryall.dynamics.optimizers import FIRE, LBFGS, GradientDescent
from carryall.dynamics.samplers import Room, SizeAwareSampler, Unreadable
from carryall.dynamics.sinks import MemorySink, SinkFullError
from carryall.dynamics.status import REASON
from carryall.graph import PotentialSpec, edge_vectors, segment_sum

MINUTES = float(os.environ.get("CARRYALL_HYPOTHESIS_MINUTES", "0"))
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)
long = settings(max_examples=100, deadline=None, derandomize=False, database=None)

STAGES = {
    "nve": lambda model, **options: NVE(model, **options),
    "langevin": lambda model, **options: NVTLangevin(model, temperature=300, seed=3, **options),
    "rescaling": lambda model, **options: NVTVelocityRescaling(model, temperature=300, seed=4, removed_degrees=0, **options),
    "fire": lambda model, **options: FIRE(model, **options),
    "lbfgs": lambda model, **options: LBFGS(model, **options),
    "descent": lambda model, **options: GradientDescent(model, **options),
}
KINDS = ("sound", "sound", "sound", "wrong", "goes wrong", "unknown", "flat", "unreadable")


class Springs:
    """Each atom in a well about the origin, and springs between atoms nearer than the cutoff.

    Helium has no energy (NaN). Neon has none near the middle of the well, so that a system with neon fails under way.
    """

    def __init__(self, cutoff=1.2):
        self.spec = PotentialSpec(cutoff, ("H", "He", "Ne", "Ar"))

    def __call__(self, graph, *, atomic_virial=False):
        x, edge = graph.positions, edge_vectors(graph)
        r = torch.sqrt(edge[:, 0] * edge[:, 0] + edge[:, 1] * edge[:, 1] + edge[:, 2] * edge[:, 2])
        short = self.spec.cutoff - r
        gradient = -0.5 * (short / r)[:, None] * edge
        square = x[:, 0] * x[:, 0] + x[:, 1] * x[:, 1] + x[:, 2] * x[:, 2]
        atomic = 0.5 * square + segment_sum(0.25 * short * short, graph.edge_center, graph.n_atoms)
        lost = (graph.atom_types == 1) | ((graph.atom_types == 2) & (square < 0.3))
        atomic = torch.where(lost, torch.nan, atomic)
        forces = (
            segment_sum(gradient, graph.edge_center, graph.n_atoms)
            - segment_sum(gradient, graph.edge_neighbor, graph.n_atoms)
            - x
        )
        energy = segment_sum(atomic, graph.system, graph.n_systems)
        return {"energy": energy, "atomic_energy": atomic, "forces": forces, "virial": x.new_zeros(graph.n_systems, 3, 3)}


@dataclass(frozen=True)
class Plan:
    """One run."""

    systems: list
    """(number of atoms, kind, whether it has velocities) of each input."""
    stages: list
    """(name, own steps, fmax or None, steps between looks at it) of each stage."""
    spare_atoms: int | None
    """max_atoms beyond the largest system; None for no limit."""
    max_systems: int | None
    count_edges: bool
    look_ahead: int
    frequency: int
    capacities: list
    """Of the sinks before the last, which has no limit; None for a run without sinks."""
    source: str
    skip: set
    chunk: int | None
    """Steps of each call of run; None for one call."""
    restart: int | None
    """Steps after which the process is lost, and a new one goes on with what its sinks have not; None for never."""
    seed: int


@st.composite
def plans(draw):
    name = st.sampled_from(sorted(STAGES))
    steps, fmax = st.integers(1, 9), st.sampled_from([0.05, 0.5, 1.5])
    stage = st.tuples(name, steps, st.none() | fmax, st.integers(1, 3))
    systems = draw(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=12))
    capacities = draw(st.none() | st.lists(st.integers(0, 3), max_size=2))
    return Plan(
        systems,
        draw(st.lists(stage, min_size=1, max_size=3)),
        draw(st.none() | st.integers(0, 10)),
        draw(st.none() | st.integers(1, 5)),
        draw(st.booleans()),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 4)),
        capacities,
        draw(st.sampled_from(["list", "generator", "metadata"])),
        draw(st.sets(st.integers(0, 11), max_size=2)),
        None if capacities is None else draw(st.none() | st.integers(1, 6)),
        None if capacities is None else draw(st.none() | st.integers(0, 20)),
        draw(st.integers(0, 10**6)),
    )


def structure_of(plan, index):
    """The input of an index, or what stands for one that cannot be read."""
    n_atoms, kind, moving = plan.systems[index]
    if kind == "unreadable":
        return Unreadable(f"input {index} is torn")
    rng = np.random.default_rng([plan.seed, index])
    numbers = rng.choice([1, 18], n_atoms)
    if n_atoms:
        numbers[rng.integers(n_atoms)] = {"wrong": 2, "goes wrong": 10, "unknown": 79}.get(kind, 18)
    # Velocity rescaling sets aside what is at rest.
    moving = moving or any(name == "rescaling" for name, *_ in plan.stages)
    cell = None if kind == "flat" or rng.random() < 0.5 else np.eye(3) * 4 + rng.normal(0, 0.3, (3, 3))
    return AtomicData(
        rng.normal(0, 1.0, (n_atoms, 3)),
        numbers,
        cell,
        pbc=True if kind == "flat" else None,
        velocities=rng.normal(0, 0.1, (n_atoms, 3)) if moving else None,
        info={"input": index},
    )


class WithMetadata:
    """Sizes without reading."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def get_metadata(self, index):
        one = self.items[index]
        return (one.n_atoms, edges_of(one)) if isinstance(one, AtomicData) else (1, 1)


def edges_of(data):
    return 2 * data.n_atoms


def stages_of(plan, model, **options):
    """An engine of the plan's stages."""
    single = len(plan.stages) == 1
    made = []
    for name, steps, fmax, frequency in plan.stages:
        criterion = None if fmax is None else ConvergenceHook.from_fmax(fmax, frequency=frequency)
        made.append(STAGES[name](model, n_steps=steps, convergence_hook=criterion, **(options if single else {})))
    return made[0] if single else FusedStage(made, **options)


class Watch:
    """Notes which systems were announced as done, and that the limits hold at every step."""

    stages = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_STEP, HookStageEnum.ON_CONVERGE)
    frequency = 1

    def __init__(self, sampler):
        self.sampler, self.announced = sampler, Counter()

    def __call__(self, batch, dynamics):
        names = batch.get("system_id").tolist()
        assert len(set(names)) == len(names)
        if dynamics.current_hook_stage == HookStageEnum.ON_CONVERGE:
            self.announced.update(names[i] for i in dynamics.newly_converged.tolist())
        if batch.n_systems > 1:
            limits = self.sampler
            assert limits.max_atoms is None or batch.n_atoms <= limits.max_atoms
            assert limits.max_batch_size is None or batch.n_systems <= limits.max_batch_size
            assert limits.max_edges is None or 2 * batch.n_atoms <= limits.max_edges


def check_run(plan):
    items = [structure_of(plan, i) for i in range(len(plan.systems))]
    unreadable, announced = Counter(), Counter()
    sinks = [] if plan.capacities is None else [*map(MemorySink, plan.capacities), MemorySink()]
    if plan.restart is not None:
        engine, watch, _ = engine_for(plan, items, plan.skip, sinks, Counter())
        engine.run(n_steps=plan.restart)
        announced = Counter({name: count for name, count in watch.announced.items() if name in ids_in(sinks)})
    engine, watch, _ = engine_for(plan, items, plan.skip | ids_in(sinks), sinks, unreadable)
    result = run(engine, plan.chunk)
    wanted = [i for i in range(len(items)) if i not in plan.skip]
    assert unreadable == Counter(i for i in wanted if plan.systems[i][1] == "unreadable")
    wanted = [i for i in wanted if i not in unreadable]
    if sinks:
        assert result is None
        check_filled_in_order(sinks)
        parts = [sink.read() for sink in sinks if len(sink)]
    else:
        parts = [] if result is None else [result]
        assert result is None or result.get("system_id").tolist() == wanted
    found = {name: part.index_select([i]) for part in parts for i, name in enumerate(part.get("system_id").tolist())}
    assert sum(part.n_systems for part in parts) == len(found)
    assert sorted(found) == wanted
    for index in wanted:
        check_as_alone(plan, index, items[index], found[index])
    succeeded = [i for i in wanted if int(found[i].outcome[0]) != Outcome.FAILED]
    assert announced + watch.announced == Counter(succeeded)


def check_small_sinks(plan):
    items = [structure_of(plan, i) for i in range(len(plan.systems))]
    sinks = [MemorySink(capacity) for capacity in plan.capacities or [2]]
    engine, _, sampler = engine_for(plan, items, plan.skip, sinks, Counter())
    full = False
    try:
        run(engine, plan.chunk)
    except SinkFullError:
        full = True
    check_filled_in_order([*sinks, MemorySink()])
    held = [] if engine.active_batch is None else engine.active_batch.get("system_id").tolist()
    waiting = []
    while drawn := sampler.draw(Room(), must=True):
        waiting += [index for index, _ in drawn]
    written = [name for sink in sinks if len(sink) for name in sink.read().get("system_id").tolist()]
    wanted = [i for i in range(len(items)) if i not in plan.skip and plan.systems[i][1] != "unreadable"]
    assert sorted([*written, *held, *waiting]) == wanted
    assert full == (len(wanted) > sum(sink.capacity for sink in sinks))
    assert full or not (held or waiting)


def engine_for(plan, items, skip, sinks, unreadable):
    """An engine in flight, the hook that watches it, and its sampler."""
    sizes = [one.n_atoms for one in items if isinstance(one, AtomicData)]
    source = {"list": items, "generator": (one for one in items), "metadata": WithMetadata(items)}[plan.source]
    sampler = SizeAwareSampler(
        source,
        None if plan.spare_atoms is None else max([1, *sizes]) + plan.spare_atoms,
        2 * max(sizes) + 5 if plan.count_edges and any(sizes) else None,
        plan.max_systems,
        count_edges=edges_of,
        look_ahead=plan.look_ahead,
        skip=skip,
        on_unreadable=lambda index, reason: unreadable.update([index]),
    )
    watch = Watch(sampler)
    engine = stages_of(plan, Springs(), sampler=sampler, sinks=sinks, refill_frequency=plan.frequency, hooks=[watch])
    return engine, watch, sampler


def ids_in(sinks):
    return {name for sink in sinks if len(sink) for name in sink.read().get("system_id").tolist()}


def run(engine, chunk):
    if chunk is None:
        return engine.run()
    batch = engine.run(n_steps=chunk)
    for _ in range(1000):
        if engine.done:
            break
        batch = engine.run(batch, n_steps=chunk)
    return batch


def check_filled_in_order(sinks):
    for one, following in pairwise(sinks):
        assert one.capacity is not None
        assert len(one) <= one.capacity
        assert one.is_full or not len(following)


def check_as_alone(plan, index, data, found):
    assert found.atomic_numbers.tolist() == data.atomic_numbers.tolist()
    n_atoms, kind, _ = plan.systems[index]
    outcome = int(found.outcome[0])
    assert outcome in (Outcome.CONVERGED, Outcome.STEP_BUDGET, Outcome.FAILED)
    assert (outcome == Outcome.FAILED) == (REASON in found.info[0])
    if kind in ("wrong", "unknown", "flat") or not n_atoms:
        assert outcome == Outcome.FAILED
    elif kind == "sound":
        assert outcome != Outcome.FAILED
    if kind == "unknown" and n_atoms:
        # A batch with an element that the potential does not know is refused as a whole: there is no run to compare with.
        assert "which the potential does not know" in found.info[0][REASON]
        assert torch.equal(found.positions, data.positions)
        return
    batch = moving_batch([data], [index])
    engine = stages_of(plan, Springs())
    engine.run(batch)
    if not isinstance(engine, FusedStage):
        # The steps of such a run are the caller's budget: a system that is not done afterwards still counts as running.
        ran_out = batch.outcome == Outcome.RUNNING
        batch.outcome = batch.outcome.masked_fill(ran_out, int(Outcome.STEP_BUDGET))
        batch.status = batch.status.masked_fill(ran_out, engine.exit_status)
    for key in batch.keys():  # noqa: SIM118
        mine, alone = found.get(key), batch.get(key)
        assert mine.dtype == alone.dtype, key
        same = mine == alone
        if mine.is_floating_point():
            same |= mine.isnan() & alone.isnan()
        assert bool(same.all()), f"{key} of system {index}: {mine.tolist()} in flight, {alone.tolist()} alone"
    assert found.info[0].get(REASON) == batch.info[0].get(REASON)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Thousands of systems fail on purpose; a report of each would bury the one that matters."""
    caplog.set_level(logging.ERROR, "carryall.dynamics")


def examine(check):
    """Run a check on many plans, or for its share of the minutes that are asked for."""
    if not MINUTES:
        quick(given(plans())(check))()
        return
    end, seed = time.monotonic() + 60 * MINUTES * (0.8 if check is check_run else 0.2), time.time_ns() % 10**9
    while time.monotonic() < end:
        hypothesis.seed(seed)(long(given(plans())(check)))()
        seed += 1


def test_nothing_is_lost_duplicated_reordered_or_changed():
    examine(check_run)


def test_sinks_that_are_too_small_lose_nothing():
    """What has no room in a sink is still in the batch, or was not drawn yet: the error comes before anything is removed."""
    examine(check_small_sinks)


def test_the_oracle_would_notice():
    """A run in which one system is swapped for another, or changed in one bit, fails the check."""
    systems, stages = [(2, "sound", True), (2, "sound", True)], [("nve", 3, None, 1)]
    plan = Plan(systems, stages, 0, None, False, 1, 1, None, "list", set(), None, None, 0)
    engine = stages_of(plan, Springs(), sampler=SizeAwareSampler([structure_of(plan, 0), structure_of(plan, 1)]))
    found = engine.run()
    data = structure_of(plan, 0)
    check_as_alone(plan, 0, data, found.index_select([0]))
    with pytest.raises(AssertionError):
        check_as_alone(plan, 0, data, found.index_select([1]))
    changed = found.index_select([0])
    changed.positions = torch.nextafter(changed.positions, torch.full_like(changed.positions, 9.0))
    with pytest.raises(AssertionError, match="positions of system 0"):
        check_as_alone(plan, 0, data, changed)
    assert isinstance(found, Batch)
