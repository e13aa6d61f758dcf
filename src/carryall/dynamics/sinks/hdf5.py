"""Finished systems in one HDF5 file.

HDF5 and not Zarr: one file instead of one per chunk and key, which shared file systems bear badly; it can be read while it is
written; and h5py is needed for trajectories anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from carryall.data.batch import Batch
from carryall.dynamics.sinks.base import Mask, SinkBase, exclusive
from carryall.dynamics.sinks.joining import joined_with_blanks, with_levels_of
from carryall.dynamics.sinks.swmr import changed_in_copy, opened_for_reading, opened_for_writing
from carryall.dynamics.sinks.tables import Schema, Table, make_table, schema_of, write_rows
from carryall.errors import InputError

FORMAT, VERSION = "carryall-sink", 1
ORDER, COMMITTED, TABLES = "order", "committed", "tables"


class HDF5Sink(SinkBase):
    """Appends systems to one file: every key of every dtype, ragged, and `info` as JSON.

    A file that is there is gone on with. A writer may be killed at any moment: what a `write` that returned has written is in
    the file, a write cut short is not, nor is any part of it. (After a power cut the file system decides.) Other processes can
    read the file meanwhile with `read_hdf5`.

    Layout: `tables/0`, ...: one table for each set of keys (see `carryall.dynamics.sinks.tables`); `order`: the table of each
    system, in the order of writing; `committed`: how many systems count, written last. A new set of keys, or rows of another
    width, make a new table, for which the file is copied once.
    """

    def __init__(self, path: str | Path, capacity: int | None = None) -> None:
        """InputError: the file is no sink, or another process writes to it. A capacity counts what is there already."""
        super().__init__(capacity)
        self.path = Path(path)
        self._file: Any = None
        self._count = 0
        self._tables: list[Table] = []
        self._numbers: dict[Schema, int] = {}
        self._levels: dict[str, str] = {}
        self._lock = exclusive(self.path)
        try:
            if not self.path.exists():
                changed_in_copy(self.path, _begin)
            self._open()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._count

    def write(self, batch: Batch, mask: Mask = None) -> None:
        """Append the systems of `mask`, all by default; SinkFullError, with nothing written, when they do not all fit."""
        if self._file is None:
            raise InputError(f"{self.path}: the sink is closed")
        chosen = self._chosen(batch, mask)
        if not len(chosen):
            return
        levels = with_levels_of(batch, self._levels)
        part = batch.index_select(chosen).to("cpu")
        schema = schema_of(part)
        if schema not in self._numbers:
            self._add_table(part)
        number = self._numbers[schema]
        rows = self._tables[number].rows
        try:
            self._tables[number].add(part)
            write_rows(self._file[ORDER], self._count, np.full(len(chosen), number, dtype=np.int32))
            self._file.flush()
            self._file[COMMITTED][0] = self._count + len(chosen)
            self._file.flush()
        except BaseException:
            # The next write begins where this one did.
            self._tables[number].rows = rows
            self._file[COMMITTED][0] = self._count
            self._file.flush()
            raise
        self._count += len(chosen)
        self._levels = levels

    def read(self) -> Batch:
        """All systems in the order in which they were written; InputError when there is none."""
        self._check_not_empty()
        return read_hdf5(self.path) if self._file is None else _read(self._file, self._count, self._tables)

    def zero(self) -> None:
        """Forget all systems: an empty file takes the place of this one."""
        self._shut()
        changed_in_copy(self.path, _begin, empty=True)
        self._open()

    def close(self) -> None:
        """Close the file, and let others write to it."""
        self._shut()
        self._lock.release()

    def _shut(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._file = opened_for_writing(self.path)
        self._count, self._tables = _contents(self.path, self._file)
        self._numbers = {table.schema: number for number, table in enumerate(self._tables)}
        self._levels = {key: level for table in self._tables if table.rows.system for level, key, _, _ in table.schema}

    def _add_table(self, like: Batch) -> None:
        name = f"{TABLES}/{len(self._tables)}"
        self._shut()
        try:
            changed_in_copy(self.path, lambda file: make_table(file, name, like))
        finally:
            self._open()


def read_hdf5(path: str | Path) -> Batch:
    """The systems that an `HDF5Sink` wrote, in order, also while it is writing or after it was killed; InputError for none."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    with opened_for_reading(path) as file:
        count, tables = _contents(path, file)
        if not count:
            raise InputError(f"{path} holds no system: nothing to read")
        return _read(file, count, tables)


def _read(file: Any, count: int, tables: list[Table]) -> Batch:
    used = [table for table in tables if table.rows.system]
    joined = joined_with_blanks([table.read() for table in used])
    if len(used) == 1:
        return joined
    # Systems lie table by table now: sorted by tables, `order` says which place each has to go to.
    place = np.empty(count, dtype=np.int64)
    place[np.argsort(file[ORDER][:count], kind="stable")] = np.arange(count)
    return joined.index_select(place)


def _begin(file: Any) -> None:
    file.attrs.update({"format": FORMAT, "version": VERSION})
    file.create_dataset(COMMITTED, data=np.zeros(1, dtype=np.int64))
    file.create_dataset(ORDER, shape=(0,), maxshape=(None,), chunks=(4096,), dtype=np.int32)
    file.create_group(TABLES)


def _contents(path: Path, file: Any) -> tuple[int, list[Table]]:
    """Number of systems that count, and the tables with their share of them."""
    if file.attrs.get("format") != FORMAT or int(file.attrs.get("version", 0)) > VERSION:
        raise InputError(
            f"{path} is not a sink of carryall (version {VERSION} or older): its attributes are {dict(file.attrs)}"
        )
    count = int(file[COMMITTED][0])
    groups = file[TABLES]
    shares = np.bincount(file[ORDER][:count], minlength=len(groups)).tolist()
    return count, [Table(groups[str(number)], shares[number]) for number in range(len(groups))]
