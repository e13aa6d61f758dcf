"""Many structures in one container: ragged, no padding, any key of any dtype on the level of systems, atoms or edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from carryall.data import levels
from carryall.data.atomic_data import AtomicData
from carryall.data.cells import volumes
from carryall.data.fields import FIELDS, LEVELS, as_tensor
from carryall.data.levels import Columns, Fill, Index
from carryall.errors import InputError, nearest

if TYPE_CHECKING:
    import ase

    from carryall.data.sharing import SharedAtoms


class Batch:
    """Structures, concatenated. Every key is an attribute: `batch.positions`, `batch.cell`, `batch.energy`, extras too.

    Atom keys have n_atoms rows, system keys n_systems, edge keys n_edges; edge_index counts atoms through the whole batch.
    All systems have the same keys: a key that some lack is an error, or is filled with a given value, never dropped. An extra
    named like a method of Batch is reached by `get` and `set`.
    A system without a cell has a cell of zeros. A batch made by `empty` has room for more than it holds: `put` copies into
    that room, and every attribute shows only what is held.
    """

    _columns: Columns
    _capacity: dict[str, int]
    _cache: dict[str, Tensor]
    _shown: dict[str, tuple[Tensor, dict[str, Tensor], str]]
    _shared: SharedAtoms | None = None

    def __init__(self, columns: Columns, capacity: dict[str, int] | None = None) -> None:
        """For the package's own use; see `from_data_list` and `empty`."""
        self._use(columns, capacity)

    @classmethod
    def from_data_list(cls, structures: Sequence[AtomicData], fill: Fill | None = None) -> Batch:
        """A batch of structures, in order; tensors are copied.

        fill: value by key for systems that lack the key, e.g. {"forces": float("nan")}. Without it such a key is an InputError
        that names the key and the systems.
        """
        if not structures:
            raise InputError("no structures: a batch is made of at least one (batch.index_select([]) gives an empty one)")
        return cls(levels.join([levels.from_data(one) for one in structures], fill))

    @classmethod
    def from_ase(cls, images: Sequence[ase.Atoms], fill: Fill | None = None) -> Batch:
        """A batch of `ase.Atoms`, with the labels that their calculators hold."""
        return cls.from_data_list([AtomicData.from_ase(atoms) for atoms in images], fill)

    @classmethod
    def empty(cls, n_systems: int, n_atoms: int, n_edges: int = 0, *, like: Batch) -> Batch:
        """A batch without systems, with room for these numbers of rows and the keys, dtypes and device of `like`."""
        capacity = {"system": n_systems, "atom": n_atoms, "edge": n_edges}
        for level, rows in capacity.items():
            if rows < 0:
                raise InputError(f"capacity must not be negative, got {rows} for level {level!r}")
        values = {
            level: {key: value.new_zeros((capacity[level], *value.shape[1:])) for key, value in table.items()}
            for level, table in like._columns.values.items()
        }
        none = np.zeros(0, dtype=np.int64)
        return cls(Columns(none, none, values, []), capacity)

    def empty_like(self) -> Batch:
        """A batch without systems, with the keys and the capacity of this one."""
        return Batch.empty(self._capacity["system"], self._capacity["atom"], self._capacity["edge"], like=self)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Batch, Index | None]], fill: Fill | None = None) -> Batch:
        """A batch of the systems of several batches, in order: `index` as in `index_select`, None for all.

        The same as selecting and appending, with one copy of each key fewer; no part is changed. Differing keys as in
        `from_data_list`.
        """
        if not parts:
            raise InputError("no parts: a batch is joined from at least one")
        held = [
            batch._held() if index is None else levels.select(batch._held(), levels.system_index(index, batch.n_systems))
            for batch, index in parts
        ]
        return cls(levels.join(held, fill))

    # -- what is held

    @property
    def n_systems(self) -> int:
        """Systems held."""
        return self._columns.n_systems

    @property
    def n_atoms(self) -> int:
        """Atoms held, all systems together."""
        return self._columns.sizes["atom"]

    @property
    def n_edges(self) -> int:
        """Edges held, all systems together."""
        return self._columns.sizes["edge"]

    @property
    def capacity(self) -> dict[str, int]:
        """Rows that fit, by level; more than held only in a batch made by `empty`."""
        return dict(self._capacity)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.get("positions").device

    @property
    def info(self) -> list[dict[str, Any]]:
        """Free-form facts, one dict a system."""
        return self._columns.info

    @property
    def atom_counts(self) -> list[int]:
        """Atoms of each system, on the host: asking waits for no device."""
        return self._columns.atom_counts.tolist()

    @property
    def edge_counts(self) -> list[int]:
        """Edges of each system, on the host."""
        return self._columns.edge_counts.tolist()

    @property
    def ptr(self) -> Tensor:
        """(n_systems + 1,) int64; the atoms of system i are the rows ptr[i]:ptr[i + 1]."""
        return self._counted("ptr")

    @property
    def edge_ptr(self) -> Tensor:
        """(n_systems + 1,) int64; the edges of system i are the rows edge_ptr[i]:edge_ptr[i + 1]."""
        return self._counted("edge_ptr")

    @property
    def system(self) -> Tensor:
        """(n_atoms,) int64, which system an atom belongs to."""
        return self._counted("system")

    @property
    def edge_system(self) -> Tensor:
        """(n_edges,) int64, which system an edge belongs to."""
        return self._counted("edge_system")

    @property
    def volume(self) -> Tensor:
        """(n_systems,) Å³; 0 without a cell."""
        return volumes(self.get("cell"))

    # -- keys

    def keys(self, level: str | None = None) -> list[str]:
        """Keys of one level, or of all."""
        if level is not None and level not in LEVELS:
            raise InputError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
        return [key for name in LEVELS if level in (None, name) for key in self._columns.values[name]]

    def level_of(self, key: str) -> str:
        """ "system", "atom" or "edge"."""
        level = self._columns.level_of(key)
        if level is None:
            raise InputError(f"the batch has no key {key!r}: it has {', '.join(self.keys())}{nearest(key, self.keys())}")
        return level

    def get(self, key: str) -> Tensor:
        """The tensor of a key: (rows of its level, ...), the batch's own memory."""
        found = self._shown.get(key)
        return found[0] if found is not None else self._show(key)

    def set(self, key: str, value: Any, level: str | None = None) -> None:
        """Give a key its tensor, one row per system, atom or edge; a key that is new and no standard field needs `level`."""
        shown = self._shown.get(key)
        if shown is not None and type(value) is Tensor and (level is None or level == shown[2]):
            # The step's hot path: a key that is there, in a batch without spare room, gets a tensor of the same kind.
            old, table, _ = shown
            if table[key] is old and value.dtype is old.dtype and value.shape == old.shape and value.device == old.device:
                table[key] = value
                self._remember(key, value, table, shown[2])
                return
        known = self._columns.level_of(key) or (FIELDS[key].level if key in FIELDS else None)
        if known is None and level not in LEVELS:
            raise InputError(f"{key!r} is a new key: say its level, one of {', '.join(LEVELS)}, got {level!r}")
        if known is not None and level not in (None, known):
            raise InputError(f"{key!r} is of level {known!r}, not {level!r}")
        level = known or str(level)
        tensor = as_tensor(key, value, FIELDS[key].kind if key in FIELDS else None).to(self.device)
        rows = self._columns.rows(level)
        shapes = [(rows, *row) for row in FIELDS[key].row_shapes] if key in FIELDS else [(rows, *tensor.shape[1:])]
        if tensor.dim() == 0 or tuple(tensor.shape) not in shapes:
            raise InputError(f"{key!r} has shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")
        if rows < self._capacity[level]:
            room = tensor.new_zeros((self._capacity[level], *tensor.shape[1:]))
            room[:rows] = tensor
            tensor = room
        self._columns.values[level][key] = tensor
        self._forget([key])

    def remove(self, key: str) -> None:
        """Drop a key."""
        if key in ("positions", "atomic_numbers", "cell", "pbc"):
            raise InputError(f"{key!r} cannot be removed: every system has it")
        del self._columns.values[self.level_of(key)][key]
        self._forget([key])

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._shown or self._columns.level_of(key) is not None)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self.get(name)
        except InputError as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name[:1] == "_":
            object.__setattr__(self, name, value)
        elif name in self.__dict__:
            self.set(name, value)
        elif hasattr(type(self), name):
            raise AttributeError(f"batch.{name} follows from the batch's structures and cannot be set")
        elif name in self or name in FIELDS:
            self.set(name, value)
        else:
            raise AttributeError(f"{name!r} is a new key: use batch.set({name!r}, tensor, level=...)")

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self._columns, "capacity": self._capacity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._use(state["columns"], state["capacity"])

    def __repr__(self) -> str:
        spare = "" if not self._has_spare() else f", capacity={self._capacity}"
        return f"Batch(n_systems={self.n_systems}, n_atoms={self.n_atoms}, n_edges={self.n_edges}, keys={self.keys()}{spare})"

    # -- structures in and out

    def get_data(self, index: int) -> AtomicData:
        """One structure; negative counts from the end."""
        return self.index_select([index]).to_data_list()[0]

    def to_data_list(self) -> list[AtomicData]:
        """The structures, with every key, dtype and info, in memory of their own."""
        return levels.to_data(self._held())

    def to_ase(self) -> list[ase.Atoms]:
        """The structures as `ase.Atoms`."""
        return [data.to_ase() for data in self.to_data_list()]

    def index_select(self, index: Index) -> Batch:
        """The systems of `index` as a batch of their own.

        index: int, list, slice, bool mask of n_systems, or tensor; negative counts from the end, repeats are allowed.
        """
        return Batch(levels.select(self._held(), levels.system_index(index, self.n_systems)))

    def append(self, other: Batch, fill: Fill | None = None) -> Batch:
        """Add the systems of `other` at the end, in place; spare capacity is dropped. Differing keys as in `from_data_list`."""
        self._use(levels.join([self._held(), other._held()], fill))
        return self

    def put(self, other: Batch, mask: Tensor | np.ndarray | Sequence[bool] | None = None, fill: Fill | None = None) -> Tensor:
        """Copy systems of `other` into free capacity, in order, skipping what does not fit.

        mask: bool (other.n_systems,), which systems to copy; all by default.
        Returns a bool mask (other.n_systems,) of what was copied: every key of every dtype. `other` is not changed. Keys that
        differ are an InputError, before anything is copied, unless `fill` has a value for a key that `other` lacks.
        """
        chosen = self._choose(other, levels.mask_index(mask, other.n_systems))
        source = levels.select(other._held(), chosen)
        levels.check_same_keys(self._columns, source, fill or {})
        used = {level: self._columns.rows(level) for level in LEVELS}
        pieces: list[tuple[Tensor, Tensor, str]] = []
        for level, table in self._columns.values.items():
            for key, store in table.items():
                piece = source.values[level].get(key)
                if piece is None:
                    shape = (source.rows(level), *store.shape[1:])
                    piece = levels.filled(key, (fill or {})[key], shape, store.dtype, store.device)
                levels.compatible(key, piece, store)
                pieces.append((store, piece + used["atom"] if key in levels.INDEX_KEYS else piece, level))
        for store, piece, level in pieces:
            store[used[level] : used[level] + len(piece)] = piece.to(store.device)
        columns = self._columns
        longer = Columns(
            np.concatenate([columns.atom_counts, source.atom_counts]),
            np.concatenate([columns.edge_counts, source.edge_counts]),
            columns.values,
            columns.info + source.info,
        )
        self._use(longer, self._capacity)
        copied = torch.zeros(other.n_systems, dtype=torch.bool)
        copied[torch.from_numpy(chosen)] = True
        return copied.to(other.device)

    def trim(self) -> Batch:
        """Drop unused capacity, in place."""
        held = self._held()
        values = {level: {key: value.clone() for key, value in table.items()} for level, table in held.values.items()}
        self._use(Columns(held.atom_counts, held.edge_counts, values, held.info))
        return self

    def zero(self) -> Batch:
        """Forget all systems, in place; keys and capacity stay."""
        none = np.zeros(0, dtype=np.int64)
        self._use(Columns(none, none, self._columns.values, []), self._capacity)
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The batch on another device, its floating-point tensors in another dtype; tensors already so are shared."""
        return self._map(lambda value: value.to(device=device, dtype=dtype if value.is_floating_point() else None))

    def clone(self) -> Batch:
        """A copy that shares no tensor."""
        return self._map(Tensor.clone)

    # -- inside

    def _use(self, columns: Columns, capacity: dict[str, int] | None = None) -> None:
        """Hold these columns, and forget what was derived from those before."""
        self._forget(list(self.__dict__.get("_shown", ())))
        self._columns, self._capacity = columns, capacity or dict(columns.sizes)
        self._cache, self._shown = {}, {}

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._shown.pop(key, None)
            if key[:1] != "_":
                self.__dict__.pop(key, None)

    def _show(self, key: str) -> Tensor:
        """The held rows of a key."""
        level = self.level_of(key)
        table, rows = self._columns.values[level], self._columns.sizes[level]
        value = table[key] if len(table[key]) == rows else table[key][:rows]
        self._remember(key, value, table, level)
        return value

    def _remember(self, key: str, value: Tensor, table: dict[str, Tensor], level: str) -> None:
        """Keep what is shown for a key, as a plain attribute too where no method has the name: a step asks often."""
        self._shown[key] = (value, table, level)
        if key[:1] != "_" and (key in self.__dict__ or not hasattr(type(self), key)):
            self.__dict__[key] = value

    def _map(self, function: Any) -> Batch:
        columns = self._columns
        values = {level: {key: function(value) for key, value in table.items()} for level, table in columns.values.items()}
        info = [dict(one) for one in columns.info]
        made = Batch(Columns(columns.atom_counts, columns.edge_counts, values, info), dict(self._capacity))
        made._shared = self._shared
        return made

    def _has_spare(self) -> bool:
        return any(self._columns.rows(level) < self._capacity[level] for level in LEVELS)

    def _held(self) -> Columns:
        columns = self._columns
        if not self._has_spare():
            return columns
        values = {level: {key: self.get(key) for key in table} for level, table in columns.values.items()}
        return Columns(columns.atom_counts, columns.edge_counts, values, columns.info)

    def _choose(self, other: Batch, wanted: np.ndarray) -> np.ndarray:
        room = {level: self._capacity[level] - self._columns.rows(level) for level in LEVELS}
        chosen = []
        counts = {level: other._columns.counts(level).tolist() for level in LEVELS}
        for i in wanted.tolist():
            if all(counts[level][i] <= room[level] for level in LEVELS):
                chosen.append(i)
                room = {level: room[level] - counts[level][i] for level in LEVELS}
        return np.array(chosen, dtype=np.int64)

    def _counted(self, name: str) -> Tensor:
        if name in self._cache:
            return self._cache[name]
        counts = self._columns.edge_counts if name.startswith("edge") else self._columns.atom_counts
        if name.endswith("ptr"):
            array = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        else:
            array = np.repeat(np.arange(self.n_systems, dtype=np.int64), counts)
        self._cache[name] = torch.from_numpy(array).to(self.device)
        return self._cache[name]
