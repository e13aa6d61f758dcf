"""Hooks that write the same structure in other coordinates."""

import ase.build
import numpy as np
import pytest
import torch
from dynamics_samples import LennardJones, argon, batch_of, cluster

from carryall.data import AtomicData
from carryall.dynamics import (
    FIRE,
    NVE,
    CSVLog,
    HookStageEnum,
    SizeAwareSampler,
    WrapPositions,
    initialize_velocities,
    read_csv_log,
)
from carryall.dynamics.hooks import AlignCell
from carryall.errors import InputError


def turned(seed=0, left_handed=False):
    """Rattled argon in a cell of no special orientation."""
    rng = np.random.default_rng(seed)
    atoms = ase.build.bulk("Ar", "fcc", a=5.4) * (2, 2, 2)
    if left_handed:
        atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    atoms.rattle(0.1, seed=seed)
    atoms.rotate(70, rng.normal(size=3), rotate_cell=True)
    return atoms


def start(*structures):
    batch = batch_of(*structures)
    initialize_velocities(batch, 40.0)
    return batch


@pytest.mark.parametrize("make", [lambda **k: NVE(LennardJones(), 4.0, **k), lambda **k: FIRE(LennardJones(), **k)])
def test_an_aligned_run_is_the_same_run_in_other_coordinates(make, tmp_path):
    path = tmp_path / "log.csv"
    plain, aligned = start(turned(1), cluster(4), turned(2)), start(turned(1), cluster(4), turned(2))
    make().run(plain, 15)
    make(hooks=[AlignCell(), CSVLog(path, 1)]).run(aligned, 15)
    torch.testing.assert_close(aligned.energy, plain.energy, atol=1e-10, rtol=0)
    for index in (0, 2):
        cell = aligned.cell[index]
        assert (cell.triu(1) == 0).all()
        assert (cell.diagonal() > 0).all()
        # one rotation takes everything of the plain run to the aligned one
        rotation = torch.linalg.inv(plain.cell[index]) @ cell
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3).double(), atol=1e-12, rtol=0)
        assert float(torch.linalg.det(rotation)) == pytest.approx(1.0)
        rows = slice(int(plain.ptr[index]), int(plain.ptr[index + 1]))
        for key in ("positions", "velocities", "forces"):
            torch.testing.assert_close(plain.get(key)[rows] @ rotation, aligned.get(key)[rows], atol=1e-9, rtol=0)
        for key in ("stress", "virial"):
            there = rotation.T @ plain.get(key)[index] @ rotation
            torch.testing.assert_close(there, aligned.get(key)[index], atol=1e-9, rtol=0)
    # a system that has no cell to turn keeps its bits
    rows = slice(int(plain.ptr[1]), int(plain.ptr[2]))
    assert torch.equal(plain.positions[rows], aligned.positions[rows])
    energies = read_csv_log(path)["total_energy"].reshape(-1, 3)
    assert np.ptp(energies[:2], axis=0).max() < 1e-3


def test_aligning_costs_no_model_call_and_happens_once():
    potential = LennardJones()
    batch = start(turned(1))
    dynamics = NVE(potential, hooks=[AlignCell()])
    dynamics.run(batch, 3)
    assert potential.n_calls == 4
    before = batch.cell.clone()
    dynamics.run(batch, 3)
    assert torch.equal(batch.cell, before)


def test_the_forces_after_turning_are_those_of_the_turned_structure():
    batch = start(turned(3))
    seen = {}

    def note(batch, dynamics):
        seen.setdefault("forces", batch.forces.clone())
        seen.setdefault("positions", batch.positions.clone())
        seen.setdefault("stress", batch.stress.clone())

    note.stages, note.frequency = (HookStageEnum.BEFORE_PRE_UPDATE,), 1
    NVE(LennardJones(), hooks=[AlignCell(), note]).run(batch, 1)
    fresh = batch_of(AtomicData(seen["positions"], [18] * 8, batch.cell[0], [True] * 3))
    NVE(LennardJones()).run(fresh, 0)
    torch.testing.assert_close(seen["forces"], fresh.forces, atol=1e-11, rtol=0)
    torch.testing.assert_close(seen["stress"], fresh.stress, atol=1e-12, rtol=0)


def test_left_handed_cells_are_turned_not_mirrored():
    batch, plain = start(turned(1, left_handed=True)), start(turned(1, left_handed=True))
    NVE(LennardJones(), hooks=[AlignCell()]).run(batch, 2)
    NVE(LennardJones()).run(plain, 2)
    cell = batch.cell[0]
    assert (cell.triu(1) == 0).all()
    assert (cell.diagonal().sign() == torch.tensor([1.0, 1.0, -1.0])).all()
    torch.testing.assert_close(batch.energy, plain.energy, atol=1e-10, rtol=0)
    rotation = torch.linalg.inv(plain.cell[0]) @ cell
    torch.testing.assert_close(plain.positions @ rotation, batch.positions, atol=1e-10, rtol=0)


def test_cells_are_aligned_as_they_come_in_flight_and_before_a_cell_moves():
    given = [turned(seed) for seed in range(4)]
    sampler = SizeAwareSampler(given, max_atoms=16)
    done = FIRE(
        LennardJones(), cell_filter="frechet", sampler=sampler, hooks=[AlignCell()], n_steps=5, refill_frequency=2
    ).run()
    alone = FIRE(LennardJones(), cell_filter="frechet").run(batch_of(turned(3)), 5)
    torch.testing.assert_close(done.energy[3], alone.energy[0], atol=1e-10, rtol=0)
    metric = alone.cell[0] @ alone.cell[0].T
    torch.testing.assert_close(done.cell[3] @ done.cell[3].T, metric, atol=1e-9, rtol=0)
    # the strain of a relaxation is symmetric, not triangular: aligned is the cell that it began with
    assert (done.get("fire_reference_cell").triu(1) == 0).all()


def test_atoms_that_move_along_some_axes_only_cannot_be_turned():
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[0, 1] = False
    data = AtomicData.from_ase(turned(1)).replace(atom_extras={"move_mask": mask})
    with pytest.raises(InputError, match="fixed along some axes only"):
        NVE(LennardJones(), hooks=[AlignCell()]).run(batch_of(data), 1)


def test_wrapping_leaves_atoms_in_the_cell_bit_for_bit():
    atoms = argon(1)
    atoms.positions[1] += 3 * atoms.cell.array[0] - atoms.cell.array[2]
    batch, plain = batch_of(atoms, cluster(4)), batch_of(argon(1), cluster(4))
    potential = LennardJones()
    NVE(potential, hooks=[WrapPositions()]).run(batch, 1)
    NVE(LennardJones()).run(plain, 1)
    others = [0, 2, 3, 4, 5, 6, 7]
    inside = (plain.positions[:4] >= 0).all(1) & (plain.positions[:4] < 5.4).all(1)
    for row in others:
        if row >= 4 or bool(inside[row]):
            torch.testing.assert_close(batch.positions[row], plain.positions[row], atol=1e-12, rtol=0)
    fractional = batch.positions[:4] / 5.4
    assert ((fractional >= 0) & (fractional < 1)).all()
    assert potential.n_calls == 2
