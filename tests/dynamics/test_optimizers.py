"""FIRE, L-BFGS and gradient descent with every cell filter against ASE, step by step."""

import numpy as np
import pytest
from optimizer_samples import batch_and_references, crystals

FREE = {"cell_filter": None}
SKEW = [[1, 1, 0], [1, 1, 1], [0, 1, 0]]
CELLS = {
    "fixed": FREE,
    "unit cell": {"cell_filter": "unit_cell"},
    "unit cell, pressure, mask": {"cell_filter": "unit_cell", "pressure": 0.4, "cell_mask": [1, 0, 1, 0, 1, 0]},
    "unit cell, pressure, hydrostatic": {"cell_filter": "unit_cell", "pressure": -0.1, "hydrostatic_strain": True},
    "unit cell, volume, factor": {"cell_filter": "unit_cell", "constant_volume": True, "cell_factor": 3.0},
    "frechet": {"cell_filter": "frechet"},
    "frechet, pressure, mask": {"cell_filter": "frechet", "pressure": 0.7, "cell_mask": SKEW},
    "frechet, pressure, hydrostatic": {"cell_filter": "frechet", "pressure": 0.2, "hydrostatic_strain": True},
    "frechet, volume, factor, mask": {"cell_filter": "frechet", "constant_volume": True, "cell_factor": 2.0, "cell_mask": SKEW},
}
SETTINGS = {
    "fire": {},
    "lbfgs": {"memory": 8, "damping": 0.9, "alpha": 5.0, "maxstep": 0.1},
    "descent": {"step_size": 0.5, "maxstep": 0.05},
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
@pytest.mark.parametrize("kind", SETTINGS)
def test_every_system_takes_the_steps_of_ase(kind, cell):
    images = crystals()[: 3 if kind == "fire" else 2]
    start = [(atoms.positions.copy(), atoms.cell.array.copy()) for atoms in images]
    batch, ours, references = batch_and_references(kind, images, cell, **SETTINGS[kind])
    for step in range(32):
        ours.run(batch, 1)
        for index, (atoms, reference) in enumerate(zip(images, references, strict=True)):
            reference.step()
            data = batch.get_data(index)
            np.testing.assert_allclose(
                data.positions, atoms.positions, atol=1e-10, rtol=0, err_msg=f"step {step}, system {index}"
            )
            np.testing.assert_allclose(data.cell, atoms.cell.array, atol=1e-10, rtol=0)
            assert float(batch.energy[index]) == pytest.approx(atoms.get_potential_energy(), abs=1e-10, rel=0)
    for (positions, box), atoms in zip(start, images, strict=True):
        assert np.abs(positions - atoms.positions).max() > 0.05
        assert (np.abs(box - atoms.cell.array).max() > 0.005) == (cell is not FREE)
