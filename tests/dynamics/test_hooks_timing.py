"""Where the time of a step goes, and what every hook has to be."""

import inspect
import io
import itertools
import json
import re

import pytest
from dynamics_samples import Well, atoms_in_well, batch_of, record
from rich.console import Console

from carryall.dynamics import FIRE, NVE, HookStageEnum
from carryall.dynamics import hooks as all_hooks
from carryall.dynamics.hooks import Profiler, StageTiming
from carryall.dynamics.hooks.ase import ASETrajectory
from carryall.dynamics.hooks.base import check_hook
from carryall.errors import InputError


def pair():
    return batch_of(atoms_in_well(3, 1), atoms_in_well(2, 2))


def test_spans_are_those_of_the_clock():
    ticks = iter(range(1000))
    timing = StageTiming(clock=lambda: float(next(ticks)) ** 2)
    NVE(Well(), hooks=[timing]).run(pair(), 3)
    found = timing.summary()
    names = [stage.name for stage in HookStageEnum][:-1]
    assert list(found) == [*itertools.pairwise(names), (names[-1], names[0])]
    # tick k comes at k²: the span that ends at tick k lasts 2 k - 1
    first = found["BEFORE_STEP", "BEFORE_PRE_UPDATE"]
    assert (first.count, first.total, first.longest) == (3, 1.0 + 17.0 + 33.0, 33.0)
    assert first.mean == 17.0
    between = found["AFTER_STEP", "BEFORE_STEP"]
    assert (between.count, between.total) == (2, 15.0 + 31.0)
    assert sum(one.total for one in found.values()) == 23.0**2


def test_a_pause_between_runs_belongs_to_no_span_and_the_table_is_for_terminals():
    loud, quiet = (Console(file=io.StringIO(), force_terminal=flag, width=120) for flag in (True, False))
    for console in (loud, quiet):
        timing = StageTiming([HookStageEnum.BEFORE_COMPUTE, HookStageEnum.AFTER_COMPUTE], console=console)
        dynamics = NVE(Well(), hooks=[timing])
        for _ in range(2):
            dynamics.run(pair(), 4)
        assert timing.summary()["BEFORE_COMPUTE", "AFTER_COMPUTE"].count == 8
        assert timing.summary()["AFTER_COMPUTE", "BEFORE_COMPUTE"].count == 6
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", loud.file.getvalue())
    assert re.search(r"BEFORE_COMPUTE .* AFTER_COMPUTE .* 8 ", text)
    assert quiet.file.getvalue() == ""
    with pytest.raises(InputError, match="at least two stages"):
        StageTiming([HookStageEnum.BEFORE_STEP])
    with pytest.raises(InputError, match="none of ON_CONVERGE"):
        StageTiming(HookStageEnum)


def steps_in(path):
    events = json.loads(path.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")})


def test_the_profiler_writes_the_active_steps(tmp_path):
    path = tmp_path / "trace.json"
    batch, profiler = pair(), Profiler(path, wait=2, warmup=1, active=3)
    NVE(Well(), hooks=[profiler]).run(batch, 20)
    assert len(steps_in(path)) == 3
    path.unlink()
    # again in a second run; one that ends early is written as far as it came, one without an active step not at all
    dynamics = NVE(Well(), hooks=[profiler])
    dynamics.run(batch, 5)
    assert len(steps_in(path)) == 2
    path.unlink()
    dynamics.run(batch, 3)
    assert not path.exists()
    with pytest.raises(InputError, match="active of Profiler must be a whole number of at least 1"):
        Profiler(path, active=0)


def test_the_profiler_ends_with_a_run_that_fails(tmp_path):
    def fail(batch, dynamics):
        if dynamics.step_count == 3:
            raise RuntimeError("enough")

    fail.stage, fail.frequency = HookStageEnum.BEFORE_STEP, 1
    profiler = Profiler(tmp_path / "trace.json", wait=0, warmup=1, active=50)
    with pytest.raises(RuntimeError, match="enough"):
        NVE(Well(), hooks=[profiler, fail]).run(pair(), 10)
    assert (tmp_path / "trace.json").exists()
    NVE(Well(), hooks=[Profiler(tmp_path / "other.json")]).run(pair(), 10)
    assert (tmp_path / "other.json").exists()


def made(kind, folder):
    """A hook of a class, with what it needs."""
    needs = {name for name, one in inspect.signature(kind.__init__).parameters.items() if one.default is one.empty}
    values = {"path": folder / f"{kind.__name__}.h5", "function": lambda batch: {}}
    found = {name: values[name] for name in needs - {"self", "args", "kwargs"}}
    return kind([0]) if kind.__name__ == "FreezeAtoms" else kind(**found)


KINDS = [
    kind
    for kind in (*vars(all_hooks).values(), ASETrajectory)
    if inspect.isclass(kind) and "__call__" in vars(kind) and kind.__name__ != "Hook"
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_hook_can_be_registered_and_waits_for_no_convergence(kind, tmp_path):
    hook = made(kind, tmp_path)
    check_hook(hook)
    NVE(Well(), hooks=[hook])
    well = Well()
    stages = NVE(well, n_steps=2, hooks=[hook]) + NVE(well, n_steps=2)
    stages.register_fused_hook(hook)


def test_a_hook_shared_by_stages_is_entered_once():
    entered = []

    class Both:
        stage, frequency = HookStageEnum.AFTER_STEP, 1

        def __enter__(self):
            entered.append("in")

        def __exit__(self, kind, error, trace):
            entered.append(kind)

        def __call__(self, batch, dynamics):
            if dynamics.step_count == 2:
                raise ValueError("stop")

    well, hook = Well(), Both()
    stages = NVE(well, n_steps=2, hooks=[hook]) + NVE(well, n_steps=2, hooks=[hook])
    stages.register_fused_hook(hook)
    with pytest.raises(ValueError, match="stop"):
        stages.run(pair())
    assert entered == ["in", ValueError]


def test_a_hook_at_a_stage_that_never_comes_is_refused():
    calls = []
    hook = record(HookStageEnum.ON_CONVERGE, calls)
    with pytest.raises(InputError, match="waits for ON_CONVERGE, which never comes"):
        NVE(Well(), hooks=[hook])
    NVE(Well(), n_steps=3, hooks=[hook])
    well = Well()
    stages = FIRE(well, n_steps=2) + NVE(well)
    with pytest.raises(InputError, match="waits for ON_CONVERGE"):
        NVE(well).register_hook(hook)
    stages.register_fused_hook(hook)


def test_a_hook_of_forces_needs_no_stage_but_one_without_both_is_refused():
    class Idle:
        stages = ()

        def __call__(self, batch, dynamics):
            """Never called."""

    with pytest.raises(InputError, match="Idle has no stages"):
        NVE(Well(), hooks=[Idle()])
