"""Atoms taken over from LAMMPS, and forces given back: the compiled form and numpy's, against what was put in."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from carryall.engines.lammps import atoms, forces
from carryall.engines.lammps.atoms import NOT_FINITE, OTHER_IDS, OTHER_TYPES, AtomReader
from carryall.engines.lammps.forces import ForceWriter, write_own
from carryall.errors import InputError
from carryall.exchange import SerialTransport, Transport, plan_from_ids, plan_from_owners
from carryall.native import library
from ranks import run_ranks


@pytest.fixture(params=["native", "numpy"], autouse=True)
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        for module in (atoms, forces):
            monkeypatch.setattr(module, "library", lambda: None)
    elif library() is None:
        pytest.skip("no C++ compiler")


class FakeLammps:
    """Atoms where LAMMPS would have them: rows of positions behind a table of pointers."""

    def __init__(self, n_atoms: int, n_local: int, tag_type: str) -> None:
        self.tag_type, self.n_local, self.n_ghost = np.dtype(tag_type), n_local, n_atoms - n_local
        self.x = np.random.default_rng(n_atoms).standard_normal((n_atoms, 3))
        self.ids = np.arange(1, n_atoms + 1, dtype=self.tag_type)
        self.kinds = np.ones(n_atoms, dtype=np.int32)

    def types(self) -> int:
        return self.kinds.ctypes.data

    def read(self, reader: AtomReader) -> int:
        first, self.rows = pointer(self.x)
        return reader.read(self.n_local, self.ids.ctypes.data, first)


def pointer(rows: np.ndarray) -> tuple[int, ctypes.c_void_p]:
    """Address of a pointer to the first row, and what keeps it."""
    kept = ctypes.c_void_p(rows.ctypes.data)
    return ctypes.addressof(kept), kept


@pytest.mark.parametrize("tag_type", ["int32", "int64"])
def test_a_reading_says_what_is_other_than_before(tag_type: str) -> None:
    fake = FakeLammps(23, 9, tag_type)
    reader = AtomReader(fake, 0.1)  # type: ignore[arg-type]
    assert fake.read(reader) == OTHER_IDS | OTHER_TYPES
    assert fake.read(reader) == 0
    fake.x += 1.0
    assert fake.read(reader) == 0
    np.testing.assert_array_equal(reader.positions.numpy(), fake.x * 0.1)
    fake.ids[[3, 22]] = fake.ids[[22, 3]]
    assert fake.read(reader) == OTHER_IDS
    fake.kinds[22] = 2
    assert fake.read(reader) == OTHER_TYPES
    assert (reader.types.tolist(), reader.ids.tolist()) == (fake.kinds.tolist(), fake.ids.tolist())
    # an atom that was a ghost and now is the rank's own
    fake.n_local, fake.n_ghost = 10, 13
    assert fake.read(reader) == OTHER_IDS


def test_a_rank_without_atoms() -> None:
    fake = FakeLammps(0, 0, "int32")
    reader = AtomReader(fake, 1.0)  # type: ignore[arg-type]
    assert fake.read(reader) & OTHER_IDS
    assert reader.positions.shape == (0, 3)
    none = torch.zeros(0, 3, dtype=torch.float64)
    place, _kept = pointer(fake.x)
    ForceWriter(plan_from_owners(0, torch.zeros(0, dtype=torch.int64)), SerialTransport(), 1.0).write(none, reader.ids, place)
    write_own(none, 1.0, reader.ids, place)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_position_that_is_no_number_is_found(value: float) -> None:
    fake = FakeLammps(50, 20, "int32")
    reader = AtomReader(fake, 1.0)  # type: ignore[arg-type]
    fake.read(reader)
    fake.x[41, 2] = value
    assert fake.read(reader) == NOT_FINITE


def test_ghosts_give_their_forces_to_their_owners() -> None:
    rng = np.random.default_rng(0)
    forces, owner, unit = rng.standard_normal((31, 3)), rng.integers(0, 11, 20), 0.043
    found = np.full((11, 3), np.nan)
    place, kept = pointer(found)
    writer = ForceWriter(plan_from_owners(11, torch.from_numpy(owner)), SerialTransport(), unit)
    for _ in range(2):
        writer.write(torch.from_numpy(forces), np.arange(11), place)
        sums = forces[:11].copy()
        for ghost, row in enumerate(owner):
            sums[row] += forces[11 + ghost]
        np.testing.assert_allclose(found, sums / unit, rtol=0, atol=1e-12)
        forces = forces[::-1].copy()
    assert kept.value == found.ctypes.data


def test_forces_go_to_owners_on_other_ranks() -> None:
    """Three ranks, some ghosts of each other's atoms, some of their own: each atom's force is the sum over all its copies."""
    rng = np.random.default_rng(1)
    owned = [[3, 8, 1], [4, 0, 7, 9], [2, 5, 6]]
    ghosts = [[4, 3, 5, 4], [2, 2, 8, 0], []]
    forces = [rng.standard_normal((len(own) + len(more), 3)) for own, more in zip(owned, ghosts, strict=True)]
    sums = np.zeros((10, 3))
    for own, more, part in zip(owned, ghosts, forces, strict=True):
        np.add.at(sums, own + more, part)

    def run(transport: Transport) -> np.ndarray:
        rank = transport.rank
        plan = plan_from_ids(torch.tensor(owned[rank]), torch.tensor(ghosts[rank], dtype=torch.int64), transport)
        found = np.zeros((len(owned[rank]), 3))
        place, _kept = pointer(found)
        ForceWriter(plan, transport, 2.0).write(torch.from_numpy(forces[rank]), np.array(owned[rank]), place)
        return found

    for rank, found in enumerate(run_ranks(3, run)):
        np.testing.assert_allclose(found, sums[owned[rank]] / 2.0, rtol=0, atol=1e-12)


def test_a_force_that_is_no_number_is_named() -> None:
    found, ids = np.zeros((6, 3)), np.arange(100, 106)
    place, _kept = pointer(found)
    writer = ForceWriter(plan_from_owners(6, torch.tensor([0, 4])), SerialTransport(), 1.0)
    forces = torch.zeros(8, 3, dtype=torch.float64)
    forces[7, 1] = torch.nan
    with pytest.raises(InputError, match="force of the atom with id 104 is"):
        writer.write(forces, ids, place)
    forces[2, 0] = torch.inf
    with pytest.raises(InputError, match="force of the atom with id 102 is"):
        write_own(forces[:6], 1.0, ids, place)


@pytest.mark.parametrize("forces", [torch.zeros(7, 3, dtype=torch.float64), torch.zeros(8, 3)])
def test_rows_that_are_not_those_of_the_atoms_are_refused(forces: torch.Tensor) -> None:
    writer = ForceWriter(plan_from_owners(6, torch.tensor([0, 4])), SerialTransport(), 1.0)
    with pytest.raises(InputError, match=r"expected \(8, 3\) and torch.float64"):
        writer.write(forces, np.arange(6), pointer(np.zeros((6, 3)))[0])
