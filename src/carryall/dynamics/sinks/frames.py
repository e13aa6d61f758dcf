"""A system of a batch as the text of an extended XYZ frame and back, with every dtype and shape, NaN included."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.batch import Batch
from carryall.data.elements import MASSES, atomic_number
from carryall.data.extxyz import format_frame
from carryall.data.extxyz_comment import parse_comment
from carryall.data.fields import FIELDS, short_name
from carryall.errors import InputError

Key: TypeAlias = tuple[str, str, str, tuple[int, ...]]
"""Name, level, dtype as torch names it, shape of one row."""
Keys: TypeAlias = tuple[Key, ...]

BATCH_KEYS = "batch_keys"
"""In the comment line: what stands before the names of labels, then the keys."""
NO_PREFIX = "-"
LABELS = ("energy", "forces", "stress")
COLUMNS = {
    "positions": "pos",
    "atomic_numbers": "species",
    "velocities": "momenta",
    "charges": "initial_charges",
    "spins": "initial_magmoms",
}
"""Column of a field where the format has another name for it."""


def keys_of(batch: Batch) -> Keys:
    """The keys that a frame holds: all but those of edges."""
    return tuple(
        (key, level, short_name(batch.get(key).dtype), tuple(batch.get(key).shape[1:]))
        for level in ("system", "atom")
        for key in batch.keys(level)
    )


def frame_text(data: AtomicData, keys: Keys) -> str:
    """The text of one frame; InputError for a key or a fact that the format has no word for."""
    if BATCH_KEYS in data.info or BATCH_KEYS in data.system_extras:
        raise InputError(f"{BATCH_KEYS!r} is the sink's own word in an extended XYZ file: rename it")
    values = _fields(data)
    # As in format_frame: labels give way to facts of the same names.
    prefix = "REF_" if {"energy", "stress"} & data.info.keys() else ""
    extras = {
        level: {key: _known(value) for key, value in table.items() if prod(value.shape[1:] if level == "atom" else value.shape)}
        for level, table in {"atom": data.atom_extras, "system": data.system_extras}.items()
    }
    info = {**data.info, BATCH_KEYS: " ".join([prefix or NO_PREFIX, *map(_key_text, keys)])}
    if data.n_atoms:
        return format_frame(unchecked(values, extras, info), prefix)
    # The writer knows no frame without atoms: one atom is put in, and its row left out.
    one = {
        name: value.new_ones(1, *value.shape[1:]) if FIELDS[name].level == "atom" else value for name, value in values.items()
    }
    extras["atom"] = {name: value.new_ones(1, *value.shape[1:]) for name, value in extras["atom"].items()}
    return "0\n" + format_frame(unchecked(one, extras, info), prefix).splitlines(keepends=True)[1]


def structure_of(lines: Sequence[str], where: str) -> tuple[Keys, AtomicData]:
    """The keys and the structure of a frame, from its comment line and its rows; InputError says `where` it is wrong."""
    try:
        info = parse_comment(lines[0])
        if BATCH_KEYS not in info:
            raise InputError(
                f"the comment line has no {BATCH_KEYS}: no sink wrote it; read it with carryall.data.read_structures"
            )
        prefix, *words = info.pop(BATCH_KEYS).split()
        keys = tuple(map(_key_of, words))
        columns = _columns(info.pop("Properties"), [line.split() for line in lines[1:]])
        return keys, _structure(keys, "" if prefix == NO_PREFIX else prefix, info, columns)
    except (InputError, ValueError, KeyError) as error:
        raise InputError(f"{where}: {error}") from None


def _structure(keys: Keys, prefix: str, info: dict[str, Any], columns: dict[str, np.ndarray]) -> AtomicData:
    n_atoms = len(columns["species"])
    masses = columns.get("masses")
    if "momenta" in columns:
        numbers = _numbers(columns["species"])
        columns["momenta"] = columns["momenta"] / (MASSES[numbers] if masses is None else masses)[:, None]
    values: dict[str, Tensor] = {}
    extras: dict[str, dict[str, Tensor]] = {"atom": {}, "system": {}}
    cell = info.pop("Lattice", None)
    pbc = np.array(info.pop("pbc"))
    for key, level, dtype, row in keys:
        kind = getattr(torch, dtype)
        name = f"{prefix}{key}" if key in LABELS else COLUMNS.get(key, key)
        if not prod(row):
            found = np.zeros(0)
        elif level == "atom":
            found = _numbers(columns.pop(name)) if key == "atomic_numbers" else columns.pop(name)
            if found.ndim == 1 and row:  # equal columns were written as one
                found = np.repeat(found[:, None], prod(row), axis=1)
        elif key == "cell":
            found = np.zeros((3, 3)) if cell is None else cell
        else:
            found = pbc if key == "pbc" else np.asarray(info.pop(name))
        shape = (n_atoms, *row) if level == "atom" else row
        value = torch.from_numpy(np.ascontiguousarray(found)).to(kind).reshape(shape)
        if key in FIELDS:
            values[key] = value
        else:
            extras[level][key] = value
    if cell is None:
        values.pop("cell", None)
    return unchecked(values, extras, {**info, **columns})


def _fields(data: AtomicData) -> dict[str, Tensor]:
    return {name: _known(value) for name in FIELDS if name != "edge_index" and (value := getattr(data, name)) is not None}


def _known(value: Tensor) -> Tensor:
    """In a dtype that numpy knows too; float64 holds all smaller ones."""
    return value.double() if value.is_floating_point() else value


def _key_text(key: Key) -> str:
    name, level, dtype, row = key
    return f"{quote(name, safe='')}:{level}:{dtype}:{'x'.join(map(str, row))}"


def _key_of(text: str) -> Key:
    name, level, dtype, row = text.split(":")
    return unquote(name), level, dtype, tuple(map(int, row.split("x"))) if row else ()


def _columns(properties: str, rows: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    parts, columns, start = properties.split(":"), {}, 0
    for name, kind, count in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        words = [row[start : start + int(count)] for row in rows]
        start += int(count)
        if kind == "L":
            array = np.array([[word == "T" for word in row] for row in words], dtype=bool)
        else:
            array = np.array(words, dtype={"R": np.float64, "I": np.int64, "S": np.str_}[kind])
        columns[name] = array.reshape(len(rows), int(count))[:, 0] if count == "1" else array.reshape(len(rows), int(count))
    return columns


def _numbers(species: np.ndarray) -> np.ndarray:
    return np.array([atomic_number(symbol) for symbol in species.tolist()], dtype=np.int64)
