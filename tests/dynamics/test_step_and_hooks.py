"""The step, the loop and the hooks."""

import gc
import math

import pytest
import torch
from dynamics_samples import LennardJones, Well, atoms_in_well, batch_of, cluster, record

from carryall.data import AtomicData
from carryall.dynamics import FIRE, NVE, BaseDynamics, ConvergenceHook, ForceGuard, HookStageEnum, NVTLangevin, Outcome
from carryall.errors import InputError

IN_ORDER = [stage.name for stage in HookStageEnum]


def frozen_bits(batch, index):
    """Bits of everything that belongs to one system."""
    one = batch.index_select([index])
    return {key: one.get(key).clone() for key in one.keys()}  # noqa: SIM118


def assert_same_bits(before, after, keys=None):
    for key in keys or before:
        assert torch.equal(before[key], after[key]) or (before[key] != before[key]).all(), key


def test_stages_come_in_one_order():
    calls = []
    hooks = [record(stage, calls) for stage in reversed(HookStageEnum)]
    batch = batch_of(atoms_in_well())
    NVE(Well(), hooks=hooks, convergence_hook={"key": "energy", "threshold": 1e9, "custom_op": step_two(batch)}).run(batch, 5)
    assert [name for name, _ in calls] == IN_ORDER[:-1] + IN_ORDER
    assert [step for _, step in calls] == [0] * 8 + [1] * 9


def step_two(batch):
    """Converged once the system has taken two steps."""
    return lambda _: batch.get("nve_steps") >= 2


def test_frequency_counts_from_step_zero():
    calls = []
    NVE(Well(), hooks=[record(HookStageEnum.AFTER_STEP, calls, 3)]).run(batch_of(atoms_in_well()), 8)
    assert [step for _, step in calls] == [0, 3, 6]


@pytest.mark.parametrize("frequency", [0, -1, 1.0, True, "2"])
def test_a_bad_frequency_is_refused_by_name(frequency):
    with pytest.raises(ValueError, match=r"hook hook has frequency"):
        NVE(Well(), hooks=[record(HookStageEnum.AFTER_STEP, [], frequency)])


def test_things_that_are_no_hooks_are_refused():
    with pytest.raises(InputError, match="has stage None"):
        NVE(Well(), hooks=[lambda batch, dynamics: None])
    with pytest.raises(InputError, match="has no stages"):
        NVE(Well(), hooks=[type("Silent", (), {"stages": (), "__call__": lambda *_: None})()])
    with pytest.raises(InputError, match="not callable"):
        NVE(Well(), hooks=[type("Dead", (), {"stage": HookStageEnum.AFTER_STEP})()])


def test_a_hook_that_can_never_fire_is_refused():
    with pytest.raises(InputError, match="NVE has no convergence_hook"):
        NVE(Well(), hooks=[record(HookStageEnum.ON_CONVERGE, [])])


def test_the_number_of_steps_comes_from_the_call_then_the_constructor():
    dynamics = NVE(Well(), n_steps=3)
    batch = dynamics.run(batch_of(atoms_in_well()))
    assert dynamics.step_count == 3
    dynamics.run(batch, 4)
    assert dynamics.step_count == 7
    with pytest.raises(ValueError, match=r"NVE has no number of steps: give run\(batch, n_steps"):
        NVE(Well()).run(batch)
    with pytest.raises(ValueError, match="n_steps must be"):
        NVE(Well()).run(batch, -1)


def test_run_stops_when_all_are_done_and_each_stays_where_it_converged():
    potential, seen = LennardJones(), {}
    batch = batch_of(cluster(4, 1), cluster(6, 2, spread=4.0), cluster(5, 3, spread=3.8))

    def note(batch, dynamics):
        for i in dynamics.newly_converged.tolist():
            assert i not in seen
            seen[i] = (dynamics.step_count, frozen_bits(batch, i))

    note.stage, note.frequency = HookStageEnum.ON_CONVERGE, 1000
    fire = FIRE(potential, hooks=[note], convergence_hook=ConvergenceHook.from_fmax(0.001))
    fire.run(batch, 1000)
    assert fire.step_count == max(step for step, _ in seen.values()) + 1 < 1000
    assert sorted(seen) == [0, 1, 2]
    assert len({step for step, _ in seen.values()}) > 1
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 3
    for index, (step, before) in seen.items():
        after = frozen_bits(batch, index)
        assert_same_bits(before, after, [key for key in before if key != "evaluated"])
        assert int(after["fire_steps"][0]) == step + 1
    assert (batch.forces.norm(dim=1) <= 0.001).all()


