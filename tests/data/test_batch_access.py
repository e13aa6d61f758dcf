"""What a batch shows through attributes and `get` is always what it holds, whatever was done to it before."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_samples import assert_same, random_structure, structure_lists
from torch import Tensor

from carryall.data import AtomicData, Batch
from carryall.errors import InputError

quick = settings(max_examples=40, deadline=None, derandomize=True)
STEPS = ("set", "set again", "attribute", "in place", "remove", "append", "put", "trim", "zero", "select", "copy", "pickle")


def sample(*sizes: int, seed: int = 0, **options: object) -> list[AtomicData]:
    rng = np.random.default_rng(seed)
    return [random_structure(rng, n_atoms, 2, **options) for n_atoms in sizes]  # type: ignore[arg-type]


def small(*sizes: int, seed: int = 0) -> Batch:
    return Batch.from_data_list(sample(*sizes, seed=seed, optional=("energy",), extras=False))


class Model:
    """A batch as plain lists: for each key one tensor per system."""

    def __init__(self, batch: Batch) -> None:
        cuts = {"system": [1] * batch.n_systems, "atom": batch.atom_counts}
        keys = batch.keys()
        self.empty = {key: batch.get(key)[:0] for key in keys}
        self.rows = {key: list(batch.get(key).clone().split(cuts[batch.level_of(key)])) for key in keys}

    def whole(self, key: str) -> Tensor:
        return torch.cat([self.empty[key], *self.rows[key]])

    def set(self, key: str, value: Tensor, counts: list[int]) -> None:
        self.empty[key], self.rows[key] = value[:0], list(value.clone().split(counts))

    def check(self, batch: Batch) -> None:
        assert set(batch.keys()) == self.rows.keys()
        for key in self.rows:
            value = self.whole(key)
            for shown in (batch.get(key), getattr(batch, key), batch.get(key)):
                assert shown.dtype == value.dtype, key
                assert torch.equal(shown, value), key
        for name in {"energy", "tag"} - self.rows.keys():
            assert name not in batch
            assert not hasattr(batch, name)
            with pytest.raises(InputError, match=f"no key '{name}'"):
                batch.get(name)
        counts = [len(one) for one in self.rows["positions"]]
        assert batch.atom_counts == counts
        assert (batch.n_systems, batch.n_atoms, batch.n_edges) == (len(counts), sum(counts), 0)
        assert batch.ptr.tolist() == np.cumsum([0, *counts]).tolist()
        assert batch.system.tolist() == np.repeat(np.arange(len(counts)), counts).tolist()


def other_for(batch: Batch, seed: int) -> Batch:
    """One more system with the keys of `batch`."""
    other = small(2, seed=seed)
    if "energy" not in batch:
        other.remove("energy")
    if "tag" in batch:
        other.set("tag", torch.ones(2, 2, dtype=torch.int64), level="atom")
    return other


def apply(step: str, batch: Batch, model: Model, seed: int) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    if step == "set":
        tag = torch.randint(99, (batch.n_atoms, 2), generator=rng)
        model.set("tag", tag, batch.atom_counts)
        batch.set("tag", tag, level="atom")
    elif step == "set again":
        value = torch.rand(batch.n_systems, 3, 3, generator=rng, dtype=torch.float64)
        model.set("cell", value, [1] * batch.n_systems)
        batch.set("cell", value)
    elif step == "attribute":
        model.rows["positions"] = [one + seed for one in model.rows["positions"]]
        batch.positions = batch.positions + seed
    elif step == "in place":
        model.rows["positions"] = [one * 2 for one in model.rows["positions"]]
        batch.positions *= 2
    elif step == "remove" and "energy" in batch:
        del model.rows["energy"]
        batch.remove("energy")
    elif step in ("append", "put"):
        other = other_for(batch, seed)
        if step == "append":
            assert batch.append(other) is batch
        if step == "append" or batch.put(other).tolist() == [True]:
            model.rows = {key: [*rows, other.get(key)] for key, rows in model.rows.items()}
    elif step in ("trim", "zero"):
        assert getattr(batch, step)() is batch
        if step == "zero":
            model.rows = {key: [] for key in model.rows}
    elif step == "select":
        model.rows = {key: rows[::2] for key, rows in model.rows.items()}
        return batch.index_select(slice(None, None, 2))
    elif step == "copy":
        return copy.deepcopy(batch)
    elif step == "pickle":
        return pickle.loads(pickle.dumps(batch))
    return batch


@quick
@given(st.lists(st.sampled_from(STEPS), max_size=12), st.booleans(), st.integers(0, 999))
def test_every_change_is_seen(steps: list[str], spare: bool, seed: int) -> None:
    batch = small(3, 1, 2, seed=seed)
    if spare:
        room = Batch.empty(9, 40, like=batch)
        room.put(batch)
        batch = room
    model = Model(batch)
    model.check(batch)
    for number, step in enumerate(steps):
        batch = apply(step, batch, model, seed + number)
        model.check(batch)


def test_asking_again_runs_no_code() -> None:
    batch = small(3, 2)
    assert "positions" not in vars(batch)
    assert batch.positions is batch.get("positions")
    assert vars(batch)["positions"] is batch.get("positions")
    new = torch.zeros_like(batch.positions)
    batch.positions = new
    assert vars(batch)["positions"] is new
    assert batch.get("positions") is new
    assert batch.ptr is batch.ptr
    assert batch.system is batch.system


def test_keys_named_like_methods_or_private_names_do_no_harm() -> None:
    batch = small(3, 2)
    for name in ("append", "ptr", "_columns", "_shown", "info"):
        for value in (torch.ones(2), torch.zeros(2)):
            batch.set(name, value, level="system")
            assert batch.get(name) is value
            assert batch.get(name) is value
        with pytest.raises(AttributeError):
            batch.append = value
    assert batch.ptr.tolist() == [0, 3, 5]
    assert len(batch.info) == 2
    clone = pickle.loads(pickle.dumps(batch))
    assert clone.append(batch).get("_columns").tolist() == [0] * 4
    batch.remove("append")
    assert batch.append(small(1), fill={"ptr": 0, "_columns": 0, "_shown": 0, "info": 0}).n_systems == 3


def test_a_wrong_tensor_is_refused_after_the_right_one() -> None:
    batch = small(3, 2)
    room = Batch.empty(4, 9, like=batch)
    room.put(batch)
    for one in (batch, room):
        one.positions = torch.ones_like(one.positions)
        for wrong in (torch.ones(4, 3), torch.ones(9, 3), torch.ones(5, 2), torch.tensor(1.0)):
            with pytest.raises(InputError, match=r"'positions' has shape .*, expected \(5, 3\)"):
                one.positions = wrong
            with pytest.raises(InputError, match="'positions' has shape"):
                one.set("positions", wrong.double())
        with pytest.raises(InputError, match="'positions' is of level 'atom', not 'edge'"):
            one.set("positions", torch.ones(5, 3, dtype=torch.float64), level="edge")
        with pytest.raises(InputError, match="atomic_numbers must be integers"):
            one.atomic_numbers = torch.ones(5)
        assert torch.equal(one.positions, torch.ones(5, 3, dtype=torch.float64))
        one.positions = torch.ones(5, 3, dtype=torch.float32)
        assert one.positions.dtype == torch.float32
        one.atomic_numbers = torch.ones(5, dtype=torch.int32)
        assert one.atomic_numbers.dtype == torch.int64


@quick
@given(structure_lists(min_size=2), st.data())
def test_joined_is_selection_and_concatenation(structures: list[AtomicData], data: st.DataObject) -> None:
    batches = [Batch.from_data_list(structures), Batch.from_data_list(structures[::-1])]
    before = [pickle.dumps(batch) for batch in batches]
    expected, parts = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, 1))
        index = data.draw(st.none() | st.lists(st.integers(-len(structures), len(structures) - 1), max_size=4))
        held = structures[::-1] if which else structures
        expected += held if index is None else [held[i] for i in index]
        parts.append((batches[which], index))
    joined = Batch.joined(parts)
    found = joined.to_data_list()
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert [pickle.dumps(batch) for batch in batches] == before
    if joined.n_systems:
        joined.positions += 1
        joined.info[0]["name"] = "changed"
        assert [pickle.dumps(batch) for batch in batches] == before


def test_joined_names_what_differs() -> None:
    full, bare = small(3, 2), small(2)
    bare.remove("energy")
    with pytest.raises(InputError, match=r"'energy' is missing in 1 of 3 systems \(2\)"):
        Batch.joined([(full, None), (bare, None)])
    assert Batch.joined([(full, [1]), (bare, [])]).energy.tolist() == full.energy.tolist()[1:]
    filled = Batch.joined([(full, None), (bare, None)], fill={"energy": 0.5})
    assert filled.energy.tolist() == [*full.energy.tolist(), 0.5]
    with pytest.raises(InputError, match="no parts"):
        Batch.joined([])
    with pytest.raises(InputError, match="index 7 is out of range: the batch has 2 systems"):
        Batch.joined([(full, [7])])
    for value in (torch.ones(2, 1), torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)):
        one, other = small(1), small(1, 1)
        one.set("w", torch.ones(1, dtype=torch.float64), level="system")
        other.set("w", value, level="system")
        with pytest.raises(InputError, match="'w'"):
            Batch.joined([(one, None), (other, None)])
    # An empty part of another row shape is refused too: torch.cat alone would skip it.
    one.set("w", torch.ones(1, 3), level="system")
    other.set("w", torch.ones(2), level="system")
    with pytest.raises(InputError, match="rows of different shapes"):
        Batch.joined([(one, None), (other, [])])


def test_dtypes_widen_when_batches_of_equal_keys_are_joined() -> None:
    one, other = small(2), small(1)
    one.energy = torch.tensor([0.5], dtype=torch.float32)
    assert Batch.joined([(one, None), (other, None)]).energy.tolist() == [0.5, float(other.energy)]
    assert one.append(other).energy.dtype == torch.float64


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (3, "index 3 is out of range: the batch has 3 systems"),
        ([0, -4], "index -4 is out of range"),
        (torch.tensor([0, 99]), "index 99 is out of range"),
        ([True, False], r"mask has shape \(2,\), but the batch has 3 systems"),
        (torch.ones(4, dtype=torch.bool), r"mask has shape \(4,\)"),
        ([0.0, float("nan")], r"index must be integers .* float64 of shape \(2,\): 0.0, nan"),
        (torch.tensor([[0, 1]]), r"one-dimensional; got int64 of shape \(1, 2\): 0, 1"),
        (["a"], "index must be integers"),
    ],
)
def test_bad_index_is_named(index: object, message: str) -> None:
    batch = small(3, 1, 2)
    with pytest.raises(InputError, match=message):
        batch.index_select(index)  # type: ignore[arg-type]
    assert batch.n_systems == 3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"mask has shape \(1,\), but the batch has 3 systems"),
        ([1, 0, 1], r"mask must be true or false for each of the 3 systems, got int64 \[1, 0, 1\]"),
        ([1.0, float("nan"), 0.0], "nan"),
    ],
)
def test_bad_mask_of_put_is_named_and_nothing_is_copied(mask: object, message: str) -> None:
    batch = small(3, 1, 2)
    room = batch.empty_like()
    with pytest.raises(InputError, match=message):
        room.put(batch, mask)  # type: ignore[arg-type]
    assert room.n_systems == 0


def test_a_nan_is_named_where_structures_are_made() -> None:
    with pytest.raises(InputError, match=r"positions of atom 1 is \[0.0, nan, 0.0\]"):
        AtomicData([[0, 0, 0], [0, float("nan"), 0]], [1, 1])
    with pytest.raises(InputError, match="energy is inf"):
        AtomicData([[0, 0, 0]], [1], energy=float("inf"))


def test_an_empty_batch_is_true() -> None:
    none = small(3).index_select([])
    assert bool(none) is True
    assert (none or small(1)) is none
    assert bool(small(2).zero()) is True
    assert bool(Batch.joined([(none, None)])) is True
