"""Which structures enter a batch next: those that fit the room that there is, none twice, none left behind."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import InputError

if TYPE_CHECKING:
    import ase

Structure: TypeAlias = "AtomicData | ase.Atoms"
OnUnreadable: TypeAlias = Callable[[int, str], None]
OnOversized: TypeAlias = "Callable[[int, AtomicData, str], None]"


@dataclass(frozen=True)
class Room:
    """What may still enter a batch; None stands for no limit."""

    n_systems: int | None = None
    n_atoms: int | None = None
    n_edges: int | None = None


@dataclass(frozen=True)
class Unreadable:
    """In place of a structure that could not be read."""

    reason: str


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A structure within the look-ahead; read only when it is drawn where its size is known without."""

    number: int
    """Place among all that came into the look-ahead."""
    index: int
    n_atoms: int
    n_edges: int
    data: AtomicData | None


@dataclass(frozen=True, eq=False)
class _Either:
    """What is in one of two."""

    one: Container[int]
    other: Container[int]

    def __contains__(self, index: object) -> bool:
        return index in self.one or index in self.other


class SizeAwareSampler:
    """Draws structures into whatever room a batch has, in one pass over the data set.

    The order: a draw goes through the next `look_ahead` structures from the oldest on and takes each that fits. One that
    `look_ahead` later ones have overtaken reserves the room: no later one is drawn until it fits.

    So one that is too large for the moment blocks none and waits for a bounded time; the price of a draw and the memory depend
    on `look_ahead`, never on the length of the data set.
    """

    def __init__(
        self,
        dataset: Iterable[Structure] | Any,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        max_batch_size: int | None = None,
        *,
        count_edges: Callable[[AtomicData], int] | None = None,
        look_ahead: int = 256,
        skip: Container[int] = frozenset(),
        check: Callable[[AtomicData], Any] | None = None,
        on_unreadable: OnUnreadable | None = None,
        on_oversized: OnOversized | None = None,
    ) -> None:
        """dataset: `len()` and `[i]`, or any iterable (a generator is read as far as it is needed); AtomicData or ase.Atoms.
        With `get_metadata(i) -> (n_atoms, n_edges)` a structure is read only when it is drawn.

        max_atoms, max_edges, max_batch_size: what a batch may hold, all systems together; None for no limit.
        count_edges: edges of a structure where max_edges is given, counted once, as it comes in.
        skip: indices that are done already; not read where the data set is indexed. It is all that a restart needs.
        check: called with each structure; an InputError from it makes the structure unreadable.
        on_unreadable(index, reason), on_oversized(index, data, reason): called for a structure that cannot be read, or is too
        large for any batch; it is left out then. Without them: InputError, at once where sizes are known without reading.
        """
        _check_limits(max_atoms=max_atoms, max_edges=max_edges, max_batch_size=max_batch_size, look_ahead=look_ahead)
        self.max_atoms, self.max_edges, self.max_batch_size = max_atoms, max_edges, max_batch_size
        self.look_ahead = look_ahead
        self.n_drawn = 0
        """Structures drawn so far."""
        self._dataset = _as_dataset(dataset)
        self._indexed = hasattr(self._dataset, "__len__") and hasattr(self._dataset, "__getitem__")
        self._metadata: Callable[[int], Any] | None = getattr(self._dataset, "get_metadata", None) if self._indexed else None
        self._skip = frozenset(skip) if isinstance(skip, (list, tuple)) else skip
        self._count_edges, self._check = count_edges, check
        self._on_unreadable, self._on_oversized = on_unreadable, on_oversized
        self._waiting: deque[_Waiting] = deque()
        self._n_entered = self._n_left = 0
        self._least: int | None = None
        self._edges: dict[int, int] = {}
        self._items = self._all_items()
        self._at_hand: tuple[int, Any] | None = None
        if on_oversized is None:
            self._check_sizes()

    # -- drawing

    def report(self, skip: Container[int], on_unreadable: OnUnreadable) -> None:
        """Before the first draw: leave out `skip` too, and tell of unreadable structures where nobody is told yet."""
        before = self._skip
        self._skip = _Either(before, skip) if before else skip
        self._on_unreadable = self._on_unreadable or on_unreadable

    def draw(self, room: Room, must: bool = False) -> list[tuple[int, AtomicData]]:
        """Structures with their indices in the data set, which together fit into `room`.

        must: for an empty batch, give at least one, even beyond `room`; then an empty list means that nothing is left.
        A draw that raises has drawn nothing: the next one meets the same structures.
        """
        if not must and self._least is not None and _limit(room.n_atoms) < self._least:
            return []
        drawn = self._fitting(room)
        while must and not drawn and not self.exhausted:
            drawn = self._taken(self._waiting[0])
            self._waiting.popleft()
            self._least = None
        self.n_drawn += len(drawn)
        if self.max_edges is not None:
            self._edges.update((one.index, one.n_edges) for one in drawn)
        return [(one.index, cast(AtomicData, one.data)) for one in drawn]

    def room_beside(self, batch: Batch | None = None) -> Room:
        """What may enter a batch beside the systems that it holds; all of the limits for None."""
        n_systems, n_atoms, n_edges = (0, 0, 0) if batch is None else (batch.n_systems, batch.n_atoms, self._held_edges(batch))
        return Room(
            None if self.max_batch_size is None else max(0, self.max_batch_size - n_systems),
            None if self.max_atoms is None else max(0, self.max_atoms - n_atoms),
            None if self.max_edges is None else max(0, self.max_edges - n_edges),
        )

    @property
    def exhausted(self) -> bool:
        """Whether every structure was drawn or left out; to know, one more may be read ahead."""
        if not self._waiting and (following := self._pulled()) is not None:
            self._waiting.append(following)
        return not self._waiting

    @property
    def n_total(self) -> int | None:
        """Length of the data set, skipped ones included; None where only reading it to its end would tell."""
        return len(self._dataset) if hasattr(self._dataset, "__len__") else None

    def __repr__(self) -> str:
        names = ("max_atoms", "max_edges", "max_batch_size")
        limits = "".join(f", {name}={value}" for name in names if (value := getattr(self, name)) is not None)
        total = "" if self.n_total is None else f" of {self.n_total}"
        return f"SizeAwareSampler({self.n_drawn}{total} drawn{limits})"

    # -- inside

    def _fitting(self, room: Room) -> list[_Waiting]:
        systems, atoms, edges = _limit(room.n_systems), _limit(room.n_atoms), _limit(room.n_edges)
        drawn: list[_Waiting] = []
        passed: list[_Waiting] = []
        one: _Waiting | None = None
        self._least = None
        try:
            # Of all that wait the first was overtaken most: by those that left and are not among the earlier ones.
            while systems > 0 and not (passed and self._n_left - passed[0].number >= self.look_ahead):
                one = self._next(len(passed))
                if one is None:
                    self._least = min((other.n_atoms for other in passed), default=None)
                    break
                if one.n_atoms > atoms or one.n_edges > edges:
                    passed.append(one)
                elif found := self._taken(one):
                    drawn += found
                    systems, atoms, edges = systems - 1, atoms - one.n_atoms, edges - one.n_edges
                one = None
        except BaseException:
            self._n_left -= len(drawn)
            again = [*drawn, *passed, *([] if one is None else [one])]
            self._waiting.extendleft(sorted(again, key=lambda other: -other.number))
            raise
        self._waiting.extendleft(reversed(passed))
        return drawn

    def _next(self, n_passed: int) -> _Waiting | None:
        if self._waiting:
            return self._waiting.popleft()
        return self._pulled() if n_passed < self.look_ahead else None

    def _pulled(self) -> _Waiting | None:
        """The next structure of the data set that can be used and fits into some batch."""
        while True:
            if self._at_hand is None:
                self._at_hand = next(self._items, None)
            if self._at_hand is None:
                return None
            one = self._measured(*self._at_hand)
            reason = None if one is None else self._too_large(one.n_atoms, one.n_edges)
            if one is not None and reason is not None:
                self._report_oversized(one, reason)
            self._at_hand = None
            if one is not None and reason is None:
                self._n_entered += 1
                return one

    def _taken(self, one: _Waiting) -> list[_Waiting]:
        """A candidate that leaves the look-ahead, with its data; nothing when it turns out to be unreadable."""
        data = self._read(one.index) if one.data is None else one.data
        if data is not None and data.n_atoms != one.n_atoms:
            self._refuse(one.index, f"get_metadata says {one.n_atoms} atoms, the structure has {data.n_atoms}")
            data = None
        self._n_left += 1
        return [] if data is None else [replace(one, data=data)]

    def _all_items(self) -> Iterator[tuple[int, Any]]:
        """Indices with items, or with None where an item is read later by its index."""
        first = getattr(self._dataset, "first_index", 0)
        items = ((i, None) for i in range(len(self._dataset))) if self._indexed else enumerate(self._dataset, first)
        # looked up late: a pipeline learns only when it opens its ledger what is done already
        return ((index, item) for index, item in items if index not in self._skip)

    def _measured(self, index: int, item: Any) -> _Waiting | None:
        if self._metadata is not None:
            try:
                n_atoms, n_edges = map(int, self._metadata(index))
            except Exception as error:  # a data set of the user's may raise anything
                self._refuse(index, _text_of(error))
                return None
            return _Waiting(self._n_entered, index, n_atoms, n_edges, None)
        data = self._read(index, item)
        if data is None:
            return None
        n_edges = 0
        if self.max_edges is not None and self._count_edges is None:
            n_edges = self._own_edges(index, data)
        elif self.max_edges is not None and self._count_edges is not None:
            try:
                n_edges = int(self._count_edges(data))
            except Exception as error:  # the same for a function of the user's
                self._refuse(index, f"its edges could not be counted: {_text_of(error)}")
                return None
        return _Waiting(self._n_entered, index, data.n_atoms, n_edges, data)

    def _read(self, index: int, item: Any = None) -> AtomicData | None:
        try:
            data = _as_structure(self._dataset[index] if self._indexed else item)
            if self._check is not None:
                self._check(data)
        except Exception as error:  # a data set of the user's may raise anything
            self._refuse(index, str(error) if isinstance(error, InputError) else _text_of(error))
            return None
        return data

    def _refuse(self, index: int, reason: str) -> None:
        if self._on_unreadable is None:
            raise InputError(f"structure {index} cannot be used: {reason}")
        self._on_unreadable(index, reason)

    def _report_oversized(self, one: _Waiting, reason: str) -> None:
        if self._on_oversized is None:
            raise InputError(f"structure {one.index} fits into no batch: {reason}")
        data = one.data if one.data is not None else self._read(one.index)
        if data is not None:
            self._on_oversized(one.index, data, reason)

    def _too_large(self, n_atoms: int, n_edges: int) -> str | None:
        for count, limit, name in ((n_atoms, self.max_atoms, "atoms"), (n_edges, self.max_edges, "edges")):
            if limit is not None and count > limit:
                return f"it has {count} {name}, more than max_{name}={limit}"
        return None

    def _check_sizes(self) -> None:
        """InputError for the first structure that can never fit, where its size is known without reading it."""
        if self.max_atoms is None and self.max_edges is None:
            return
        for index in range(len(self._dataset)) if self._indexed else ():
            size = None if index in self._skip else self._known_size(index)
            if size is not None and (reason := self._too_large(*size)):
                raise InputError(f"structure {index} fits into no batch: {reason}")

    def _known_size(self, index: int) -> tuple[int, int] | None:
        if self._metadata is not None:
            n_atoms, n_edges = self._metadata(index)
            return int(n_atoms), int(n_edges)
        if not isinstance(self._dataset, (list, tuple)):
            return None
        item = self._dataset[index]
        if isinstance(item, AtomicData):
            return item.n_atoms, 0
        return (len(item), 0) if hasattr(item, "get_atomic_numbers") else None

    def _own_edges(self, index: int, data: AtomicData) -> int:
        if data.edge_index is None and not data.edge_extras:
            raise InputError(
                f"structure {index} has no edge data to hold against max_edges={self.max_edges}: give count_edges=, a function "
                "that counts the edges of a structure, or a data set with get_metadata"
            )
        return data.n_edges

    def _held_edges(self, batch: Batch) -> int:
        if self.max_edges is None:
            return 0
        names = batch.get(SYSTEM_ID).tolist() if SYSTEM_ID in batch else list(range(batch.n_systems))
        # Edges are counted as a system comes in; those of systems that left are forgotten, so that this stays small.
        known = self._edges
        self._edges = {name: known[name] if name in known else self._counted(batch, i) for i, name in enumerate(names)}
        return sum(self._edges.values())

    def _counted(self, batch: Batch, i: int) -> int:
        return batch.edge_counts[i] if self._count_edges is None else int(self._count_edges(batch.get_data(i)))


