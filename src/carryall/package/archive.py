"""ZIP archives that every reader reads alike, and nothing else.

A packed file is read by us and, later, by torch's own C++ reader, and is hashed in between. So what two readers could take
differently is refused: an archive is its entries, stored as they are, side by side from the first byte to the directory, and
each local header says what the directory says. That leaves no room for ZIP bombs, overlaps, hidden data or names that lead
out of a folder. Written after APPNOTE.TXT 6.3.10 of PKWARE; what torch adds (padding in an extra field "FB", data
descriptors, a ZIP64 end that repeats the plain one) is checked to the byte.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from carryall.errors import InputError

MAX_ENTRIES = 20_000
MAX_NAME_BYTES = 1_000
MAX_ENTRY_BYTES = 2**32 - 2  # beyond it is ZIP64
CHUNK = 1 << 20
AGAIN = "the file is damaged or was made by something else: copy or pack it again"

END, LOCAL, CENTRAL, DESCRIPTOR = b"PK\x05\x06", b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
END64, LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
END_FIELDS, LOCAL_FIELDS, CENTRAL_FIELDS = struct.Struct("<4s4H2IH"), struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
END64_FIELDS, LOCATOR64_FIELDS, DESCRIPTOR_FIELDS = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI"), struct.Struct("<4s3I")
ENCRYPTED, DESCRIPTOR_FOLLOWS, UTF8 = 0x1, 0x8, 0x800
PADDING = b"FB"


@dataclass(frozen=True)
class Record:
    """One entry: its name, its size and CRC-32, and where in the file its bytes start."""

    name: str
    size: int
    crc: int
    start: int


@dataclass(frozen=True)
class Archive:
    """An open archive that has passed every check but those of the entries' contents, which are checked when they are read."""

    path: Path
    records: dict[str, Record]
    stream: BinaryIO

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()

    def namelist(self) -> list[str]:
        """Names in the order of the file."""
        return list(self.records)

    def read(self, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
        """The bytes of one entry; InputError when it is absent, larger than `limit` bytes, or damaged."""
        record = self.record(name)
        if record.size > limit:
            raise InputError(f"{self.path}: entry {name} has {record.size} bytes, more than the {limit} that it may have")
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one entry, part by part; InputError at the end when they do not have the CRC-32 of the directory."""
        record = self.record(name)
        crc, position = 0, record.start
        while position < record.start + record.size:
            self.stream.seek(position)
            part = self.stream.read(min(CHUNK, record.start + record.size - position))
            if not part:
                raise InputError(f"{self.path}: entry {name} ends early; {AGAIN}")
            crc, position = zlib.crc32(part, crc), position + len(part)
            yield part
        if crc != record.crc:
            raise InputError(f"{self.path}: entry {name} does not have its checksum; {AGAIN}")

    def record(self, name: str) -> Record:
        """The entry of that name; InputError when there is none."""
        if name not in self.records:
            raise InputError(f"{self.path} has no {name}: it was not written by carryall, or not copied whole")
        return self.records[name]


def open_archive(path: str | Path) -> Archive:
    """The archive at `path`, to be closed or used in a `with`; InputError names the entry that breaks a rule."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return Archive(path, {record.name: record for record in _records(path, stream)}, stream)
    except OSError as error:
        stream.close()
        raise InputError(f"{path} cannot be read: {error}") from None
    except BaseException:
        stream.close()
        raise


def read_entry(path: str | Path, name: str, limit: int = MAX_ENTRY_BYTES) -> bytes:
    """One entry of an archive."""
    with open_archive(path) as archive:
        return archive.read(name, limit)


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    """Write the archive again with entries exchanged, added at the end, or (None) left out; it is replaced in one step.

    Dates are fixed, so that equal contents make equal files.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    # the archive is closed before its file is replaced
    with _replacing(path) as part, open_archive(path) as archive:
        kept = ((name, changes[name] if name in changes else archive.chunks(name)) for name in archive.records)
        added = ((name, data) for name, data in changes.items() if name not in archive.records)
        write_archive(part, ((name, data) for name, data in (*kept, *added) if data is not None))


def write_archive(path: Path, entries: Iterable[tuple[str, bytes | Iterable[bytes]]]) -> None:
    """A new archive at `path` of stored entries with a fixed date."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o600 << 16
            try:
                with archive.open(info, "w") as stream:
                    for part in [data] if isinstance(data, bytes) else data:
                        stream.write(part)
            except (RuntimeError, zipfile.LargeZipFile):
                raise InputError(f"{path}: entry {name} is larger than the 4 GiB that a packed file may hold") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes the place of `path` when all went well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _records(path: Path, stream: BinaryIO) -> list[Record]:
    """All entries, after every check of headers and directory."""
    size = stream.seek(0, os.SEEK_END)
    count, start, end = _directory_place(path, stream, size)
    stream.seek(start)
    directory = stream.read(end - start)
    records, names, offset, free = [], _Names(path), 0, 0
    for _ in range(count):
        if offset + CENTRAL_FIELDS.size > len(directory):
            raise _broken(path, "directory is cut off")
        fields = CENTRAL_FIELDS.unpack_from(directory, offset)
        if fields[0] != CENTRAL:
            raise _broken(path, f"directory has no entry at byte {start + offset}")
        offset += CENTRAL_FIELDS.size
        raw = directory[offset : offset + fields[10]]
        offset += fields[10]
        name = names.add(raw, bool(fields[3] & UTF8))
        _check_central(path, name, fields)
        records.append(_record(path, stream, name, raw, fields, free, start))
        free = records[-1].start + records[-1].size + (DESCRIPTOR_FIELDS.size if fields[3] & DESCRIPTOR_FOLLOWS else 0)
    if offset != len(directory):
        raise _broken(path, f"directory has {len(directory) - offset} bytes after its last entry")
    if free != start:
        raise _broken(path, f"{start - free} bytes between the last entry and the directory belong to no entry")
    names.check_folders()
    return records


def _directory_place(path: Path, stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of entries, first byte and end of the directory."""
    stream.seek(max(0, size - END_FIELDS.size - 76))
    tail = stream.read()
    if len(tail) < END_FIELDS.size or not tail[-END_FIELDS.size :].startswith(END):
        raise _no_end(path, stream, size)
    _, disk, first_disk, here, count, length, start, comment = END_FIELDS.unpack(tail[-END_FIELDS.size :])
    if comment or disk or first_disk or here != count:
        raise _broken(path, "end of the archive has a comment or names more than one disk")
    if count == 0xFFFF or length == 0xFFFFFFFF or start == 0xFFFFFFFF:
        raise _broken(path, "directory is a ZIP64 one, of a file beyond 4 GiB")
    if count > MAX_ENTRIES or length > count * (CENTRAL_FIELDS.size + MAX_NAME_BYTES):
        raise _broken(path, f"directory claims {count} entries in {length} bytes, more than a packed file has")
    end, tail = start + length, tail[: -END_FIELDS.size]
    if end + 76 == size - END_FIELDS.size:
        _check_end64(path, tail[-76:], count, length, start)
    elif end != size - END_FIELDS.size:
        raise _broken(path, "directory does not lie right before the end; something was added to the archive or cut out of it")
    return count, start, end


def _check_end64(path: Path, tail: bytes, count: int, length: int, start: int) -> None:
    """What torch writes before the plain end must say the same."""
    fields = END64_FIELDS.unpack(tail[: END64_FIELDS.size])
    locator = LOCATOR64_FIELDS.unpack(tail[END64_FIELDS.size :])
    said = (fields[0], fields[1], *fields[4:])
    if said != (END64, 44, 0, 0, count, count, length, start) or locator != (LOCATOR64, 0, start + length, 1):
        raise _broken(path, "ZIP64 end differs from the plain end")


def _no_end(path: Path, stream: BinaryIO, size: int) -> InputError:
    """Why there is no end of an archive where it should be."""
    stream.seek(0)
    is_zip = stream.read(4) == LOCAL
    stream.seek(max(0, size - 66_000))
    found = stream.read().rfind(END)
    if found >= 0:
        where = max(0, size - 66_000) + found + END_FIELDS.size
        return _broken(path, f"{size - where} bytes follow the end of the archive" if where < size else "end is cut off")
    what = "a ZIP archive that is cut off" if is_zip else "empty" if size == 0 else "no ZIP archive"
    return InputError(f"{path} is not a packed potential: it is {what}; was it copied whole?")


def _check_central(path: Path, name: str, fields: tuple[int, ...]) -> None:
    _, _, version, flags, method, _, _, _, stored, size, _, extra, comment, disk, _, attributes, _ = fields
    kind = stat.S_IFMT(attributes >> 16)
    problems = {
        "is encrypted": flags & ENCRYPTED,
        f"has flags {flags:#x} that a packed file never has": flags & ~(ENCRYPTED | DESCRIPTOR_FOLLOWS | UTF8),
        f"is compressed (method {method}); entries of a packed file are stored": method,
        f"is of ZIP version {version}": version > 45,
        "has two different sizes": stored != size,
        "has an extra field, a comment or a disk number in the directory": extra or comment or disk,
        "is a ZIP64 one, of more than 4 GiB": size > MAX_ENTRY_BYTES,
        "is a link or another special file": kind not in (0, stat.S_IFREG) or attributes & 0x10,
    }
    for what, present in problems.items():
        if present:
            raise _broken(path, f"entry {name} {what}")


def _record(path: Path, stream: BinaryIO, name: str, raw: bytes, fields: tuple[int, ...], free: int, end: int) -> Record:
    """The entry, when its local header lies at the first free byte and says what the directory says."""
    _, _, version, flags, method, time, date, crc, _, size, _, _, _, _, _, _, place = fields
    if place != free:
        raise _broken(path, f"entry {name} {'overlaps the one before' if place < free else 'leaves a gap before it'}")
    stream.seek(place)
    header = stream.read(LOCAL_FIELDS.size + len(raw))
    if len(header) < LOCAL_FIELDS.size + len(raw):
        raise _broken(path, f"entry {name} lies beyond the end")
    local = LOCAL_FIELDS.unpack_from(header)
    later = bool(flags & DESCRIPTOR_FOLLOWS)
    said = (version, flags, method, time, date, *((0, 0, 0) if later else (crc, size, size)), len(raw))
    if local[0] != LOCAL or local[1:10] != said or header[LOCAL_FIELDS.size :] != raw:
        raise _broken(path, f"entry {name} has another name, size or kind in its own header than in the directory")
    padding = stream.read(local[10])
    if padding and (len(padding) < 4 or padding != PADDING + struct.pack("<H", len(padding) - 4) + b"Z" * (len(padding) - 4)):
        raise _broken(path, f"entry {name} has an extra field that is no padding")
    start = place + len(header) + len(padding)
    if start + size + (DESCRIPTOR_FIELDS.size if later else 0) > end:
        raise _broken(path, f"entry {name} claims {size} bytes, more than the file has there")
    if later:
        stream.seek(start + size)
        if DESCRIPTOR_FIELDS.unpack(stream.read(DESCRIPTOR_FIELDS.size)) != (DESCRIPTOR, crc, size, size):
            raise _broken(path, f"entry {name} is followed by another size or checksum than the directory has")
    return Record(name, size, crc, start)


class _Names:
    """The names so far; each must be plain, and no two may fall together on any file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, str] = {}

    def add(self, raw: bytes, utf8: bool) -> str:
        """The text of a name."""
        try:
            name = raw.decode("utf-8" if utf8 else "ascii")
        except UnicodeDecodeError:
            raise _broken(self.path, f"entry name {raw[:60]!r} is not plain text") from None
        parts = name.split("/")
        plain = name.isprintable() and not set(name) & set('\\:*?"<>|') and len(raw) <= MAX_NAME_BYTES
        if (
            not plain
            or unicodedata.normalize("NFC", name) != name
            or any(p in ("", ".", "..") or p != p.strip() for p in parts)
        ):
            raise _broken(self.path, f"entry name {name[:100]!r} is not that of a file below one folder")
        key = name.casefold()
        if key in self.seen:
            twice = "twice" if self.seen[key] == name else f"and {self.seen[key]}, one name where case does not count,"
            raise _broken(self.path, f"entry {name} {twice} is in the archive")
        self.seen[key] = name
        return name

    def check_folders(self) -> None:
        """No file may have the name of a folder."""
        for key, name in self.seen.items():
            for position in (i for i, c in enumerate(key) if c == "/"):
                if key[:position] in self.seen:
                    raise _broken(self.path, f"entry {self.seen[key[:position]]} is also the folder of {name}")


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; {AGAIN}")
