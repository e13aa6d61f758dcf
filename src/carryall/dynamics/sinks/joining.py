"""Batches of different keys as one, so that what was written can always be read.

Runs that are not alike write different keys: velocities or none, scratch rows of another width. A system that lacks a key gets
a blank for it (NaN, 0 or false) and says so in `info["filled_keys"]`; narrower rows are padded with blanks, and
`info["padded_keys"]` has the shape that they had. Numbers of different kinds become the wider kind. Nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.fields import LEVELS, kind_of
from carryall.data.levels import Columns, join
from carryall.dynamics.thermo import MOVE_MASK
from carryall.errors import InputError

FILLED_KEYS = "filled_keys"
"""Key of `batch.info[i]`: keys that the system did not have, a sorted list."""
PADDED_KEYS = "padded_keys"
"""Key of `batch.info[i]`: shape of one row, as a list, by key, where rows were padded."""


Signature: TypeAlias = tuple[tuple[str, str, torch.dtype, torch.Size], ...]


@dataclass(frozen=True)
class _Kind:
    """What a key is in the joined batch."""

    level: str
    dtype: torch.dtype
    row: tuple[int, ...]
    device: torch.device


def joined_with_blanks(parts: Sequence[Batch]) -> Batch:
    """The systems of all batches, in order; see the module for what happens to keys that differ."""
    alike: dict[Signature, list[int]] = {}
    for number, part in enumerate(parts):
        if part.n_systems:
            alike.setdefault(signature_of(part), []).append(number)
    if len(alike) < 2:
        return Batch.joined([(part, None) for part in parts if part.n_systems] or [(parts[0], None)])
    tables = [columns_of(Batch.joined([(parts[number], None) for number in members])) for members in alike.values()]
    kinds = _kinds(tables)
    joined = Batch(join([_like(table, kinds) for table in tables]))
    # The systems lie group by group now: back to the order of the parts.
    members = [number for numbers in alike.values() for number in numbers]
    source = np.repeat(members, [parts[number].n_systems for number in members])
    return joined.index_select(np.argsort(source, kind="stable"))


def with_levels_of(batch: Batch, known: Mapping[str, str]) -> dict[str, str]:
    """Levels by key, with those of `batch`; InputError for a key that changed its level, which no one batch could hold."""
    found = dict(known)
    for level in LEVELS:
        for key in batch.keys(level):
            if found.setdefault(key, level) != level:
                raise InputError(f"{key!r} is of level {level!r}, but was written with level {found[key]!r} before: rename one")
    return found


def signature_of(batch: Batch) -> Signature:
    """What batches have in common that can be joined as they are."""
    tables = {level: [(key, batch.get(key)) for key in sorted(batch.keys(level))] for level in LEVELS}
    return tuple((level, key, one.dtype, one.shape[1:]) for level, table in tables.items() for key, one in table)


def columns_of(batch: Batch) -> Columns:
    """The columns of what a batch holds."""
    values = {level: {key: batch.get(key) for key in batch.keys(level)} for level in LEVELS}
    atoms, edges = (np.array(one, dtype=np.int64) for one in (batch.atom_counts, batch.edge_counts))
    return Columns(atoms, edges, values, [dict(info) for info in batch.info])


def blank(key: str, dtype: torch.dtype) -> float | int | bool:
    """What stands for a value that is not there: NaN, 0 or false; an atom without a mask may move."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return key == MOVE_MASK if dtype == torch.bool else 0


def _kinds(tables: Sequence[Columns]) -> dict[str, _Kind]:
    kinds: dict[str, _Kind] = {}
    for table in tables:
        for level in LEVELS:
            for key, value in table.values[level].items():
                found = _Kind(level, value.dtype, tuple(value.shape[1:]), value.device)
                kinds[key] = _wider(kinds[key], found) if key in kinds else found
    return kinds


def _wider(one: _Kind, other: _Kind) -> _Kind:
    dtype = torch.promote_types(one.dtype, other.dtype)
    if kind_of(one.dtype) != kind_of(other.dtype) and dtype.is_floating_point:
        dtype = torch.float64  # an integer in float32 would change
    same_axes = len(one.row) == len(other.row)
    row = tuple(map(max, one.row, other.row)) if same_axes else (max(prod(one.row), prod(other.row)),)
    return _Kind(one.level, dtype, row, one.device)


def _like(table: Columns, kinds: dict[str, _Kind]) -> Columns:
    values: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
    missing: list[str] = []
    padded: dict[str, list[int]] = {}
    for key, kind in kinds.items():
        value = table.values[kind.level].get(key)
        if value is None:
            shape = (table.rows(kind.level), *kind.row)
            values[kind.level][key] = torch.full(shape, blank(key, kind.dtype), dtype=kind.dtype, device=kind.device)
            missing.append(key)
            continue
        row = tuple(value.shape[1:])
        value = value.to(device=kind.device, dtype=kind.dtype)
        if row != kind.row:
            padded[key] = list(row)
            value = _padded(value, kind.row, blank(key, kind.dtype))
        values[kind.level][key] = value
    notes: dict[str, Any] = {}
    if missing:
        notes[FILLED_KEYS] = sorted(missing)
    if padded:
        notes[PADDED_KEYS] = padded
    info = [_noted(one, notes) for one in table.info] if notes else table.info
    return Columns(table.atom_counts, table.edge_counts, values, info)


def _padded(value: Tensor, row: tuple[int, ...], with_value: float) -> Tensor:
    if value.dim() != len(row) + 1:
        value = value.reshape(len(value), -1) if len(value) else value.new_zeros(0, 0)
    found = value.new_full((len(value), *row), with_value)
    found[tuple(slice(0, n) for n in value.shape)] = value
    return found


def _noted(info: dict[str, Any], notes: dict[str, Any]) -> dict[str, Any]:
    found = {**info, **notes}
    # A system that was read before, and joined again, lacks what it lacked then too.
    if FILLED_KEYS in notes and FILLED_KEYS in info:
        found[FILLED_KEYS] = sorted({*info[FILLED_KEYS], *notes[FILLED_KEYS]})
    if PADDED_KEYS in notes and PADDED_KEYS in info:
        found[PADDED_KEYS] = {**notes[PADDED_KEYS], **info[PADDED_KEYS]}
    return found
