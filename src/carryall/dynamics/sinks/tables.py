"""Systems as rows of an HDF5 group: all systems of a table have the same keys, dtypes and row shapes.

A table has `atom_counts`, `edge_counts` and `info_sizes` (one number a system), `info` (JSON, one text after the other), and
for each key a data set `system/KEY`, `atom/KEY` or `edge/KEY`. Its attribute `keys` lists level, key, dtype and row shape.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import h5py
import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.fields import LEVELS, short_name
from carryall.data.levels import Columns
from carryall.dynamics.sinks.info_text import info_from_json, info_to_json

Key: TypeAlias = tuple[str, str, str, tuple[int, ...]]
"""level, key, dtype as torch names it, shape of one row."""
Schema: TypeAlias = tuple[Key, ...]

CHUNK_BYTES = 32768
COUNTS = ("atom_counts", "edge_counts", "info_sizes")


def schema_of(batch: Batch) -> Schema:
    """What makes batches rows of one table."""
    return tuple(
        (level, key, short_name(batch.get(key).dtype), tuple(batch.get(key).shape[1:]))
        for level in LEVELS
        for key in sorted(batch.keys(level))
    )


@dataclass
class Rows:
    """Rows of a table that are in use."""

    system: int = 0
    atom: int = 0
    edge: int = 0
    info: int = 0


class Table:
    """One table of an open file, and how many of its rows count."""

    def __init__(self, group: Any, n_systems: int) -> None:
        """n_systems: systems that were committed; rows beyond them are left from a writer that was killed."""
        self.schema: Schema = tuple(
            (level, key, dtype, tuple(row)) for level, key, dtype, row in json.loads(group.attrs["keys"])
        )
        self._fixed = {name: group[name] for name in (*COUNTS, "info")}
        self._keys = {(level, key): group[_path(level, key)] for level, key, _, row in self.schema if prod(row)}
        atoms, edges, infos = (int(self._fixed[name][:n_systems].sum()) for name in COUNTS)
        self.rows = Rows(n_systems, atoms, edges, infos)

    def add(self, batch: Batch) -> None:
        """Write the systems of a batch beyond the rows that count."""
        text = [info_to_json(info).encode() for info in batch.info]
        joined = np.frombuffer(b"".join(text), dtype=np.uint8)
        rows = self.rows
        counts = (batch.atom_counts, batch.edge_counts, [len(one) for one in text])
        for name, values in zip(COUNTS, counts, strict=True):
            write_rows(self._fixed[name], rows.system, np.array(values, dtype=np.int64))
        write_rows(self._fixed["info"], rows.info, joined)
        first = {"system": rows.system, "atom": rows.atom, "edge": rows.edge}
        for (level, key), data in self._keys.items():
            write_rows(data, first[level], _as_array(batch.get(key)))
        self.rows = Rows(
            rows.system + batch.n_systems, rows.atom + batch.n_atoms, rows.edge + batch.n_edges, rows.info + len(joined)
        )

    def read(self) -> Batch:
        """The systems that count."""
        rows = self.rows
        length = {"system": rows.system, "atom": rows.atom, "edge": rows.edge}
        values: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
        for level, key, dtype, row in self.schema:
            kind = getattr(torch, dtype)
            if (level, key) not in self._keys:
                values[level][key] = torch.zeros(length[level], *row, dtype=kind)
                continue
            found = torch.from_numpy(self._keys[level, key][: length[level]])
            values[level][key] = found if found.dtype == kind else found.view(kind)
        atoms, edges, sizes = (self._fixed[name][: rows.system] for name in COUNTS)
        text = self._fixed["info"][: rows.info].tobytes()
        ends = np.cumsum(sizes).tolist()
        info = [info_from_json(text[end - size : end]) for size, end in zip(sizes.tolist(), ends, strict=True)]
        return Batch(Columns(atoms, edges, values, info))


def make_table(file: Any, name: str, batch: Batch) -> None:
    """A group without rows for systems like those of `batch`."""
    group = file.create_group(name)
    schema = schema_of(batch)
    group.attrs["keys"] = json.dumps(schema)
    for count in COUNTS:
        _make(group, count, np.dtype(np.int64), ())
    _make(group, "info", np.dtype(np.uint8), ())
    for level, key, _, row in schema:
        if prod(row):
            _make(group, _path(level, key), _as_array(batch.get(key)[:0]).dtype, row)


def _make(group: Any, name: str, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
    length = max(1, CHUNK_BYTES // max(1, dtype.itemsize * prod(row)))
    group.create_dataset(name, shape=(0, *row), maxshape=(None, *row), chunks=(length, *row), dtype=dtype)


def write_rows(data: Any, first: int, values: np.ndarray) -> None:
    """Rows of a data set from `first` on, which grows where it has to."""
    if not len(values):
        return
    # h5py's low-level calls: indexing a Dataset costs ten times as much, for each key of each write.
    end, below = first + len(values), (0,) * (values.ndim - 1)
    shape = data.id.shape
    if end > shape[0]:
        data.id.set_extent((end, *shape[1:]))
    place = h5py.h5s.create_simple((max(end, shape[0]), *shape[1:]))
    place.select_hyperslab((first, *below), values.shape)
    data.id.write(h5py.h5s.create_simple(values.shape), place, np.ascontiguousarray(values, dtype=data.dtype))


def _as_array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu().contiguous()
    try:
        return value.numpy()
    except TypeError:  # a dtype that numpy has not, such as bfloat16: its bits
        return value.view({1: torch.uint8, 2: torch.int16}[value.dtype.itemsize]).numpy()


def _path(level: str, key: str) -> str:
    """HDF5 takes / as a folder and . as the group itself."""
    return f"{level}/{key.replace('%', '%25').replace('/', '%2F').replace('.', '%2E')}"
