from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_samples import EXTRAS, assert_same, random_structure, structure_lists

from carryall.data import AtomicData, Batch
from carryall.errors import InputError

quick = settings(max_examples=40, deadline=None, derandomize=True)


def sample(*sizes: tuple[int, int], seed: int = 0, **options: object) -> list[AtomicData]:
    rng = np.random.default_rng(seed)
    return [random_structure(rng, n_atoms, n_edges, **options) for n_atoms, n_edges in sizes]  # type: ignore[arg-type]


def assert_lists_same(found: list[AtomicData], expected: list[AtomicData]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@quick
@given(structure_lists())
def test_round_trip_keeps_every_key_dtype_and_info(structures: list[AtomicData]) -> None:
    batch = Batch.from_data_list(structures)
    assert_lists_same(batch.to_data_list(), structures)
    assert_lists_same([batch.get_data(-1)], structures[-1:])
    assert (batch.n_systems, batch.n_atoms) == (len(structures), sum(one.n_atoms for one in structures))
    assert batch.n_edges == sum(one.n_edges for one in structures)


@quick
@given(structure_lists())
def test_pointers_and_indices_agree(structures: list[AtomicData]) -> None:
    batch = Batch.from_data_list(structures)
    assert batch.ptr.tolist() == np.cumsum([0] + [one.n_atoms for one in structures]).tolist()
    assert batch.edge_ptr.tolist() == np.cumsum([0] + [one.n_edges for one in structures]).tolist()
    assert torch.equal(torch.bincount(batch.system, minlength=batch.n_systems), batch.ptr.diff())
    assert torch.equal(batch.system[batch.edge_index[:, 0]], batch.edge_system)
    assert torch.equal(batch.system[batch.edge_index[:, 1]], batch.edge_system)
    assert batch.atom_counts == batch.ptr.diff().tolist()
    assert batch.edge_counts == batch.edge_ptr.diff().tolist()


@quick
@given(structure_lists(), st.data())
def test_index_select_is_list_selection(structures: list[AtomicData], data: st.DataObject) -> None:
    batch = Batch.from_data_list(structures)
    n = len(structures)
    index = data.draw(st.lists(st.integers(-n, n - 1), max_size=6))
    expected = [structures[i] for i in index]
    assert_lists_same(batch.index_select(index).to_data_list(), expected)
    assert_lists_same(batch.index_select(torch.tensor(index, dtype=torch.int64)).to_data_list(), expected)
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    expected = [one for one, keep in zip(structures, mask, strict=True) if keep]
    assert_lists_same(batch.index_select(mask).to_data_list(), expected)
    assert_lists_same(batch.index_select(torch.tensor(mask)).to_data_list(), expected)
    assert_lists_same(batch.index_select(np.array(mask)).to_data_list(), expected)
    assert_lists_same(batch.index_select(slice(None, None, -2)).to_data_list(), structures[::-2])
    assert_lists_same(batch.index_select(n - 1).to_data_list(), structures[-1:])
    assert_lists_same(batch.to_data_list(), structures)


@quick
@given(structure_lists(min_size=2), st.integers(0, 6))
def test_append_is_list_concatenation(structures: list[AtomicData], cut: int) -> None:
    whole = Batch.from_data_list(structures)
    cut = min(cut, len(structures))
    left, right = whole.index_select(slice(cut)), whole.index_select(slice(cut, None))
    _ = left.ptr, left.system
    assert left.append(right) is left
    assert_lists_same(left.to_data_list(), structures)
    assert left.ptr.tolist() == whole.ptr.tolist()
    assert torch.equal(left.edge_index, whole.edge_index)
    assert right.n_systems == len(structures) - cut


@quick
@given(structure_lists(), structure_lists(), st.integers(0, 6), st.integers(0, 12), st.integers(0, 12), st.data())
def test_put_copies_what_fits_and_says_so(
    held: list[AtomicData], coming: list[AtomicData], n_systems: int, n_atoms: int, n_edges: int, data: st.DataObject
) -> None:
    keys = ("energy", "forces")
    rng = np.random.default_rng(1)
    held, coming = (
        [random_structure(rng, one.n_atoms, one.n_edges, optional=keys, cell=one.cell is not None) for one in part]
        for part in (held, coming)
    )
    first, other = Batch.from_data_list(held), Batch.from_data_list(coming)
    room = Batch.empty(first.n_systems + n_systems, first.n_atoms + n_atoms, first.n_edges + n_edges, like=first)
    assert room.put(first).tolist() == [True] * len(held)
    _ = room.ptr, room.system, room.edge_ptr
    before = pickle.dumps(other)
    mask = data.draw(st.lists(st.booleans(), min_size=len(coming), max_size=len(coming)))
    copied = room.put(other, mask)

    expected = []
    for one, wanted in zip(coming, mask, strict=True):
        fits = wanted and n_systems >= 1 and one.n_atoms <= n_atoms and one.n_edges <= n_edges
        expected.append(fits)
        if fits:
            n_systems, n_atoms, n_edges = n_systems - 1, n_atoms - one.n_atoms, n_edges - one.n_edges
    assert copied.dtype == torch.bool
    assert copied.tolist() == expected
    contents = held + [one for one, taken in zip(coming, expected, strict=True) if taken]
    assert_lists_same(room.to_data_list(), contents)
    assert room.ptr.tolist() == np.cumsum([0] + [one.n_atoms for one in contents]).tolist()
    assert room.system.shape == room.positions.shape[:1] == (room.n_atoms,)
    assert pickle.dumps(other) == before
    assert_lists_same(other.to_data_list(), coming)
    left_over = [one for one, taken in zip(coming, expected, strict=True) if not taken]
    assert_lists_same(other.index_select(~copied).to_data_list(), left_over)

    room.trim()
    assert room.capacity == {"system": room.n_systems, "atom": room.n_atoms, "edge": room.n_edges}
    assert_lists_same(room.to_data_list(), contents)


def test_put_copies_every_key_of_every_dtype() -> None:
    batch = Batch.from_data_list(sample((3, 2), (2, 4)))
    room = Batch.empty(5, 20, 20, like=batch)
    room.put(batch)
    names = [name for table in EXTRAS.values() for name in table]
    assert {batch.get(name).dtype for name in names} == {
        torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool,
    }  # fmt: skip
    everything = batch.keys()
    for name in everything:
        assert torch.equal(room.get(name), batch.get(name)), name
        assert room.get(name).dtype == batch.get(name).dtype, name


def test_put_when_nothing_fits_changes_nothing() -> None:
    batch = Batch.from_data_list(sample((3, 2), (2, 4)))
    room = Batch.empty(1, 1, 1, like=batch)
    assert room.put(batch).tolist() == [False, False]
    assert room.n_systems == room.n_atoms == room.n_edges == 0
    assert batch.put(batch).tolist() == [False, False]
    assert batch.n_systems == 2


def test_put_checks_before_it_copies() -> None:
    batch = Batch.from_data_list(sample((3, 2), extras=False))
    room = Batch.empty(4, 20, 20, like=batch)
    more = batch.clone()
    more.set("tag", torch.arange(3), level="atom")
    with pytest.raises(InputError, match="no room for atom keys 'tag'"):
        room.put(more)
    less = batch.clone()
    less.remove("energy")
    with pytest.raises(InputError, match="lack system keys 'energy'"):
        room.put(less)
    assert room.n_systems == 0
    room.put(less, fill={"energy": 7.0})
    assert room.energy.tolist() == [7.0]
    with pytest.raises(InputError, match="'cell' is float64, the batch holds float32"):
        Batch.empty(4, 20, like=batch.to(dtype=torch.float32)).put(batch)
    widened = Batch.empty(4, 20, like=batch)
    widened.put(batch.to(dtype=torch.float32))
    assert widened.positions.dtype == torch.float64
    wide = Batch.from_data_list([AtomicData(np.zeros((1, 3)), [1], atom_extras={"w": np.zeros((1, 2))})])
    narrow = Batch.from_data_list([AtomicData(np.zeros((1, 3)), [1], atom_extras={"w": np.zeros((1, 3))})])
    with pytest.raises(InputError, match=r"'w' has rows of shape \(2,\)"):
        Batch.empty(4, 20, like=narrow).put(wide)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"mask has shape \(1,\), but the batch has 2 systems"),
        ([1, 0], "mask must be true or false for each of the 2 systems"),
        (torch.ones(2, 2, dtype=torch.bool), r"mask has shape \(2, 2\)"),
    ],
)
def test_put_with_a_wrong_mask(mask: object, message: str) -> None:
    batch = Batch.from_data_list(sample((1, 0), (2, 0)))
    with pytest.raises(InputError, match=message):
        Batch.empty(4, 20, like=batch).put(batch, mask)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 5], "index 5 is out of range: the batch has 2 systems"),
        ([-3], "index -3 is out of range"),
        (2, "index 2 is out of range"),
        (torch.tensor([0, 9]), "index 9 is out of range"),
        ([True, False, True], r"mask has shape \(3,\), but the batch has 2 systems"),
        (torch.zeros(1, dtype=torch.bool), r"mask has shape \(1,\)"),
        ([0.5], "index must be integers or a bool mask"),
        ([[0, 1]], "one-dimensional"),
    ],
)
def test_bad_index_is_named(index: object, message: str) -> None:
    batch = Batch.from_data_list(sample((1, 0), (2, 0)))
    with pytest.raises(InputError, match=message):
        batch.index_select(index)  # type: ignore[arg-type]


