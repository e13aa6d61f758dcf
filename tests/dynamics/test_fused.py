"""Several stages on one batch: one model call, systems that move on, state that belongs to one stage."""

import pytest
import torch
from dynamics_samples import LennardJones, Well, atoms_in_well, batch_of, cluster, record

from carryall.dynamics import FIRE, NVE, BiasPotential, FusedStage, HookStageEnum, NVTLangevin, Outcome
from carryall.errors import InputError


def some(*sizes):
    return batch_of(*(atoms_in_well(n, n) for n in sizes))


def test_one_model_call_a_step_and_statuses_in_order():
    potential = Well()
    a, b, c = NVE(potential, n_steps=2), FIRE(potential, n_steps=3), NVE(potential, 0.5, n_steps=1)
    fused = a + b + c
    assert [status for status, _ in fused.sub_stages] == [0, 1, 2]
    assert (fused.entry_status, fused.exit_status) == (0, 3)
    batch, seen = some(2, 3), []

    def note(batch, dynamics):
        seen.append(batch.status.tolist())

    note.stage, note.frequency = HookStageEnum.AFTER_STEP, 1
    fused.register_fused_hook(note)
    fused.run(batch)
    assert seen == [[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [2, 2]]
    assert potential.n_calls == 7
    assert batch.status.tolist() == [3, 3]
    assert batch.outcome.tolist() == [Outcome.STEP_BUDGET] * 2
    assert fused.all_complete
    assert fused.done


def test_stages_stay_usable_alone():
    potential = Well()
    a, b = NVE(potential, n_steps=2), FIRE(potential, n_steps=3)
    (a + b).run(some(2))
    alone, fresh = some(3), some(3)
    a.run(alone, 4)
    NVE(potential).run(fresh, 4)
    assert torch.equal(alone.positions, fresh.positions)
    assert alone.status.tolist() == [0]


def test_nested_stages_lie_flat():
    potential = Well()

    def stages():
        return NVE(potential, n_steps=2), NVTLangevin(potential, n_steps=2), FIRE(potential, n_steps=2)

    results = []
    for compose in (lambda a, b, c: (a + b) + c, lambda a, b, c: a + (b + c), lambda a, b, c: FusedStage([a, b, c])):
        batch = some(2, 4)
        fused = compose(*stages())
        assert [status for status, _ in fused.sub_stages] == [0, 1, 2]
        fused.run(batch)
        results.append(batch)
    for other in results[1:]:
        assert torch.equal(results[0].positions, other.positions)
        assert torch.equal(results[0].status, other.status)


def test_adding_a_stage_keeps_what_the_left_operand_has():
    potential, calls = Well(), []
    fused = FusedStage([NVE(potential, n_steps=1)], hooks=[record(HookStageEnum.BEFORE_STEP, calls)], n_steps=9, exit_status=7)
    longer = fused + FIRE(potential, n_steps=2)
    assert (longer.n_steps, longer.exit_status) == (9, 7)
    longer.run(some(2))
    assert len(calls) == 3
    assert len(fused.parts) == 1
    with pytest.raises(InputError, match="statuses of its own"):
        NVE(potential, n_steps=1) + FusedStage([(3, FIRE(potential))])


def test_statuses_of_ones_own():
    potential, batch = Well(), some(2, 3)
    fused = FusedStage([(5, NVE(potential, n_steps=2)), (9, FIRE(potential, n_steps=2))])
    fused.run(batch)
    assert batch.status.tolist() == [10, 10]
    late = some(2, 3)
    late.set("status", torch.tensor([9, 5]), level="system")
    FusedStage([(5, NVE(potential, n_steps=2)), (9, FIRE(potential, n_steps=2))], exit_status=20).run(late)
    assert late.get("nve_steps").tolist() == [0, 2]
    assert late.status.tolist() == [20, 20]
    second = some(2)
    FusedStage([(5, NVE(potential, n_steps=2)), (9, FIRE(potential, n_steps=2))], entry_status=9).run(second)
    assert second.get("nve_steps").tolist() == [0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: FusedStage([]), "at least one stage"),
        (lambda p: FusedStage([(2, NVE(p, n_steps=1)), (1, NVE(p))]), "must ascend"),
        (lambda p: FusedStage([NVE(p)], exit_status=0), "must lie beyond"),
        (lambda p: FusedStage([NVE(p)], entry_status=4), "is no stage's"),
        (lambda p: NVE(p, n_steps=1) + NVE(Well()), "another model"),
        (lambda p: NVE(p) + FIRE(p), "no system ever leaves NVE"),
        (lambda p: NVE(p, n_steps=1) + 3, "only a dynamics"),
        (lambda p: FusedStage([NVE(p, n_steps=1), "x"]), "must be a dynamics"),
    ],
)
def test_what_cannot_be_fused_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make(Well())


