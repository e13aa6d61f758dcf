"""Structures in files, counted without being parsed where that is possible, and read from any place on."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO

from carryall.data.extxyz import Frame, frames_in, parse_frame
from carryall.data.labels import LabelKeys
from carryall.data.readers import is_extxyz, read_structures
from carryall.dynamics.structures import Sourced
from carryall.errors import InputError

STRIDE = 100
"""Frames between two marks of a file: what is read in vain, at most, to get to a frame."""
UNREADABLE = (InputError, OSError, UnicodeDecodeError, EOFError, zlib.error)


@dataclass(frozen=True)
class Mark:
    """A place in a file of extended XYZ: bytes, lines and frames before it."""

    offset: int = 0
    lines: int = 0
    frames: int = 0


START = Mark()


@dataclass(frozen=True)
class MeasuredFile:
    """A file and how many inputs it gives; one that cannot be read on gives one more, which says why."""

    path: str
    """Absolute."""
    name: str
    """As it was given: results name it so."""
    n_inputs: int
    marks: tuple[Mark, ...] = ()
    """Before every `STRIDE`th frame."""


@dataclass(frozen=True)
class FilePart:
    """Consecutive inputs of a file; iterating reads them."""

    path: str
    name: str
    first: int
    """Place in the file of the first input."""
    count: int
    mark: Mark = START
    """Where to begin to read."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sourced]:
        """InputError when the file has fewer structures than before."""
        skipped = self.first - self.mark.frames
        found = 0
        for one in islice(_inputs(self.path, self.name, self.mark), skipped, skipped + self.count):
            found += 1
            yield one
        if found < self.count:
            raise InputError(
                f"{self.name}: it has {self.first + found} structures, and had at least {self.first + self.count} when the run "
                "was divided: the file was changed; restore it, or write elsewhere"
            )


def measured(path: str | Path, base: str | Path = ".") -> MeasuredFile:
    """Count the inputs of a file: of extended XYZ by its lines, of others by reading them. base: where relative paths begin."""
    full = str(Path(base, path).absolute())
    if not _by_frames(full):
        try:
            return MeasuredFile(full, str(path), len(read_structures(full)))
        except UNREADABLE:
            return MeasuredFile(full, str(path), 1)
    marks: list[Mark] = []
    count = 0
    try:
        with _opened(full) as stream:
            lines, before = _Lines(stream), START
            for frame in frames_in(lines, Path(full)):
                if frame.number % STRIDE == 0:
                    marks.append(before)
                count = frame.number + 1
                before = Mark(lines.offset, lines.count, count)
        if not count:
            raise InputError("the file holds no frame")
    except UNREADABLE:
        count += 1
    # what is compressed has no places to go to
    return MeasuredFile(full, str(path), count, () if full.endswith(".gz") else tuple(marks))


def divided_files(files: Sequence[MeasuredFile], size: int) -> Iterator[tuple[FilePart, ...]]:
    """The inputs of all files, one behind the other, in parts of `size` each; the last one may have fewer."""
    parts: list[FilePart] = []
    room = size
    for file in files:
        first = 0
        while first < file.n_inputs:
            count = min(room, file.n_inputs - first)
            place = first // STRIDE
            mark = file.marks[min(place, len(file.marks) - 1)] if file.marks else START
            parts.append(FilePart(file.path, file.name, first, count, mark))
            first, room = first + count, room - count
            if not room:
                yield tuple(parts)
                parts, room = [], size
    if parts:
        yield tuple(parts)


class _Lines:
    """Lines of a file as text, decoded one by one, so that what is no text costs the frames from there on only."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.offset = self.count = 0
        """Bytes and lines that were read."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._stream)
        self.offset += len(line)
        self.count += 1
        return line.decode("utf-8").replace("\r\n", "\n")


def _by_frames(path: str) -> bool:
    return Path(path).is_file() and is_extxyz(Path(path))


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]


def _inputs(path: str, name: str, mark: Mark) -> Iterator[Sourced]:
    """All inputs of a file from a mark on; what cannot be read comes with the reason."""
    try:
        if not _by_frames(path):
            for number, data in enumerate(read_structures(path)):
                yield Sourced(data, name, number)
            return
        found = 0
        for frame in _frames_from(path, name, mark):
            found += 1
            try:
                yield Sourced(parse_frame(frame, Path(name), LabelKeys()), name, frame.number)
            except InputError as error:
                yield Sourced(None, name, frame.number, _one_line(error, path, name))
        if not found and not mark.frames:
            raise InputError(f"{name}: the file holds no frame")
    except UNREADABLE as error:
        yield Sourced(None, name, None, _one_line(error, path, name))


def _frames_from(path: str, name: str, mark: Mark) -> Iterator[Frame]:
    with _opened(path) as stream:
        stream.seek(mark.offset)
        try:
            for frame in frames_in(_Lines(stream), Path(name)):
                yield replace(frame, number=frame.number + mark.frames, line=frame.line + mark.lines)
            return
        except InputError:
            if mark == START:
                raise
    # read again from the start, so that the message counts frames and lines from there
    for _ in _frames_from(path, name, START):
        pass


def _one_line(error: Exception, path: str, name: str) -> str:
    text = " ".join(str(error).split()).replace(path, name)
    return text if isinstance(error, InputError) else f"{name}: cannot be read: {text}"