@pytest.mark.parametrize("kind", [NVE, NVTLangevin, FIRE])
def test_a_system_at_the_exit_status_keeps_every_bit(kind):
    batch = batch_of(atoms_in_well(3, 1), atoms_in_well(4, 2), atoms_in_well(2, 3))
    dynamics = kind(Well(), exit_status=2)
    dynamics.run(batch, 3)
    batch.status = torch.tensor([0, 2, 3])
    before = [frozen_bits(batch, i) for i in range(3)]
    dynamics.run(batch, 4)
    for index in (1, 2):
        assert_same_bits(before[index], frozen_bits(batch, index), [key for key in before[index] if key != "evaluated"])
    assert not torch.equal(before[0]["positions"], frozen_bits(batch, 0)["positions"])


def test_results_of_a_frozen_system_are_not_written_again():
    class Restless(Well):
        def __call__(self, graph, *, atomic_virial=False):
            return {key: value + self.n_calls for key, value in super().__call__(graph).items()}

    batch = batch_of(atoms_in_well(2, 1), atoms_in_well(12, 2))
    dynamics = NVE(Restless())
    dynamics.run(batch, 1)
    batch.status = torch.tensor([1, 0])
    before = [frozen_bits(batch, i) for i in range(2)]
    dynamics.run(batch, 2)
    assert_same_bits(before[0], frozen_bits(batch, 0), ["energy", "forces", "virial", "stress"])
    assert not torch.equal(before[1]["energy"], frozen_bits(batch, 1)["energy"])


@pytest.mark.parametrize("kind", [NVE, NVTLangevin, FIRE])
def test_two_runs_are_one_long_run_without_an_extra_force_call(kind):
    potential, whole, parts = Well(), batch_of(atoms_in_well()), batch_of(atoms_in_well())
    kind(potential).run(whole, 6)
    assert potential.n_calls == 7
    potential.n_calls = 0
    dynamics = kind(potential)
    dynamics.run(parts, 3)
    dynamics.run(parts, 3)
    assert potential.n_calls == 7
    assert torch.equal(whole.positions, parts.positions)
    assert torch.equal(whole.forces, parts.forces)
    for key in whole.keys():  # noqa: SIM118
        assert torch.equal(whole.get(key), parts.get(key)), key


def test_the_first_step_uses_forces_at_the_start():
    data = atoms_in_well(1).replace(velocities=torch.zeros(1, 3), forces=torch.zeros(1, 3), energy=0.0)
    errors = []
    for timestep in (2.0, 1.0):
        batch = batch_of(data)
        potential = Well(k=5.0)
        NVE(potential, timestep).run(batch, 1)
        start = 0.5 * 5.0 * float(data.positions.square().sum())
        end = float(batch.energy + 0.5 * batch.masses @ batch.velocities.square().sum(1))
        errors.append(abs(end - start) / start)
    assert errors[0] < 1e-4
    assert 3.5 < errors[0] / errors[1] < 20


def test_priming_fires_no_hook():
    calls, potential = [], Well()
    hooks = [record(stage, calls) for stage in (HookStageEnum.BEFORE_COMPUTE, HookStageEnum.AFTER_COMPUTE)]
    NVE(potential, hooks=hooks).run(batch_of(atoms_in_well()), 1)
    assert calls == [("BEFORE_COMPUTE", 0), ("AFTER_COMPUTE", 0)]
    assert potential.n_calls == 2


def test_positions_that_a_hook_moves_get_new_forces():
    def shove(batch, dynamics):
        if dynamics.step_count == 1:
            batch.positions = batch.positions + 1.0

    shove.stage, shove.frequency = HookStageEnum.BEFORE_STEP, 1
    potential = Well()
    fire = FIRE(potential, hooks=[shove])
    batch = fire.run(batch_of(atoms_in_well()), 2)
    assert potential.n_calls == 4
    assert torch.allclose(batch.forces, -batch.positions)
    batch.positions[0, 0] += 0.5
    assert not fire.forces_are_current(batch)


def test_a_missing_output_is_named_with_integrator_and_model():
    class Mute(Well):
        def __call__(self, graph, *, atomic_virial=False):
            return {"energy": super().__call__(graph)["energy"]}

    with pytest.raises(RuntimeError, match=r"NVE needs 'forces', which Mute does not return \(it returns energy\)"):
        NVE(Mute()).run(batch_of(atoms_in_well()), 1)