def test_the_same_stage_twice_is_refused():
    one = NVE(Well(), n_steps=1)
    with pytest.raises(InputError, match="twice"):
        one + one


def test_a_status_that_names_no_stage_is_refused():
    batch = some(2)
    batch.set("status", torch.tensor([7]), level="system")
    with pytest.raises(InputError, match="status 7, which names no stage"):
        FusedStage([(5, NVE(Well(), n_steps=2)), (9, FIRE(Well()))][:1], exit_status=20).run(batch, 1)


def test_a_stage_touches_only_its_own_systems():
    potential = Well()
    fused = NVE(potential, n_steps=6) + FIRE(potential, n_steps=4)
    batch = some(2, 3)
    batch.set("status", torch.tensor([0, 1]), level="system")
    fused.run(batch, 3)
    start = FIRE(potential).state_defaults(batch)
    for key in ("dt", "alpha", "n_positive"):
        assert torch.equal(batch.get(f"fire_{key}")[0], start[key][0]), key
    assert batch.get("fire_steps").tolist() == [0, 3]
    assert batch.get("nve_steps").tolist() == [3, 0]


def test_a_stage_begins_with_its_own_fresh_state_and_equals_a_run_alone():
    potential = LennardJones()
    structures = [cluster(4, 1), cluster(5, 2), cluster(6, 3)]
    fused = NVTLangevin(potential, 40, n_steps=7, seed=3) + FIRE(potential, convergence_hook=1e-3)
    batch = batch_of(*structures)
    fused.run(batch, 400)
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 3
    for index, data in enumerate(structures):
        one = batch_of(data)
        one.set("system_id", torch.tensor([index]), level="system")
        NVTLangevin(potential, 40, seed=3).run(one, 7)
        fire = FIRE(potential, convergence_hook=1e-3)
        fire.run(one, 400)
        mine = batch.index_select([index])
        assert torch.equal(mine.positions, one.positions)
        # the stage takes a step before it looks, the run alone looks first
        assert mine.get("fire_steps").tolist() == one.get("fire_steps").tolist()


def test_two_stages_of_one_kind_have_two_states():
    potential, batch = Well(), some(2)
    a, b = FIRE(potential, n_steps=3), FIRE(potential, dt=0.05, n_steps=2)
    (a + b).run(batch)
    assert batch.get("fire_steps").tolist() == [3]
    assert batch.get("fire2_steps").tolist() == [2]


def test_a_step_says_who_finished_by_criterion_and_by_steps_at_once():
    potential = Well()
    still = atoms_in_well(1).replace(positions=torch.zeros(1, 3), velocities=torch.zeros(1, 3))
    batch = batch_of(atoms_in_well(3, 1), still, atoms_in_well(2, 2))
    batch.set("status", torch.tensor([0, 0, 1]), level="system")
    events = []

    def note(batch, dynamics):
        events.append((type(dynamics).__name__, dynamics.newly_converged.tolist()))

    note.stage, note.frequency = HookStageEnum.ON_CONVERGE, 1000
    fused = FIRE(potential, convergence_hook=0.01, hooks=[note]) + NVE(potential, n_steps=1, hooks=[note])
    fused.register_hook(note)
    assert fused.step(batch).tolist() == [2]
    assert batch.status.tolist() == [0, 1, 2]
    assert events == [("FIRE", [1]), ("NVE", [2]), ("FusedStage", [2])]
    events.clear()
    assert fused.step(batch).tolist() == [1]
    assert events == [("NVE", [1]), ("FusedStage", [1])]


def test_converge_events_come_once_for_each_system_and_stage():
    potential, events = LennardJones(), []

    def note(batch, dynamics):
        events.extend((type(dynamics).__name__, one) for one in batch.system_id[dynamics.newly_converged].tolist())

    note.stage, note.frequency = HookStageEnum.ON_CONVERGE, 3
    fused = FIRE(potential, convergence_hook=0.01, hooks=[note]) + NVE(potential, n_steps=3, hooks=[note])
    fused.run(batch_of(*(cluster(4, seed) for seed in range(5))), 500)
    assert sorted(events) == sorted([("FIRE", i) for i in range(5)] + [("NVE", i) for i in range(5)])


