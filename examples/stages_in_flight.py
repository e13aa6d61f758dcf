"""Thirty crystals: relax each, heat it, let it run at constant energy; with room for a few hundred atoms at a time."""

import carryall
from carryall.cli.inputs import face_centered_cubic
from carryall.dynamics import (
    FIRE,
    NVE,
    FusedStage,
    MemorySink,
    NVTLangevin,
    Outcome,
    Ramp,
    SizeAwareSampler,
    initialize_velocities,
)
from carryall.dynamics.thermo import temperature

potential = carryall.load("lj-argon")
structures = [face_centered_cubic("Ar", 5.3, repeats=1 + number % 3, rattle=0.1, seed=number) for number in range(30)]

relax = FIRE(potential, convergence_hook=0.01)
heat = NVTLangevin(potential, Ramp((0, 100), (5.0, 30.0)), timestep=4.0, friction=5.0, n_steps=150)
run = NVE(potential, timestep=4.0, n_steps=100)

finished = MemorySink()
stages = FusedStage(
    [relax, heat, run],
    sampler=SizeAwareSampler(structures, max_atoms=400),
    sinks=[finished],
    init_fn=lambda batch: initialize_velocities(batch, 5.0, seed=1),
)
stages.run()

results = finished.read()
outcomes = [Outcome(number).name for number in results.outcome.tolist()]
assert sorted(results.system_id.tolist()) == list(range(30))
assert outcomes == ["STEP_BUDGET"] * 30  # the last stage ends by its steps
print(f"{len(finished)} crystals in {stages.step_count} steps of the batch")
print(f"steps of FIRE: {results.fire_steps.min()} to {results.fire_steps.max()}")
print(f"mean temperature at the end: {float(temperature(results, removed=3).mean()):.1f} K")
