"""Ragged storage of many systems: columns on three levels, joined, selected and split without losing a key.

A batch is a table of systems, one of atoms and one of edges; the rows of a system are contiguous. How many rows each system
has is known on the host, so that joining and selecting wait for no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.fields import FIELDS, INDEX_KEYS, LEVELS, OF_EXTRAS, as_tensor, kind_of, short_name
from carryall.errors import InputError, nearest

Fill: TypeAlias = Mapping[str, Any]
Index: TypeAlias = int | slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor


@dataclass
class Columns:
    """Tensors by level and key, with the rows of each system counted on the host."""

    atom_counts: np.ndarray
    """(n_systems,) int64."""
    edge_counts: np.ndarray
    """(n_systems,) int64."""
    values: dict[str, dict[str, Tensor]]
    """level -> key -> (rows of that level, ...); index keys count atoms from the first system's first atom."""
    info: list[dict[str, Any]]
    """One dict a system."""
    n_systems: int = field(init=False)
    """Number of systems."""
    sizes: dict[str, int] = field(init=False)
    """level -> rows of all systems together; kept, because counting again would be most of the price of asking."""

    def __post_init__(self) -> None:
        self.n_systems = len(self.atom_counts)
        self.sizes = {
            "system": self.n_systems,
            "atom": int(self.atom_counts.sum()),
            "edge": int(self.edge_counts.sum()),
        }

    def counts(self, level: str) -> np.ndarray:
        """(n_systems,) rows of each system."""
        if level == "system":
            return np.ones(self.n_systems, dtype=np.int64)
        return self.atom_counts if level == "atom" else self.edge_counts

    def rows(self, level: str) -> int:
        """Rows of all systems together."""
        return self.sizes[level]

    def level_of(self, key: str) -> str | None:
        """Level of a key, None when there is no such key."""
        return next((level for level in LEVELS if key in self.values[level]), None)


def from_data(data: AtomicData) -> Columns:
    """One structure as a table of one system; a missing cell becomes zeros."""
    values: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
    for key, standard in FIELDS.items():
        value = getattr(data, key)
        if key == "cell" and value is None:
            value = data.positions.new_zeros(3, 3)
        if value is not None:
            values[standard.level][key] = value[None] if standard.level == "system" else value
    for level, name in OF_EXTRAS.items():
        for key, value in getattr(data, name).items():
            values[level][key] = value[None] if level == "system" else value
    return Columns(np.array([data.n_atoms]), np.array([data.n_edges]), values, [dict(data.info)])


def to_data(columns: Columns) -> list[AtomicData]:
    """The structures one by one, in tensors of their own; a cell of zeros becomes None."""
    pieces: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for level in LEVELS:
        counts = columns.counts(level).tolist()
        pieces[level] = {key: torch.split(value, counts) for key, value in columns.values[level].items()}
    first_atom = _starts(columns.atom_counts)
    has_cell = columns.values["system"]["cell"].flatten(1).any(1).tolist()
    found = []
    for i in range(columns.n_systems):
        values: dict[str, Tensor] = {}
        extras: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
        for level in LEVELS:
            for key, parts in pieces[level].items():
                value = parts[i][0] if level == "system" else parts[i]
                value = value - int(first_atom[i]) if key in INDEX_KEYS else value.clone()
                if key in FIELDS:
                    values[key] = value
                else:
                    extras[level][key] = value
        if not has_cell[i]:
            del values["cell"]
        found.append(unchecked(values, extras, dict(columns.info[i])))
    return found


def join(parts: Sequence[Columns], fill: Fill | None = None) -> Columns:
    """One table of many. A key that some systems lack is an InputError unless `fill` gives its value.

    `fill` may name standard keys that nobody has. Dtypes of one kind widen (float32 with float64), kinds do not mix.
    """
    fill = dict(fill or {})
    same = not fill and _have_same_keys(parts)
    levels = {key: level for level in LEVELS for key in parts[0].values[level]} if same else _key_levels(parts, fill)
    if not same:
        _check_missing(parts, levels, fill)
    offsets = _starts(np.array([part.sizes["atom"] for part in parts], dtype=np.int64)).tolist()
    values: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
    for key, level in levels.items():
        joined = _quickly_joined(parts, key, level) if same and key not in INDEX_KEYS else None
        if joined is None:
            pieces = _pieces(parts, key, level, fill)
            if key in INDEX_KEYS:
                pieces = [piece + offset if offset else piece for piece, offset in zip(pieces, offsets, strict=True)]
            joined = torch.cat(pieces)
        values[level][key] = joined
    return Columns(
        np.concatenate([part.atom_counts for part in parts]),
        np.concatenate([part.edge_counts for part in parts]),
        values,
        [dict(info) for part in parts for info in part.info],
    )


