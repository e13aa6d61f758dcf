"""What barostats refuse: settings, systems that do not fit, cells that explode."""

import math

import numpy as np
import pytest
import torch
from barostat_samples import BAROSTATS, MASS, MODES, LooseAtoms, ScaledSprings, gas, triclinic_gas
from dynamics_samples import batch_of, cluster

from carryall.data import AtomicData
from carryall.dynamics.constraints import FixSymmetry
from carryall.dynamics.integrators.cell_rescaling import NPTStochasticCellRescaling
from carryall.dynamics.integrators.mtk import NPT
from carryall.errors import InputError

every_barostat = pytest.mark.parametrize("name", BAROSTATS)
every_mode = pytest.mark.parametrize("mode", MODES)


def test_settings_are_checked():
    for make in BAROSTATS.values():
        with pytest.raises(InputError, match="mode must be one of isotropic, anisotropic, triclinic, got 'cubic'"):
            make(LooseAtoms(), mode="cubic")
        with pytest.raises(InputError, match="barostat_tau must be positive"):
            make(LooseAtoms(), barostat_tau=0.0)
        assert make(LooseAtoms(), pressure=-0.5).describe()["pressure"] == -0.5
        with pytest.raises(InputError, match="mode 'triclinic' with FixSymmetry"):
            make(LooseAtoms(), mode="triclinic", constraints=[FixSymmetry()])
    with pytest.raises(InputError, match="temperature must be positive"):
        NPT(LooseAtoms(), temperature=0.0)
    with pytest.raises(InputError, match="chain_length must be a whole number of at least 1, got 0"):
        NPT(LooseAtoms(), chain_length=0)
    with pytest.raises(InputError, match="compressibility must be positive"):
        NPTStochasticCellRescaling(LooseAtoms(), compressibility=0.0)


@every_barostat
def test_systems_that_do_not_fit_are_set_aside_with_the_reason(name):
    slab = gas(seed=1).replace(pbc=[True, True, False])
    flat = gas(seed=2).replace(cell=[[8.0, 0, 0], [0, 8, 0], [0, 8, 0]])
    free = cluster(8).replace(masses=[MASS] * 8, velocities=np.ones((8, 3)))
    group = [gas(seed=4), free, slab, flat, gas(seed=3), triclinic_gas(5)]
    batch = batch_of(*group)
    mask = torch.ones(batch.n_atoms, dtype=torch.bool)
    mask[batch.ptr[4] : batch.ptr[4] + 2] = False
    batch.set("move_mask", mask, level="atom")
    start = batch.clone()
    BAROSTATS[name](ScaledSprings(), mode="anisotropic").run(batch, 3)
    reasons = [info.get("failure") for info in batch.info]
    assert reasons[0] is None
    assert "periodic along all three" in reasons[1]
    assert "periodic along all three" in reasons[2]
    assert "a cell with volume" in reasons[3]
    assert "2 of its atoms may not move" in reasons[4]
    assert "rectangular cell" in reasons[5]
    assert torch.equal(batch.positions[16:], start.positions[16:])
    assert torch.equal(batch.cell[1:], start.cell[1:])
    assert not torch.equal(batch.cell[0], start.cell[0])


@pytest.mark.parametrize("name", ["NPT", "rescaling"])
def test_a_system_at_rest_is_set_aside(name):
    batch = batch_of(gas(seed=1, kelvin=0.0), gas(seed=2))
    BAROSTATS[name](ScaledSprings()).run(batch, 2)
    assert "at rest" in batch.info[0]["failure"]
    assert "failure" not in batch.info[1]


class Wrong(ScaledSprings):
    """A virial that is far too large, or no number, in systems of 5 atoms."""

    def __init__(self, virial):
        super().__init__()
        self.wrong = virial

    def __call__(self, graph, *, atomic_virial=False):
        found = super().__call__(graph)
        counts = torch.bincount(graph.system, minlength=len(graph.cell))
        found["virial"] = torch.where((counts == 5)[:, None, None], self.wrong, found["virial"])
        return found


@every_mode
@every_barostat
@pytest.mark.parametrize("virial", [1e6, -1e6, math.nan, math.inf])
def test_a_cell_that_explodes_is_set_aside_alone(name, mode, virial, recwarn):
    batch, alone = batch_of(gas(seed=1), gas(seed=2, n_atoms=5)), batch_of(gas(seed=1))
    BAROSTATS[name](Wrong(virial), mode=mode).run(batch, 6)
    BAROSTATS[name](Wrong(virial), mode=mode).run(alone, 6)
    assert "strain the cell by" in batch.info[1]["failure"]
    assert bool(batch.cell.isfinite().all())
    assert torch.equal(batch.cell[0], alone.cell[0])
    assert torch.equal(batch.positions[:16], alone.positions)
    assert not recwarn.list


def test_an_empty_system_hurts_nobody():
    nothing = AtomicData(np.zeros((0, 3)), [], cell=np.eye(3) * 5, pbc=[True] * 3, velocities=np.zeros((0, 3)), masses=[])
    for make in BAROSTATS.values():
        batch, alone = batch_of(gas(seed=1), nothing), batch_of(gas(seed=1))
        make(LooseAtoms()).run(batch, 2)
        make(LooseAtoms()).run(alone, 2)
        assert torch.equal(batch.positions, alone.positions)
        assert "no atoms" in batch.info[1]["failure"]
