"""Finished systems as frames of an extended XYZ file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from carryall.data.batch import Batch
from carryall.dynamics.sinks.base import Mask, SinkBase, exclusive
from carryall.dynamics.sinks.frames import frame_text, keys_of, structure_of
from carryall.dynamics.sinks.joining import joined_with_blanks, with_levels_of
from carryall.errors import InputError


class ExtXYZSink(SinkBase):
    """Appends systems to an extended XYZ file, which ASE and others read: numbers in full precision, keys of atoms as columns,
    those of systems and `info` in the comment line, where `batch_keys` says what `read` makes of them.

    A file that is there is gone on with; a frame that a killed writer left incomplete is cut off. Keys of edges have no place
    in the format and are left out; velocities are stored as momenta, exact to rounding. `info` comes back as the format has
    it: tuples as lists, and so on. A system without atoms is a frame of 0 atoms.
    """

    def __init__(self, path: str | Path, capacity: int | None = None) -> None:
        """InputError: the file is no extended XYZ, or another process writes to it. A capacity counts what is there already."""
        super().__init__(capacity)
        self.path = Path(path)
        if self.path.suffix == ".gz":
            raise InputError(f"{self.path}: a sink cannot append to a compressed file: give a name without .gz")
        self._file: BinaryIO | None = None
        self._count = 0
        self._levels: dict[str, str] = {}
        self._lock = exclusive(self.path)
        try:
            self._file = self.path.open("a+b", buffering=0)
            ends = [end for _, end in _frames(self.path)]
            self._count = len(ends)
            self._file.truncate(ends[-1] if ends else 0)
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
        part = batch.index_select(chosen)
        keys = keys_of(part)
        text = "".join(frame_text(data, keys) for data in part.to_data_list())
        left, end = memoryview(text.encode()), self._file.seek(0, 2)
        try:
            while left:
                left = left[self._file.write(left) :]
        except BaseException:
            self._file.truncate(end)
            raise
        self._count += len(chosen)
        self._levels = levels

    def read(self) -> Batch:
        """All systems in the order in which they were written; InputError for none, or for a frame that no sink wrote."""
        self._check_not_empty()
        structures = [structure_of(lines, f"{self.path}: frame {i}") for i, (lines, _) in enumerate(_frames(self.path))]
        groups = groupby(structures, key=lambda one: one[0])
        return joined_with_blanks([Batch.from_data_list([data for _, data in group]) for _, group in groups])

    def zero(self) -> None:
        """Forget all systems: the file is empty then."""
        if self._file is None:
            raise InputError(f"{self.path}: the sink is closed")
        self._file.truncate(0)
        self._count, self._levels = 0, {}

    def close(self) -> None:
        """Close the file, and let others write to it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.release()


def _frames(path: Path) -> Iterator[tuple[list[str], int]]:
    """Comment line and rows of each whole frame, and where in the file it ends."""
    with path.open("rb") as file:
        while head := file.readline():
            if not head.endswith(b"\n"):
                return
            if not head.strip().isdigit():
                raise InputError(f"{path} is not extended XYZ: expected a number of atoms, got {head[:40]!r}")
            lines = [file.readline() for _ in range(int(head) + 1)]
            if not lines[-1].endswith(b"\n"):
                return
            yield [line.decode() for line in lines], file.tell()