def select(columns: Columns, index: np.ndarray) -> Columns:
    """The systems `index` (k,) int64, in that order, repeats allowed."""
    atom_counts, edge_counts = columns.atom_counts[index], columns.edge_counts[index]
    shift = _starts(atom_counts) - _starts(columns.atom_counts)[index]
    values: dict[str, dict[str, Tensor]] = {}
    for level in LEVELS:
        table = columns.values[level]
        if not table:
            values[level] = {}
            continue
        device = next(iter(table.values())).device
        rows = torch.from_numpy(_ragged_rows(columns.counts(level), index)).to(device)
        values[level] = {key: value.index_select(0, rows) for key, value in table.items()}
        for key in INDEX_KEYS & table.keys():
            moved = torch.from_numpy(np.repeat(shift, edge_counts)).to(device)
            values[level][key] += moved.reshape(-1, *[1] * (table[key].dim() - 1))
    return Columns(atom_counts, edge_counts, values, [dict(columns.info[i]) for i in index.tolist()])


def system_index(index: Index, n_systems: int) -> np.ndarray:
    """`index` (int, list, slice, bool mask or tensor; negative counts from the end) as (k,) int64 from 0 to n_systems - 1."""
    if isinstance(index, slice):
        return np.arange(n_systems, dtype=np.int64)[index]
    array = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if array.dtype == bool and array.ndim:
        if array.shape != (n_systems,):
            raise InputError(f"mask has shape {array.shape}, but the batch has {n_systems} systems: give one value each")
        return np.flatnonzero(array).astype(np.int64)
    array = np.atleast_1d(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        shown = ", ".join(map(str, array.reshape(-1)[:8].tolist())) + (", ..." if array.size > 8 else "")
        raise InputError(
            f"index must be integers or a bool mask, one-dimensional; got {array.dtype} of shape {array.shape}: {shown}"
        )
    array = array.astype(np.int64)
    outside = (array < -n_systems) | (array >= n_systems)
    if outside.any():
        raise InputError(f"index {int(array[outside][0])} is out of range: the batch has {n_systems} systems")
    return np.where(array < 0, array + n_systems, array)


def mask_index(mask: Tensor | np.ndarray | Sequence[bool] | None, n_systems: int) -> np.ndarray:
    """(k,) int64 systems where a mask of n_systems bools is true; None stands for all."""
    if mask is None:
        return np.arange(n_systems, dtype=np.int64)
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.size and array.dtype != bool:
        raise InputError(f"mask must be true or false for each of the {n_systems} systems, got {array.dtype} {array.tolist()}")
    return system_index(np.atleast_1d(array.astype(bool)), n_systems)


def compatible(key: str, piece: Tensor, store: Tensor) -> None:
    """InputError unless the rows of `piece` fit into `store`: same row shape, same kind of dtype, nothing narrowed."""
    if piece.shape[1:] != store.shape[1:]:
        raise InputError(f"{key!r} has rows of shape {tuple(piece.shape[1:])}, the batch has room for {tuple(store.shape[1:])}")
    widens = kind_of(piece.dtype) == kind_of(store.dtype) and torch.promote_types(piece.dtype, store.dtype) == store.dtype
    if not widens:
        raise InputError(
            f"{key!r} is {short_name(piece.dtype)}, the batch holds {short_name(store.dtype)}: convert one of them with .to()"
        )


def check_same_keys(columns: Columns, source: Columns, fill: Fill) -> None:
    """InputError unless systems of `source` can be put beside those of `columns`; `fill` has values for keys that they lack."""
    for level in LEVELS:
        here, there = columns.values[level].keys(), source.values[level].keys()
        if extra := [key for key in there if key not in here]:
            names = ", ".join(map(repr, extra))
            raise InputError(f"the batch has no room for {level} keys {names}: make it like a batch that has")
        if missing := [key for key in here if key not in there and key not in fill]:
            names = ", ".join(map(repr, missing))
            raise InputError(f"the systems to put lack {level} keys {names}: set them, or pass fill={{key: value}}")


def filled(key: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`value` in every row of `shape`; InputError when it does not fit the rows or would change in `dtype`."""
    given = as_tensor(f"fill[{key!r}]", value).to(device)
    converted = given.to(dtype)
    if not kind_of(dtype) == "float" and not torch.equal(converted.double(), given.double()):
        raise InputError(f"fill[{key!r}] is {value!r}, which {short_name(dtype)} cannot hold")
    try:
        return converted.expand(shape).clone()
    except RuntimeError:
        raise InputError(f"fill[{key!r}] has shape {tuple(given.shape)}, expected a number or {shape[1:]}") from None


def _have_same_keys(parts: Sequence[Columns]) -> bool:
    first = parts[0].values
    return all(part.values[level].keys() == first[level].keys() for part in parts[1:] for level in LEVELS)


def _quickly_joined(parts: Sequence[Columns], key: str, level: str) -> Tensor | None:
    """The concatenation where nothing has to be converted, filled or refused, else None."""
    pieces = [part.values[level][key] for part in parts]
    dtype, dim = pieces[0].dtype, pieces[0].dim()
    # torch.cat widens dtypes of any kinds and skips empty tensors of any shape, so both are asked before.
    if any(piece.dtype is not dtype or piece.dim() != dim for piece in pieces):
        return None
    try:
        return torch.cat(pieces)
    except RuntimeError:  # shapes or devices differ: the careful way says which
        return None


def _key_levels(parts: Sequence[Columns], fill: Fill) -> dict[str, str]:
    levels: dict[str, str] = {}
    for part in parts:
        for level in LEVELS:
            for key in part.values[level]:
                if levels.setdefault(key, level) != level:
                    raise InputError(
                        f"{key!r} is of level {levels[key]} in one system and of level {level} in another: rename one"
                    )
    for key in fill:
        if key not in levels:
            if key not in FIELDS:
                raise InputError(f"fill names {key!r}, which no system has{nearest(key, levels)}")
            levels[key] = FIELDS[key].level
    return levels


def _check_missing(parts: Sequence[Columns], levels: Mapping[str, str], fill: Fill) -> None:
    starts = _starts(np.array([part.n_systems for part in parts], dtype=np.int64))
    total = sum(part.n_systems for part in parts)
    problems, keys = [], []
    for key, level in levels.items():
        if key in fill:
            continue
        lacking = [
            int(start) + i
            for part, start in zip(parts, starts, strict=True)
            if key not in part.values[level]
            for i in range(part.n_systems)
        ]
        if lacking:
            shown = ", ".join(map(str, lacking[:8])) + (", ..." if len(lacking) > 8 else "")
            problems.append(f"{key!r} is missing in {len(lacking)} of {total} systems ({shown})")
            keys.append(key)
    if problems:
        example = ", ".join(f"{key!r}: value" for key in keys)
        raise InputError(f"{'; '.join(problems)}: give every system the same keys, or pass fill={{{example}}}")


def _pieces(parts: Sequence[Columns], key: str, level: str, fill: Fill) -> list[Tensor]:
    present = [part.values[level][key] for part in parts if key in part.values[level]]
    like = present[0] if present else _new_standard(key, parts[0])
    dtype = like.dtype
    for other in present[1:]:
        if other.shape[1:] != like.shape[1:]:
            shapes = f"{tuple(like.shape[1:])} and {tuple(other.shape[1:])}"
            raise InputError(f"{key!r} has rows of different shapes, {shapes}: bring them to one shape")
        if other.device != like.device:
            raise InputError(f"{key!r} is on {like.device} and on {other.device}: move the structures to one device with .to()")
        if other.dtype != dtype:
            if kind_of(other.dtype) != kind_of(dtype):
                raise InputError(f"{key!r} is {short_name(dtype)} in one system and {short_name(other.dtype)} in another")
            dtype = torch.promote_types(dtype, other.dtype)
    pieces = []
    for part in parts:
        piece = part.values[level].get(key)
        if piece is None:
            shape = (part.rows(level), *like.shape[1:])
            value = fill[key] if part.n_systems else 0
            piece = filled(key, value, shape, dtype, like.device)
        pieces.append(piece.to(dtype))
    return pieces


def _new_standard(key: str, part: Columns) -> Tensor:
    positions = part.values["atom"]["positions"]
    field = FIELDS[key]
    dtype = {"float": positions.dtype, "int": torch.int64, "bool": torch.bool}[field.kind]
    return positions.new_zeros((0, *field.row_shapes[0]), dtype=dtype)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _ragged_rows(counts: np.ndarray, index: np.ndarray) -> np.ndarray:
    taken = counts[index]
    first = _starts(counts)[index] - _starts(taken)
    return np.repeat(first, taken) + np.arange(int(taken.sum()), dtype=np.int64)