def test_nothing_on_the_batch_requires_grad():
    data = cluster()
    batch = batch_of(data)
    batch.positions = batch.positions.requires_grad_()
    NVTLangevin(LennardJones()).run(batch, 2)
    assert not any(batch.get(key).requires_grad for key in batch.keys())  # noqa: SIM118


class Managed:
    """A context manager that notes what happens to it."""

    stages, frequency = (HookStageEnum.BEFORE_STEP, HookStageEnum.AFTER_STEP), 1

    def __init__(self, name, log, fail_on_enter=False):
        self.name, self.log, self.fail = name, log, fail_on_enter

    def __enter__(self):
        if self.fail:
            raise OSError("no room")
        self.log.append(("enter", self.name))

    def __exit__(self, kind, *_):
        self.log.append(("exit", self.name, kind))

    def __call__(self, batch, dynamics):
        """Nothing to do."""


def test_hooks_are_entered_once_and_left_in_reverse_order():
    log = []
    a, b = Managed("a", log), Managed("b", log)
    dynamics = NVE(Well(), hooks=[a, b])
    dynamics.register_hook(a)
    dynamics.run(batch_of(atoms_in_well()), 2)
    assert log == [("enter", "a"), ("enter", "b"), ("exit", "b", None), ("exit", "a", None)]


def test_hooks_are_left_when_a_later_one_does_not_open_and_see_what_went_wrong():
    log = []
    with pytest.raises(OSError, match="no room"):
        NVE(Well(), hooks=[Managed("a", log), Managed("b", log, True)]).run(batch_of(atoms_in_well()), 2)
    assert log == [("enter", "a"), ("exit", "a", OSError)]

    def broken(batch, dynamics):
        raise ZeroDivisionError

    broken.stage, broken.frequency, closed = HookStageEnum.AFTER_COMPUTE, 1, []
    broken.close = lambda: closed.append(True)
    log.clear()
    dynamics = NVE(Well(), hooks=[Managed("a", log), broken])
    with pytest.raises(ZeroDivisionError):
        dynamics.run(batch_of(atoms_in_well()), 2)
    assert log[-1] == ("exit", "a", ZeroDivisionError)
    assert closed == [True]
    assert dynamics.current_hook_stage is None


class Poison(Well):
    """NaN forces for systems of three atoms from the n-th call on."""

    def __init__(self, after, value=math.nan):
        super().__init__()
        self.after, self.value = after, value

    def __call__(self, graph, *, atomic_virial=False):
        out = super().__call__(graph)
        sick = torch.bincount(graph.system, minlength=graph.n_systems) == 3
        if self.n_calls > self.after:
            out["forces"] = torch.where(sick[graph.system][:, None], self.value, out["forces"])
        return out


@pytest.mark.parametrize("kind", [NVE, NVTLangevin, FIRE])
@pytest.mark.parametrize("after", [0, 2])
def test_a_system_that_explodes_is_set_aside_and_the_others_go_on(kind, after, caplog):
    structures = [atoms_in_well(4, 1), atoms_in_well(3, 2), atoms_in_well(2, 3)]
    batch, healthy = batch_of(*structures), batch_of(structures[0], structures[2])
    healthy.set("system_id", torch.tensor([0, 2]), level="system")
    kind(Poison(after)).run(batch, 6)
    kind(Poison(after)).run(healthy, 6)
    assert batch.outcome.tolist() == [Outcome.RUNNING, Outcome.FAILED, Outcome.RUNNING]
    assert batch.info[1]["failure"] == "energy or forces are not finite"
    assert "system 1 set aside" in caplog.text
    assert torch.isfinite(batch.positions).all()
    assert torch.equal(batch.index_select([0, 2]).positions, healthy.positions)


def test_a_force_beyond_the_guard_sets_the_system_aside():
    batch = batch_of(atoms_in_well(4, 1), atoms_in_well(3, 2))
    dynamics = NVE(Poison(2, 1e4), hooks=[ForceGuard(100.0)])
    dynamics.run(batch, 5)
    assert batch.outcome.tolist() == [Outcome.RUNNING, Outcome.FAILED]
    assert "exceeds the limit of 100 eV/Å" in batch.info[1]["failure"]
    assert batch.get("nve_steps").tolist() == [5, 1]
    with pytest.raises(InputError, match="max_force must be positive"):
        ForceGuard(0.0)


def test_a_system_without_a_neighbour_graph_is_set_aside():
    twins = AtomicData([[0, 0, 0], [0, 0, 1e-9]], [18, 18])
    batch = batch_of(cluster(4), twins, cluster(5, 1))
    NVE(LennardJones()).run(batch, 3)
    assert batch.outcome.tolist() == [0, Outcome.FAILED, 0]
    assert "coincide" in batch.info[1]["failure"]
    assert batch.get("nve_steps").tolist() == [3, 0, 3]


