"""The sampler: each structure once, in whatever room there is, none left behind, at a price of its own."""

import itertools
import math

import ase.build
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.dynamics.samplers import Room, SizeAwareSampler, Unreadable, size_bins
from carryall.errors import InputError

quick = settings(max_examples=100, deadline=None, derandomize=True)


def data(n, number=1):
    return AtomicData(np.zeros((n, 3)), [number] * n)


def dataset(*sizes):
    return [data(n) for n in sizes]


class Calls(list):
    """The arguments of each call."""

    def __call__(self, *arguments):
        self.append(arguments)


def ids(drawn):
    return [index for index, _ in drawn]


class Sized:
    """A data set of given sizes that counts what is asked of it."""

    def __init__(self, sizes, edges=None, broken=(), lying=()):
        self.sizes, self.edges = sizes, edges or [0] * len(sizes)
        self.broken, self.lying = set(broken), set(lying)
        self.read, self.asked = [], 0

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken:
            raise OSError(f"file {index} is gone")
        return data(self.sizes[index] + (index in self.lying))

    def get_metadata(self, index):
        self.asked += 1
        return self.sizes[index], self.edges[index]


# -- Order, room, fairness


def test_what_fits_is_drawn_and_a_large_one_blocks_nobody():
    sampler = SizeAwareSampler(dataset(4, 3, 9, 2, 2, 1), max_atoms=10)
    drawn = sampler.draw(sampler.room_beside())
    assert ids(drawn) == [0, 1, 3, 5]
    assert [one.n_atoms for _, one in drawn] == [4, 3, 2, 1]
    assert ids(sampler.draw(Room(n_atoms=8))) == [4]
    assert sampler.draw(Room(n_atoms=8)) == []
    assert not sampler.exhausted
    assert ids(sampler.draw(Room(n_atoms=9))) == [2]
    assert sampler.exhausted
    assert sampler.draw(Room(), must=True) == []
    assert (sampler.n_drawn, sampler.n_total) == (6, 6)
    assert repr(sampler) == "SizeAwareSampler(6 of 6 drawn, max_atoms=10)"


def test_systems_and_edges_count_too():
    edges = Sized([1] * 6, edges=[5, 2, 9, 1, 1, 1])
    sampler = SizeAwareSampler(edges, max_edges=9, max_batch_size=3)
    assert sampler.room_beside() == Room(3, None, 9)
    assert ids(sampler.draw(sampler.room_beside())) == [0, 1, 3]
    assert ids(sampler.draw(Room(n_systems=0))) == []
    assert ids(sampler.draw(Room(n_systems=1, n_edges=9))) == [2]
    assert ids(sampler.draw(Room())) == [4, 5]


def test_the_room_beside_a_batch_knows_each_systems_edges():
    sampler = SizeAwareSampler(dataset(2, 3, 4, 1), 9, 40, 3, count_edges=lambda one: 10 * one.n_atoms)
    drawn = sampler.draw(sampler.room_beside())
    assert ids(drawn) == [0, 3]
    batch = Batch.from_data_list([one for _, one in drawn])
    batch.set("system_id", torch.tensor([0, 3]), level="system")
    assert sampler.room_beside(batch) == Room(1, 6, 10)
    assert sampler.room_beside(batch.index_select([1])) == Room(2, 8, 30)
    # A system that it never saw is counted as it is; more than the limits leaves no room.
    strange = Batch.from_data_list([data(5), data(5)])
    strange.set("system_id", torch.tensor([70, 80]), level="system")
    assert sampler.room_beside(strange) == Room(1, 0, 0)


def test_the_last_of_a_long_wait_reserves_the_room():
    """With room for 3 atoms at a time the system of 4 would wait for ever; after look_ahead others the room is kept for it."""
    sizes = [4] + [1] * 50
    sampler = SizeAwareSampler(dataset(*sizes), max_atoms=4, look_ahead=8)
    drawn = []
    while len(found := sampler.draw(Room(n_systems=1, n_atoms=3))):
        drawn += ids(found)
    assert drawn == list(range(1, 9))
    assert not sampler.exhausted
    assert ids(sampler.draw(Room(n_atoms=4))) == [0]
    assert ids(sampler.draw(Room(n_atoms=3))) == [9, 10, 11]