def test_missing_keys_are_an_error_whoever_lacks_them() -> None:
    full, bare = sample((2, 0), (3, 0), extras=False)
    bare = bare.replace(forces=None, energy=None)
    with pytest.raises(InputError) as caught:
        Batch.from_data_list([full, bare, full])
    assert "'energy' is missing in 1 of 3 systems (1)" in str(caught.value)
    assert "'forces' is missing in 1 of 3 systems (1)" in str(caught.value)
    with pytest.raises(InputError, match=r"missing in 2 of 3 systems \(0, 1\)"):
        Batch.from_data_list([bare, bare, full])
    with pytest.raises(InputError, match=r"pass fill=\{'energy': value, 'forces': value\}"):
        Batch.from_data_list([bare]).append(Batch.from_data_list([full]))
    tagged = full.replace(atom_extras={"tag": [1, 2]})
    with pytest.raises(InputError, match=r"'tag' is missing in 1 of 2 systems \(0\)"):
        Batch.from_data_list([full, tagged])


def test_fill_is_explicit_and_survives_the_round_trip() -> None:
    full, bare = sample((2, 0), (3, 0), extras=False)
    bare = bare.replace(forces=None, energy=None)
    tagged = full.replace(atom_extras={"tag": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)})
    fill = {"forces": float("nan"), "energy": 5, "tag": [8, 9]}
    batch = Batch.from_data_list([bare, tagged], fill=fill)
    assert batch.forces[:3].isnan().all()
    assert torch.equal(batch.forces[3:], full.forces)
    assert batch.energy.tolist() == [5.0, float(full.energy)]
    assert batch.tag.dtype == torch.int32
    assert batch.tag.tolist() == [[8, 9]] * 3 + [[1, 2], [3, 4]]
    again = Batch.from_data_list(batch.to_data_list())
    assert again.forces[:3].isnan().all()
    appended = Batch.from_data_list([bare]).append(Batch.from_data_list([tagged]), fill=fill)
    assert torch.equal(appended.tag, batch.tag)