def test_hooks_of_a_stage_fire_at_every_point_with_their_own_systems():
    potential, calls, seen = Well(), [], []
    names = [stage for stage in HookStageEnum if stage is not HookStageEnum.ON_CONVERGE]
    first = NVE(potential, n_steps=2, hooks=[record(stage, calls) for stage in names])

    def watch(batch, dynamics):
        seen.append((type(dynamics).__name__, None if dynamics.running(batch) is None else dynamics.running(batch).tolist()))

    watch.stage, watch.frequency = HookStageEnum.BEFORE_COMPUTE, 1
    second = FIRE(potential, n_steps=2, hooks=[watch])
    batch = some(2, 3)
    batch.set("status", torch.tensor([0, 1]), level="system")
    (first + second).run(batch)
    assert [name for name, _ in calls] == [stage.name for stage in names] * 2
    assert seen == [("FIRE", [False, True])] * 2 + [("FIRE", [True, False])] * 2


def test_a_failing_system_leaves_the_fused_stage_and_the_others_go_on():
    class Sick(Well):
        def __call__(self, graph, *, atomic_virial=False):
            out = super().__call__(graph)
            three = torch.bincount(graph.system, minlength=graph.n_systems) == 3
            if self.n_calls > 2:
                out["forces"] = torch.where(three[graph.system][:, None], torch.nan, out["forces"])
            return out

    potential, batch = Sick(), some(2, 3, 4)
    (NVE(potential, n_steps=4) + FIRE(potential, n_steps=2)).run(batch)
    assert batch.status.tolist() == [2, 2, 2]
    assert batch.outcome.tolist() == [Outcome.STEP_BUDGET, Outcome.FAILED, Outcome.STEP_BUDGET]
    assert batch.info[1]["failure"] == "energy or forces are not finite"


def test_a_stage_with_only_steps_has_no_hidden_criterion():
    still = atoms_in_well(1).replace(positions=torch.zeros(1, 3), velocities=torch.zeros(1, 3))
    potential, batch = Well(), batch_of(still)
    (NVE(potential, n_steps=5) + FIRE(potential, n_steps=1)).run(batch)
    assert batch.get("nve_steps").tolist() == [5]


def test_two_runs_are_one_long_run():
    potential = Well()

    def fused():
        return NVTLangevin(potential, n_steps=3) + NVE(potential, n_steps=4) + FIRE(potential)

    whole, parts = some(2, 4), some(2, 4)
    fused().run(whole, 11)
    potential.n_calls, again = 0, fused()
    again.run(parts, 5)
    again.run(parts, 6)
    assert potential.n_calls == 12
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(whole.get(key), parts.get(key)), key


def test_bookkeeping_does_not_reach_other_engines():
    potential = Well()
    a, b = NVE(potential, n_steps=1), FIRE(potential, n_steps=1)
    a.register_bookkeeping_key("visits", lambda batch: torch.zeros(batch.n_systems))
    one, other = some(2), some(2)
    (a + b).run(one)
    FIRE(potential).run(other, 1)
    assert "visits" in one
    assert not {key for key in other.keys() if key.startswith(("visits", "nve"))}  # noqa: SIM118


def test_a_run_without_any_end_asks_for_steps():
    potential = Well()
    with pytest.raises(ValueError, match="FusedStage has no number of steps"):
        (NVE(potential, n_steps=1) + FIRE(potential)).run(some(2))
    with pytest.raises(ValueError, match="has no sampler"):
        (NVE(potential, n_steps=1) + FIRE(potential)).run(n_steps=2)


def test_repr_names_the_stages():
    potential = Well()
    text = repr(NVE(potential, n_steps=2) + FIRE(potential, convergence_hook=0.1))
    assert text.startswith("FusedStage(step_count=0, 0: NVE(Well")


def test_a_stage_does_not_move_by_the_forces_of_the_stage_before():
    def spring(batch):
        energy = torch.zeros(batch.n_systems, dtype=torch.float64)
        energy = energy.index_add(0, batch.system, 0.25 * batch.positions.square().sum(1))
        return {"energy": energy, "forces": -0.5 * batch.positions}

    potential, batch, parts = Well(), some(2, 3), some(2, 3)
    (NVE(potential, n_steps=2, hooks=[BiasPotential(spring)]) + NVE(potential, n_steps=3)).run(batch)
    NVE(Well(k=1.5)).run(parts, 2)
    NVE(potential).run(parts, 3)
    assert torch.allclose(batch.positions, parts.positions, rtol=0, atol=1e-14)
    # a call at the start, one a step, and one more where the bias ends
    assert potential.n_calls == 7 + 4


def test_a_run_cut_where_a_system_enters_a_stage_is_one_run():
    def fused(potential):
        return FIRE(potential, n_steps=1) + FIRE(potential, n_steps=4, convergence_hook=1.0)

    whole, parts, potential = some(1, 2), some(1, 2), Well()
    fused(potential).run(whole, 6)
    again = fused(potential)
    for _ in range(6):
        again.run(parts, 1)
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(whole.get(key), parts.get(key)), key