@quick
@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60),
)
def test_each_is_drawn_once_and_overtaken_by_at_most_look_ahead(sizes, look_ahead, rooms):
    sampler = SizeAwareSampler((data(n) for n in sizes), max_atoms=9, look_ahead=look_ahead)
    order = []
    for n_atoms, must in itertools.chain(rooms, itertools.repeat((9, True))):
        was_exhausted = sampler.exhausted
        drawn = sampler.draw(Room(n_atoms=n_atoms), must)
        assert [one.n_atoms for _, one in drawn] == [sizes[i] for i in ids(drawn)]
        if len(drawn) > 1 or not must:
            assert sum(one.n_atoms for _, one in drawn) <= n_atoms
        assert ids(drawn) == sorted(ids(drawn))
        assert not (must and not was_exhausted and not drawn)
        order += ids(drawn)
        if sampler.exhausted:
            break
    assert sorted(order) == list(range(len(sizes)))
    place = {index: i for i, index in enumerate(order)}
    for index in order:
        assert sum(place[later] < place[index] for later in range(index + 1, len(sizes))) <= look_ahead


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40), st.sets(st.integers(0, 29)))
def test_a_restart_needs_only_what_is_done(sizes, look_ahead, done):
    for source in (dataset(*sizes), Sized(sizes), (one for one in dataset(*sizes))):
        sampler = SizeAwareSampler(source, max_atoms=9, look_ahead=look_ahead, skip=done)
        order = []
        while drawn := sampler.draw(sampler.room_beside(), must=True):
            order += ids(drawn)
        assert sorted(order) == [i for i in range(len(sizes)) if i not in done]
        assert sampler.exhausted
        if isinstance(source, Sized):
            assert sorted(source.read) == sorted(order)


# -- Laziness


def test_a_million_stay_lazy():
    made = 0

    def generator():
        nonlocal made
        for i in range(10**6):
            made += 1
            yield small if i else large

    small, large = data(1), data(5)
    sampler = SizeAwareSampler(generator(), max_atoms=5, look_ahead=16)
    assert sampler.n_total is None
    assert made == 0
    sampler.draw(Room(n_systems=1, n_atoms=1))
    assert made <= 16
    while sampler.draw(Room(n_systems=1, n_atoms=1)):
        assert made - sampler.n_drawn <= 16
    assert sampler.n_drawn == 16
    sampler.draw(Room(n_atoms=5), must=True)
    for _ in range(100):
        sampler.draw(Room(n_systems=3))
        assert made - sampler.n_drawn <= 16


def test_the_price_of_a_draw_does_not_depend_on_the_length():
    """Counted, not timed: what is asked of the data set between two draws."""

    class Long(Sized):
        def __init__(self, length):
            self.length, self.read, self.asked, self.broken, self.lying = length, [], 0, (), ()

        def __len__(self):
            return self.length

        def __getitem__(self, index):
            self.read.append(index)
            return data(1 + index % 7)

        def get_metadata(self, index):
            self.asked += 1
            return 1 + index % 7, 0

    asked = []
    for length in (10**3, 10**9):
        source = Long(length)
        sampler = SizeAwareSampler(source, look_ahead=32)
        sampler.draw(Room(n_atoms=100))
        source.asked, before = 0, len(source.read)
        for _ in range(10):
            sampler.draw(Room(n_atoms=10))
            # nothing has changed, so nothing is looked at
            seen = source.asked
            assert sampler.draw(Room(n_atoms=0)) == []
            assert source.asked == seen
        asked.append((source.asked, len(source.read) - before))
    assert asked[0] == asked[1]
    assert asked[0][0] < 150


def test_sizes_known_without_reading_are_read_once_and_late():
    source = Sized([3, 9, 2, 1])
    sampler = SizeAwareSampler(source, max_atoms=9)
    assert source.read == []
    assert ids(sampler.draw(Room(n_atoms=6))) == [0, 2, 3]
    assert source.read == [0, 2, 3]
    assert not sampler.exhausted
    assert source.read == [0, 2, 3]


# -- What cannot be used


@pytest.mark.parametrize(
    "source", [dataset(3, 8, 9), Sized([3, 8, 9]), [ase.build.molecule("H2"), ase.build.molecule("C6H6"), data(1)]]
)
def test_one_that_never_fits_is_named_at_once(source):
    with pytest.raises(InputError, match=r"structure 1 fits into no batch: it has (8|12) atoms, more than max_atoms=7"):
        SizeAwareSampler(source, max_atoms=7)
    SizeAwareSampler(source, max_atoms=7, skip={1, 2})
    with pytest.raises(InputError, match=r"structure 2 .* it has 5 edges, more than max_edges=4"):
        SizeAwareSampler(Sized([1] * 3, edges=[4, 0, 5]), max_edges=4)


