"""HDF5 files that survive kill -9 while they are written to.

HDF5 alone may leave a file in pieces when its writer is killed. In its SWMR mode (single writer, multiple readers) it orders
what it writes so that the file can be read at every moment; then only two marks of the dead writer are left in the first 48
bytes, which `h5clear -s -m` of the HDF5 tools would clear: "open for writing", and an end of file that may be too low.
`clear_marks` does the same. What SWMR mode cannot do, making new data sets, is done in a copy that then takes the file's place.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from carryall.errors import InputError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK = 48
"""Bytes of a superblock of version 3 with addresses of 8 bytes, which is what this version range writes."""
LIBVER = ("v110", "v110")


def changed_in_copy(path: Path, change: Callable[[Any], None], empty: bool = False) -> None:
    """Apply `change(file)` to a copy of the file (a new file if `empty` or there is none), which then takes its place."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    if path.exists() and not empty:
        shutil.copyfile(path, temporary)
    try:
        with h5py.File(temporary, "a", libver=LIBVER) as file:
            change(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def opened_for_writing(path: Path) -> Any:
    """The file, ready for rows to be added; at most one process may do so at a time (the caller's lock)."""
    clear_marks(path)
    file = h5py.File(path, "r+", libver=LIBVER)
    file.swmr_mode = True
    return file


def opened_for_reading(path: Path) -> Any:
    """The file, also while another process adds rows, or after it was killed."""
    try:
        return h5py.File(path, "r", libver=LIBVER, swmr=True)
    except OSError as error:
        raise InputError(f"{path} cannot be opened as HDF5: {error}") from None


def clear_marks(path: Path) -> None:
    """Take away what a writer that was killed left in the superblock; a file that was closed stays as it is."""
    with path.open("r+b") as file:
        block = bytearray(file.read(SUPERBLOCK))
        if len(block) < SUPERBLOCK or block[:8] != SIGNATURE or block[8] != 3 or block[9] != 8:
            raise InputError(f"{path} is not an HDF5 file of the kind that a sink writes")
        if block[11] == 0:
            return
        (end,) = struct.unpack_from("<Q", block, 28)
        block[11] = 0
        struct.pack_into("<Q", block, 28, max(end, os.fstat(file.fileno()).st_size))
        struct.pack_into("<I", block, 44, lookup3(bytes(block[:44])))
        file.seek(0)
        file.write(block)


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata: Bob Jenkins' lookup3, `hashlittle` with initial value 0 (public domain, 2006)."""
    mask = 0xFFFFFFFF

    def rotated(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    blocks = range(0, max(0, len(data) - 1) // 12 * 12, 12)
    for start in blocks:
        x, y, z = struct.unpack_from("<III", data, start)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        a = ((a - c) & mask) ^ rotated(c, 4)
        c = (c + b) & mask
        b = ((b - a) & mask) ^ rotated(a, 6)
        a = (a + c) & mask
        c = ((c - b) & mask) ^ rotated(b, 8)
        b = (b + a) & mask
        a = ((a - c) & mask) ^ rotated(c, 16)
        c = (c + b) & mask
        b = ((b - a) & mask) ^ rotated(a, 19)
        a = (a + c) & mask
        c = ((c - b) & mask) ^ rotated(b, 4)
        b = (b + a) & mask
    rest = data[len(blocks) * 12 :]
    if not rest:
        return c
    x, y, z = struct.unpack("<III", rest.ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    c = ((c ^ b) - rotated(b, 14)) & mask
    a = ((a ^ c) - rotated(c, 11)) & mask
    b = ((b ^ a) - rotated(a, 25)) & mask
    c = ((c ^ b) - rotated(b, 16)) & mask
    a = ((a ^ c) - rotated(c, 4)) & mask
    b = ((b ^ a) - rotated(a, 14)) & mask
    return ((c ^ b) - rotated(b, 24)) & mask
