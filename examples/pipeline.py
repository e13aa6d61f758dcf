"""Thirty crystals relax on one rank, heat up on a second and run on a third; without torchrun one process does it all in turn.

torchrun --nproc-per-node 3 examples/pipeline.py
"""

import carryall
from carryall.cli.inputs import face_centered_cubic
from carryall.dynamics import FIRE, NVE, NVTLangevin, initialize_velocities

potential = carryall.load("lj-argon")
relax = FIRE(potential, convergence_hook=0.02, n_steps=200)
heat = NVTLangevin(
    potential,
    temperature=30.0,
    timestep=4.0,
    friction=5.0,
    seed=1,
    n_steps=50,
    init_fn=lambda batch: initialize_velocities(batch, 30.0, seed=1),  # for each system as it comes into the stage
)
run = NVE(potential, timestep=4.0, n_steps=50)

pipeline = relax | heat | run
structures = [face_centered_cubic("Ar", 5.3, repeats=1 + number % 3, rattle=0.1, seed=number) for number in range(30)]
results = pipeline.run(structures, out="run", resume=True)

if results is not None:  # rank 0 has them, the others None
    assert [one.index for one in results] == list(range(30))
    assert all(one.outcome == "step_budget" for one in results)
    print(results[0].structure.info["stages"])
    print(f"{len(results)} crystals, mean energy {sum(one.energy / one.structure.n_atoms for one in results) / 30:.6f} eV/atom")