def test_one_that_never_fits_is_named_when_it_comes_up():
    sampler = SizeAwareSampler(iter(dataset(3, 8, 2)), max_atoms=7)
    for _ in range(2):
        with pytest.raises(InputError, match="structure 1 fits into no batch: it has 8 atoms, more than max_atoms=7"):
            sampler.draw(Room(n_atoms=7))
    for source in (iter(dataset(3, 8, 2)), Sized([3, 8, 2]), dataset(3, 8, 2)):
        left_out = Calls()
        sampler = SizeAwareSampler(source, max_atoms=7, on_oversized=left_out)
        assert ids(sampler.draw(Room())) == [0, 2]
        ((index, one, reason),) = left_out
        assert (index, one.n_atoms, reason) == (1, 8, "it has 8 atoms, more than max_atoms=7")
        assert sampler.exhausted


def items(*broken):
    for i in range(5):
        yield broken[i] if i < len(broken) else data(1 + i)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (OSError("file is gone"), "OSError: file is gone"),
        (Unreadable("line 3 is torn"), "line 3 is torn"),
        ("H2O.cif", "expected AtomicData or ase.Atoms, got str"),
        (None, "expected AtomicData or ase.Atoms, got NoneType"),
    ],
)
def test_what_cannot_be_read_is_reported(item, reason):
    for source in (items(data(1), item), list(items(data(1), item))):
        sampler = SizeAwareSampler(source)
        with pytest.raises(InputError, match=f"structure 1 cannot be used: {reason}"):
            sampler.draw(Room())
    for source in (items(data(1), item), list(items(data(1), item))):
        found = Calls()
        sampler = SizeAwareSampler(source, on_unreadable=found)
        assert ids(sampler.draw(Room())) == [0, 2, 3, 4]
        assert found == [(1, reason)]
        assert sampler.exhausted


def test_a_data_set_that_raises_or_lies():
    source = Sized([1, 2, 3, 4], broken=[1], lying=[2])
    with pytest.raises(InputError, match="structure 1 cannot be used: OSError: file 1 is gone"):
        SizeAwareSampler(source).draw(Room())
    found = Calls()
    sampler = SizeAwareSampler(source, on_unreadable=found)
    assert ids(sampler.draw(Room(n_atoms=5))) == [0, 3]
    assert found == [(1, "OSError: file 1 is gone"), (2, "get_metadata says 3 atoms, the structure has 4")]
    for wrong in (lambda i: 1 / 0, lambda i: (1,), lambda i: "a"):
        source.get_metadata = wrong
        found.clear()
        assert SizeAwareSampler(source, on_unreadable=found).exhausted
        assert [index for index, _ in found] == [0, 1, 2, 3]


def test_only_unreadable_ones_left_is_the_end():
    found = Calls()
    sampler = SizeAwareSampler(Sized([1, 1], broken=[0, 1]), on_unreadable=found)
    assert not sampler.exhausted
    assert sampler.draw(Room(n_atoms=0), must=True) == []
    assert [index for index, _ in found] == [0, 1]
    assert sampler.exhausted


def test_a_check_of_the_structures():
    def no_gold(one):
        if 79 in one.atomic_numbers:
            raise InputError("gold is too dear")

    source = [data(1), data(1, number=79), data(2)]
    found = Calls()
    sampler = SizeAwareSampler(source, check=no_gold, on_unreadable=found)
    assert ids(sampler.draw(Room())) == [0, 2]
    assert found == [(1, "gold is too dear")]
    with pytest.raises(InputError, match="structure 1 cannot be used: gold is too dear"):
        SizeAwareSampler(source, check=no_gold).draw(Room())