def test_an_unknown_element_is_an_error():
    with pytest.raises(InputError, match="atom 0 is Au"):
        NVE(LennardJones()).run(batch_of(AtomicData([[0, 0, 0]], [79])), 1)


def test_finished_systems_leave_the_model_call():
    sizes = []

    class Counting(Well):
        def __call__(self, graph, *, atomic_virial=False):
            sizes.append(graph.n_atoms)
            return super().__call__(graph)

    batch = batch_of(atoms_in_well(8, 1), atoms_in_well(4, 2))
    dynamics = NVE(Counting())
    dynamics.run(batch, 2)
    batch.status = torch.tensor([1, 0])
    dynamics.run(batch, 2)
    assert sizes == [12, 12, 12, 4, 4]


def test_the_next_dynamics_takes_over_what_an_earlier_one_converged():
    batch = batch_of(cluster(4, 1), cluster(5, 2))
    FIRE(LennardJones(), convergence_hook=0.01).run(batch, 500)
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 2
    before = batch.positions
    dynamics = NVTLangevin(LennardJones())
    dynamics.run(batch, 3)
    assert dynamics.step_count == 3
    assert not torch.equal(before, batch.positions)


def test_a_system_that_is_converged_at_the_start_does_not_move():
    batch = batch_of(atoms_in_well(2, 1), AtomicData(torch.zeros(1, 3), [18], velocities=torch.zeros(1, 3)))
    events = []
    fire = FIRE(Well(), hooks=[record(HookStageEnum.ON_CONVERGE, events)], convergence_hook=0.05)
    fire.run(batch, 500)
    assert batch.get("fire_steps")[1] == 0
    assert torch.equal(batch.positions[-1], torch.zeros(3, dtype=torch.float64))
    assert len(events) == 2


def test_state_follows_selection_and_order():
    batch = batch_of(*(atoms_in_well(n, n) for n in (2, 3, 4)))
    fire = FIRE(Well())
    fire.run(batch, 20)
    turned = batch.index_select([2, 0])
    fire.run(turned, 5)
    fire.run(batch, 5)
    assert torch.equal(batch.index_select([2]).positions, turned.index_select([0]).positions)
    assert torch.equal(batch.index_select([0]).get("fire_dt"), turned.index_select([1]).get("fire_dt"))


def test_bookkeeping_keys_stay_with_their_dynamics():
    one, other = NVE(Well()), NVE(Well())
    one.register_bookkeeping_key("visits", lambda batch: torch.zeros(batch.n_systems))
    a, b = batch_of(atoms_in_well()), batch_of(atoms_in_well())
    one.run(a, 1)
    other.run(b, 1)
    assert "visits" in a
    assert "visits" not in b


def test_float32_structures_are_moved_in_float64():
    batch = batch_of(AtomicData(torch.ones(2, 3) * torch.tensor([[0.1], [0.5]]), [18, 18]))
    NVE(Well()).run(batch, 1)
    assert batch.positions.dtype == batch.velocities.dtype == torch.float64


def test_repr_says_what_it_is():
    text = repr(FIRE(Well(), maxstep=0.1, n_steps=5, convergence_hook=0.02, hooks=[ForceGuard()]))
    assert text == ("FIRE(Well, step_count=0, n_steps=5, maxstep=0.1, ConvergenceHook(fmax <= 0.02), hooks=[ForceGuard])")
    assert "timestep=2.0" in repr(NVE(Well(), 2.0))


def test_a_subclass_needs_only_its_halves():
    class Downhill(BaseDynamics):
        def pre_update(self, batch, mask=None):
            batch.positions = batch.positions + 0.1 * batch.forces

    batch = batch_of(atoms_in_well())
    Downhill(Well(), convergence_hook=0.01).run(batch, 200)
    assert batch.outcome.tolist() == [Outcome.CONVERGED]


def test_memory_stays_flat():
    potential, batch = LennardJones(), batch_of(cluster(3))
    dynamics = NVE(potential)
    dynamics.run(batch, 2)

    def count():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    before = count()
    dynamics.run(batch, 100)
    assert count() <= before + 2


def test_an_empty_batch_is_refused():
    empty = batch_of(atoms_in_well()).index_select([])
    with pytest.raises(InputError, match="NVE was given holds no systems"):
        NVE(Well()).run(empty, 3)
