from __future__ import annotations

import numpy as np
import pytest
import torch
from structure_samples import random_structure

from carryall.data import AtomicData, Batch
from carryall.errors import InputError


def sample(*sizes: tuple[int, int], seed: int = 0, **options: object) -> list[AtomicData]:
    rng = np.random.default_rng(seed)
    return [random_structure(rng, n_atoms, n_edges, **options) for n_atoms, n_edges in sizes]  # type: ignore[arg-type]


def test_attributes_set_and_get() -> None:
    batch = Batch.from_data_list(sample((3, 0), (2, 0), optional=(), extras=False))
    batch.forces = torch.ones(5, 3)
    batch.energy = [1.0, 2.0]
    batch.set("tag", torch.arange(5), level="atom")
    batch.positions += 1.0
    batch.tag = batch.tag + 1
    assert batch.tag.tolist() == [1, 2, 3, 4, 5]
    assert batch.level_of("tag") == "atom"
    assert "tag" in batch
    assert "nothing" not in batch
    assert batch.keys("system") == ["cell", "pbc", "energy"]
    assert set(batch.keys()) == {"cell", "pbc", "energy", "positions", "atomic_numbers", "forces", "tag"}
    batch.remove("tag")
    assert "tag" not in batch
    torch.testing.assert_close(batch.volume, torch.linalg.det(batch.cell).abs())


def test_set_in_a_batch_with_room_touches_what_is_held() -> None:
    batch = Batch.from_data_list(sample((3, 0), (2, 0), extras=False))
    room = Batch.empty(4, 9, like=batch)
    room.put(batch)
    room.velocities = torch.full((5, 3), 2.0, dtype=torch.float64)
    room.positions *= 0
    room.set("done", torch.tensor([True, False]), level="system")
    assert room.velocities.shape == (5, 3)
    batch.set("done", torch.tensor([True, True]), level="system")
    assert room.put(batch, [True, False]).tolist() == [True, False]
    assert room.done.tolist() == [True, False, True]
    assert torch.equal(room.positions[5:], batch.positions[:3])
    assert room.positions[:5].abs().max() == 0


@pytest.mark.parametrize(
    ("key", "value", "level", "message"),
    [
        ("forces", torch.ones(4, 3), None, r"'forces' has shape \(4, 3\), expected \(5, 3\)"),
        ("energy", torch.ones(2, 1), None, r"'energy' has shape \(2, 1\), expected \(2,\)"),
        ("tag", torch.ones(5), None, "'tag' is a new key: say its level"),
        ("tag", torch.ones(5), "atoms", "got 'atoms'"),
        ("tag", torch.ones(2), "atom", r"'tag' has shape \(2,\)"),
        ("forces", torch.ones(5, 3), "system", "'forces' is of level 'atom', not 'system'"),
    ],
)
def test_bad_set_is_named(key: str, value: torch.Tensor, level: str | None, message: str) -> None:
    batch = Batch.from_data_list(sample((3, 0), (2, 0), extras=False))
    with pytest.raises(InputError, match=message):
        batch.set(key, value, level=level)


def test_wrong_names_are_named() -> None:
    batch = Batch.from_data_list(sample((3, 0)))
    with pytest.raises(InputError, match=r"no key 'force'.*perhaps you meant 'forces'"):
        batch.get("force")
    with pytest.raises(AttributeError, match="no key 'force'"):
        _ = batch.force
    with pytest.raises(AttributeError, match=r"use batch.set\('tag'"):
        batch.tag = torch.ones(3)
    with pytest.raises(AttributeError, match="cannot be set"):
        batch.ptr = torch.ones(3)
    with pytest.raises(InputError, match="'positions' cannot be removed"):
        batch.remove("positions")
    with pytest.raises(InputError, match="level must be one of"):
        batch.keys("node")