def test_edges_need_somebody_who_counts_them():
    with pytest.raises(InputError, match="structure 0 has no edge data to hold against max_edges=3: give count_edges="):
        SizeAwareSampler(dataset(1), max_edges=3, on_unreadable=print).draw(Room())
    own = AtomicData(np.zeros((2, 3)), [1, 1], edge_index=[[0, 1], [1, 0]])
    sampler = SizeAwareSampler([own, own], max_edges=3)
    assert ids(sampler.draw(sampler.room_beside())) == [0]
    found = Calls()
    sampler = SizeAwareSampler(dataset(1, 2), max_edges=3, count_edges=lambda one: 1 // (one.n_atoms - 1), on_unreadable=found)
    assert ids(sampler.draw(Room())) == [1]
    assert found == [(0, "its edges could not be counted: ZeroDivisionError: integer division or modulo by zero")]


@pytest.mark.parametrize("must", [False, True])
def test_a_draw_that_raises_loses_nothing(must):
    """An interrupt in the middle of a draw, at every place where it can come: the next draws give all."""
    for metadata in (False, True):
        for place in range(6):
            source = Sized([9, 1, 2, 1, 3, 1])
            if not metadata:
                source.get_metadata = None
            real, calls = Sized.__getitem__, itertools.count()

            class Interrupted(Sized):
                def __getitem__(self, index, real=real, calls=calls, place=place):
                    if next(calls) == place:
                        raise KeyboardInterrupt
                    return real(self, index)

            source.__class__ = Interrupted
            sampler = SizeAwareSampler(source, max_atoms=9)
            order, interrupts = [], 0
            while not sampler.exhausted if interrupts else True:
                try:
                    found = ids(sampler.draw(Room(n_atoms=4), must))
                    order += found or ids(sampler.draw(Room(n_atoms=9)))
                except KeyboardInterrupt:
                    interrupts += 1
                if len(order) == 6:
                    break
            assert sorted(order) == list(range(6)), (metadata, place)


# -- Input


def test_kinds_of_data_sets():
    water = ase.build.molecule("H2O")
    for source, sizes in (
        (water, [3]),
        (data(2), [2]),
        ([water, data(2)], [3, 2]),
        ((water, data(2)), [3, 2]),
        (Batch.from_data_list(dataset(1, 2)), [1, 2]),
        (map(data, (2, 3)), [2, 3]),
        ([(data(2), {}), (water, {"source": "a paper"})], [2, 3]),
        ([], []),
    ):
        drawn = SizeAwareSampler(source).draw(Room())
        assert [(index, one.n_atoms) for index, one in drawn] == list(enumerate(sizes))
        assert all(isinstance(one, AtomicData) for _, one in drawn)
    for wrong in ("H2O.cif", {"a": data(1)}, 3, None):
        with pytest.raises(InputError, match="a data set is something with"):
            SizeAwareSampler(wrong)


@pytest.mark.parametrize("name", ["max_atoms", "max_edges", "max_batch_size", "look_ahead"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_wrong_limits_are_named(name, value):
    with pytest.raises(InputError, match=f"{name} must be an integer of at least 1, got {value!r}"):
        SizeAwareSampler([], **{name: value})


# -- Bins


@quick
@given(st.lists(st.integers(0, 20), max_size=60), st.none() | st.integers(1, 5))
def test_bins_hold_each_once_within_the_limits(sizes, most):
    bins = size_bins(sizes, 20, most)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    assert all(bins)
    assert all(one == sorted(one) for one in bins)
    assert [one[0] for one in bins] == sorted(one[0] for one in bins)
    for one in bins:
        assert sum(sizes[i] for i in one) <= 20
        assert most is None or len(one) <= most
    # the rule itself, in its plain quadratic form
    plain = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for one in plain:
            if sum(sizes[i] for i in one) + sizes[index] <= 20 and len(one) != most:
                one.append(index)
                break
        else:
            plain.append([index])
    assert sorted(map(sorted, plain)) == sorted(bins)
    if most is None:
        assert len(bins) <= 11 / 9 * max(1, math.ceil(sum(sizes) / 20)) + 6 / 9 + len([n for n in sizes if n > 10])


def test_bins_of_many_are_quick_and_wrong_sizes_named():
    bins = size_bins([1 + i % 64 for i in range(20000)], 3000)
    assert len(bins) == math.ceil(sum(1 + i % 64 for i in range(20000)) / 3000)
    with pytest.raises(InputError, match="structure 1 has 9 atoms, expected 0 to max_atoms=8"):
        size_bins([8, 9], 8)
    with pytest.raises(InputError, match="max_atoms must be an integer"):
        size_bins([1], 0)
    assert size_bins([], 5) == []