def test_fill_can_add_a_standard_key_that_nobody_has() -> None:
    bare = sample((2, 0), (1, 0), optional=(), extras=False, dtype=torch.float32)
    batch = Batch.from_data_list(bare, fill={"forces": float("nan"), "energy": 0})
    assert batch.forces.shape == (3, 3)
    assert batch.forces.dtype == torch.float32
    assert batch.energy.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        ({"tog": 1}, "fill names 'tog', which no system has, perhaps you meant 'tag'"),
        ({"tag": float("nan")}, "fill\\['tag'\\] is nan, which int64 cannot hold"),
        ({"tag": 1.5}, "which int64 cannot hold"),
        ({"tag": [1, 2]}, "fill\\['tag'\\] has shape \\(2,\\)"),
    ],
)
def test_bad_fill_is_named(fill: dict[str, object], message: str) -> None:
    one = AtomicData(np.zeros((3, 3)), [1, 1, 1])
    with pytest.raises(InputError, match=message):
        Batch.from_data_list([one, one.replace(atom_extras={"tag": [1, 2, 3]})], fill=fill)


def test_dtypes_of_one_kind_widen_and_kinds_do_not_mix() -> None:
    x = np.zeros((1, 3))
    double, single = (
        AtomicData(x, [1], energy=1 / 3),
        AtomicData(x.astype(np.float32), [1], energy=torch.tensor(0.5, dtype=torch.float32)),
    )
    batch = Batch.from_data_list([single, double])
    assert batch.energy.tolist() == [0.5, 1 / 3]
    integer, floating = (AtomicData(x, [1], system_extras={"w": w}) for w in (1, 1.0))
    with pytest.raises(InputError, match="'w' is int64 in one system and float64 in another"):
        Batch.from_data_list([integer, floating])
    with pytest.raises(InputError, match="'w' has rows of different shapes"):
        Batch.from_data_list([floating, AtomicData(x, [1], system_extras={"w": [1.0, 2.0]})])
    with pytest.raises(InputError, match="'w' is of level system in one system and of level atom in another"):
        Batch.from_data_list([floating, AtomicData(x, [1], atom_extras={"w": [1.0]})])