def size_bins(sizes: Sequence[int], max_atoms: int, max_batch_size: int | None = None) -> list[list[int]]:
    """Indices of `sizes` in as few bins as first-fit-decreasing finds, each of at most `max_atoms` atoms together.

    For systems that all run equally long. sizes: atoms of each. max_batch_size: most systems of a bin. Bins come in the order
    of their first member, members in ascending order. InputError for a size beyond `max_atoms`, with its index.

    First-fit decreasing needs at most 11/9 of the fewest bins plus 6/9 (Dósa, Lect. Notes Comput. Sci. 4614, 1, 2007).
    """
    _check_limits(max_atoms=max_atoms, max_batch_size=max_batch_size)
    for index, size in enumerate(sizes):
        if not 0 <= size <= max_atoms:
            raise InputError(f"structure {index} has {size} atoms, expected 0 to max_atoms={max_atoms}")
    # A tree of the largest room below each node finds the first bin with enough of it in log(n) steps.
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room = [max_atoms] * (2 * leaves)
    bins: list[list[int]] = [[] for _ in sizes]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= sizes[index] else 2 * node + 1
        found = bins[node - leaves]
        found.append(index)
        room[node] = -1 if len(found) == max_batch_size else room[node] - sizes[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted((sorted(one) for one in bins if one), key=lambda one: one[0])


def _limit(value: int | None) -> float:
    return math.inf if value is None else value


def _check_limits(**limits: int | None) -> None:
    for name, value in limits.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be an integer of at least 1, got {value!r}")


def _as_dataset(dataset: Any) -> Any:
    if isinstance(dataset, Batch):
        return dataset.to_data_list()
    # ase.Atoms has a length and items too, but they are atoms
    if isinstance(dataset, AtomicData) or hasattr(dataset, "get_atomic_numbers"):
        return [dataset]
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, (str, bytes, dict)) or not (indexed or isinstance(dataset, Iterable)):
        raise InputError(
            f"a data set is something with len() and [i], or an iterable of structures, got {dataset!r}: "
            "read a file with carryall.data.read_structures"
        )
    return dataset


def _as_structure(item: Any) -> AtomicData:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], dict):
        item = item[0]  # (structure, metadata), as data sets for NVIDIA ALCHEMI Toolkit give it
    if isinstance(item, AtomicData):
        return item
    if isinstance(item, Unreadable):
        raise InputError(item.reason)
    if isinstance(item, BaseException):
        raise InputError(_text_of(item))
    if not hasattr(item, "get_atomic_numbers"):
        raise InputError(f"expected AtomicData or ase.Atoms, got {type(item).__name__}")
    return AtomicData.from_ase(item)


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