def test_an_empty_batch_is_not_falsy_and_keeps_its_keys() -> None:
    structures = sample((3, 2), (2, 4))
    none = Batch.from_data_list(structures).index_select([])
    assert none
    assert (none.n_systems, none.n_atoms, none.n_edges, none.to_data_list()) == (0, 0, 0, [])
    assert none.ptr.tolist() == [0]
    assert none.positions.shape == (0, 3)
    assert_lists_same(none.append(Batch.from_data_list(structures)).to_data_list(), structures)
    with pytest.raises(InputError, match="no structures"):
        Batch.from_data_list([])


def test_zero_keeps_capacity_and_room_can_be_used_again() -> None:
    structures = sample((3, 2), (2, 4), (1, 0))
    room = Batch.empty(2, 5, 6, like=Batch.from_data_list(structures))
    assert room
    assert room.put(Batch.from_data_list(structures)).tolist() == [True, True, False]
    room.zero()
    assert (room.n_systems, room.n_atoms, room.info) == (0, 0, [])
    assert room.capacity == {"system": 2, "atom": 5, "edge": 6}
    assert room.put(Batch.from_data_list(structures), [False, True, True]).tolist() == [False, True, True]
    assert_lists_same(room.to_data_list(), structures[1:])
    assert room.empty_like().capacity == room.capacity
    assert room.empty_like().n_systems == 0
    with pytest.raises(InputError, match="capacity must not be negative, got -1"):
        Batch.empty(1, -1, like=room)


def test_nothing_is_shared_with_the_structures() -> None:
    structures = sample((3, 2))
    kept = structures[0].positions.clone()
    batch = Batch.from_data_list(structures)
    batch.positions += 1
    batch.info[0]["name"] = "changed"
    assert torch.equal(structures[0].positions, kept)
    assert structures[0].info["name"] != "changed"
    out = batch.to_data_list()[0]
    batch.positions += 1
    assert torch.equal(out.positions, kept + 1)
    other = batch.clone()
    other.positions += 1
    assert torch.equal(batch.positions, kept + 2)


def test_a_batch_of_nan_still_comes_apart() -> None:
    batch = Batch.from_data_list(sample((3, 0), (2, 0)))
    batch.positions[1] = float("nan")
    assert batch.to_data_list()[0].positions[1].isnan().all()


def test_to_pickle_and_repr() -> None:
    batch = Batch.from_data_list(sample((3, 2), (2, 4)))
    single = batch.to(dtype=torch.float32)
    assert single.positions.dtype == torch.float32
    assert single.atomic_numbers.dtype == torch.int64
    assert batch.positions.dtype == torch.float64
    assert_lists_same(pickle.loads(pickle.dumps(batch)).to_data_list(), batch.to_data_list())
    assert repr(batch).startswith("Batch(n_systems=2, n_atoms=5, n_edges=6, keys=[")
    assert "capacity" in repr(Batch.empty(1, 1, like=batch))


def test_gradients_pass_through() -> None:
    batch = Batch.from_data_list(sample((3, 0), (2, 0), extras=False))
    batch.positions = batch.positions.requires_grad_()
    (batch.positions**2).sum().backward()
    torch.testing.assert_close(batch.positions.grad, 2 * batch.positions.detach())
