"""Archives that two readers could read differently, or that no packed file ever is, are refused; each with its reason."""

from __future__ import annotations

import io
import json
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from carryall.errors import InputError
from carryall.package.archive import MAX_ENTRIES, open_archive, read_entry, rewrite

CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
# offsets of fields in the headers of APPNOTE.TXT
VERSION, FLAGS, METHOD, CRC, SIZE, EXTRA, COMMENT, DISK, ATTRIBUTES, PLACE = 6, 8, 10, 16, 24, 30, 32, 34, 38, 42


def archive_of(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, method)
    return stream.getvalue()


PLAIN = archive_of({"model/a": b"first", "model/b": b"second", "model/c": b""})


def patched(place: int, layout: str, *values: int, data: bytes = PLAIN) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, place, *values)
    return bytes(changed)


def central(field: int, data: bytes = PLAIN) -> int:
    """Where a field of the first entry stands in the directory."""
    return data.index(CENTRAL) + field


def end(field: int) -> int:
    return PLAIN.index(END) + field


def named(*names: str) -> bytes:
    """An archive with names that zipfile itself would not write."""
    stand_ins = [chr(ord("a") + i) * len(name.encode()) for i, name in enumerate(names)]
    data = archive_of(dict.fromkeys(stand_ins, b"x"))
    for stand_in, name in zip(stand_ins, names, strict=True):
        data = data.replace(stand_in.encode(), name.encode())
    return data


def overlapping() -> bytes:
    """Two directory entries that share one local header: the way of a ZIP bomb without recursion."""
    second = PLAIN.index(CENTRAL, central(1))
    return patched(second + PLACE, "<I", 0)


def flags(value: int, data: bytes = PLAIN) -> bytes:
    """In both headers of the first entry."""
    return patched(6, "<H", value, data=patched(central(FLAGS), "<H", value, data=data))


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty; was it copied whole"),
    "text": (b"hello" * 100, "it is no ZIP archive"),
    "one byte": (b"P", "it is no ZIP archive"),
    "cut": (PLAIN[:-40], "a ZIP archive that is cut off"),
    "cut in the end": (PLAIN[:-1], "end is cut off"),
    "trailing": (PLAIN + b"x" * 7, "7 bytes follow the end of the archive"),
    "trailing archive": (PLAIN + PLAIN, "directory does not lie right before the end"),
    "prepended": (b"#!/bin/sh\n" + PLAIN, "directory does not lie right before the end"),
    "bomb": (archive_of({"model/a": bytes(10_000_000)}, zipfile.ZIP_DEFLATED), r"entry model/a is compressed \(method 8\)"),
    "claims to be stored": (patched(central(SIZE), "<I", 6), "entry model/a has two different sizes"),
    "too large": (patched(central(SIZE - 4), "<2I", 10**6, 10**6), "has another name, size or kind in its own header"),
    "too large, twice": (
        patched(18, "<2I", 10**6, 10**6, data=patched(central(SIZE - 4), "<2I", 10**6, 10**6)),
        "entry model/a claims 1000000 bytes, more than the file has there",
    ),
    "encrypted": (flags(1), "entry model/a is encrypted"),
    "odd flags": (flags(64), "entry model/a has flags 0x40"),
    "version": (patched(central(VERSION), "<H", 63), "entry model/a is of ZIP version 63"),
    "local name": (PLAIN.replace(b"model/a", b"model/z", 1), "entry model/a has another name"),
    "local name length": (patched(26, "<H", 9), "entry model/a has another name"),
    "local method": (patched(8, "<H", 8), "entry model/a has another name, size or kind"),
    "local checksum": (patched(14, "<I", 1), "entry model/a has another name, size or kind"),
    "local flags": (patched(6, "<H", 0x800), "entry model/a has another name, size or kind"),
    "no local header": (patched(0, "<I", 0), "entry model/a has another name, size or kind"),
    "later checksum": (flags(8), "entry model/a has another name, size or kind"),
    "link": (patched(central(ATTRIBUTES), "<I", 0o120777 << 16), "entry model/a is a link or another special file"),
    "folder": (archive_of({"model/": b""}), "entry name 'model/' is not that of a file"),
    "directory bit": (patched(central(ATTRIBUTES), "<I", 0x10), "entry model/a is a link or another special file"),
    "overlap": (overlapping(), "entry model/b overlaps the one before"),
    "gap": (patched(central(PLACE), "<I", 3), "entry model/a leaves a gap before it"),
    "hidden entry": (PLAIN[: central(0)] + b"hidden" + PLAIN[central(0) :], "directory does not lie right before the end"),
    "hidden entry, known": (
        patched(end(16) + 6, "<I", central(0) + 6, data=PLAIN[: central(0)] + b"hidden" + PLAIN[central(0) :]),
        "6 bytes between the last entry and the directory belong to no entry",
    ),
    "central comment": (patched(central(COMMENT), "<H", 3), "an extra field, a comment or a disk number"),
    "central extra": (patched(central(EXTRA), "<H", 4), "an extra field, a comment or a disk number"),
    "disk": (patched(central(DISK), "<H", 1), "an extra field, a comment or a disk number"),
    "end disk": (patched(end(4), "<H", 1), "a comment or names more than one disk"),
    "fewer on this disk": (patched(end(8), "<H", 2), "a comment or names more than one disk"),
    "comment": (patched(end(20), "<H", 3) + b"abc", "3 bytes follow the end of the archive"),
    "one entry less": (patched(end(8), "<2H", 2, 2), "bytes after its last entry"),
    "one entry more": (patched(end(8), "<2H", 4, 4), "directory is cut off"),
    "many entries": (patched(end(8), "<2H", 65534, 65534), "claims 65534 entries .* more than a packed file has"),
    "ZIP64": (patched(end(8), "<2H", 65535, 65535), "directory is a ZIP64 one"),
    "no directory": (patched(end(16), "<I", 0), "directory does not lie right before the end"),
    "huge directory": (patched(end(12), "<I", 2**31), "directory claims 3 entries in 2147483648 bytes"),
    "twice": (named("model/a", "model/a"), "entry model/a twice is in the archive"),
    "case": (named("model/a", "model/A"), "entry model/A and model/a, one name where case does not count"),
    "file and folder": (named("model", "model/a"), "entry model is also the folder of model/a"),
    "absolute": (named("/etc/passwd"), "entry name '/etc/passwd' is not that of a file below one folder"),
    "up": (named("model/../../x"), r"entry name 'model/\.\./\.\./x' is not"),
    "here": (named("./x"), r"entry name '\./x' is not"),
    "drive": (named("C:x"), "entry name 'C:x' is not"),
    "backslash": (named("model\\x"), "entry name .* is not"),
    "nul": (named("model/a\0.so"), "entry name .* is not"),
    "newline": (named("model/a\nb"), "entry name .* is not"),
    "double slash": (named("model//x"), "entry name 'model//x' is not"),
    "blank end": (named("model/x "), "entry name 'model/x ' is not"),
    "long name": (named("m" * 1001), "directory claims 1 entries in 1047 bytes"),
    "other bytes": (named("model/é"), "is not plain text"),
    "two spellings": (archive_of({"model/e\u0301": b""}), "is not that of a file below one folder"),
    "one letter two ways": (archive_of({"model/ß": b"", "model/ss": b""}), "one name where case does not count"),
    "no name": (archive_of({"": b""}), "entry name '' is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_two_readers_could_take_differently_is_refused(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    path = tmp_path / "file.pte"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"file\\.pte.*{message}") as error:
        open_archive(path).__exit__(None, None, None)
    assert "copied whole" in str(error.value) or "copy or pack it again" in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.pte"):
        with pytest.raises(InputError, match="no such file"):
            open_archive(path)


def test_damaged_contents_are_noticed_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    path.write_bytes(PLAIN.replace(b"second", b"sec0nd"))
    with open_archive(path) as archive:
        assert archive.read("model/a") == b"first"
        with pytest.raises(InputError, match=r"file\.pte: entry model/b does not have its checksum"):
            archive.read("model/b")
        with pytest.raises(InputError, match=r"file\.pte has no model/x"):
            archive.read("model/x")
        with pytest.raises(InputError, match="entry model/a has 5 bytes, more than the 4"):
            archive.read("model/a", 4)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    path.write_bytes(archive_of({"model/a": b"first", "model/b": bytes(100_000)}))
    with open_archive(path) as archive:
        path.write_bytes(PLAIN[:40])
        with pytest.raises(InputError, match="entry model/b ends early"):
            archive.read("model/b")


def test_plain_archives_are_read_as_zipfile_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    entries = {"model/a": b"first", "frozen model é/extra/model.json": b"{}", "extra/x.json": bytes(3_000_000), "b": b""}
    path.write_bytes(archive_of(entries))
    with open_archive(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == entries
    assert read_entry(path, "b") == b""
    path.write_bytes(archive_of({}))
    with open_archive(path) as archive:
        assert archive.namelist() == []


def test_what_torch_writes_is_read(dpa1_pte: Path, tmp_path: Path) -> None:
    """With its data descriptors, padding, dates of month 0, and the ZIP64 end of files that nothing was added to."""
    import torch

    path = tmp_path / "own.pt2"
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    torch.export.save(program, path, extra_files={"model.json": "{}"})
    assert b"PK\x06\x06" in path.read_bytes()
    for one in (path, dpa1_pte):
        with zipfile.ZipFile(one) as expected, open_archive(one) as archive:
            assert archive.namelist() == expected.namelist()
            assert all(archive.read(name) == expected.read(name) for name in archive.namelist())
    whole = path.read_bytes()
    for change, message in (
        ({whole.rindex(b"PK\x06\x06") + 24: 1}, "ZIP64 end differs"),
        ({whole.rindex(b"PK\x06\x07") + 8: 1}, "ZIP64 end differs"),
        ({whole.index(b"ZZZ"): 0}, "has an extra field that is no padding"),
        ({whole.index(b"PK\x07\x08") + 4: whole[whole.index(b"PK\x07\x08") + 4] ^ 1}, "followed by another size or checksum"),
    ):
        damaged = bytearray(whole)
        for place, value in change.items():
            damaged[place] = value
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            open_archive(path)


def test_rewrite_changes_what_it_is_told_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    path.write_bytes(PLAIN)
    path.chmod(0o640)
    rewrite(path, {"model/b": b"other", "model/a": None, "model/d": b"new", "model/e": None})
    with open_archive(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "model/b": b"other",
            "model/c": b"",
            "model/d": b"new",
        }
    assert path.stat().st_mode & 0o777 == 0o640
    first = path.read_bytes()
    time.sleep(2.1 - time.time() % 2)  # ZIP counts in steps of two seconds
    rewrite(path, {})
    assert path.read_bytes() == first
    assert [one.name for one in tmp_path.iterdir()] == ["file.pte"]


def test_a_rewrite_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    damaged = PLAIN.replace(b"second", b"sec0nd")
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="does not have its checksum"):
        rewrite(path, {"model/a": b"x"})
    assert path.read_bytes() == damaged
    assert [one.name for one in tmp_path.iterdir()] == ["file.pte"]


def sparse(path: Path) -> None:
    """A terabyte that takes no room."""
    with path.open("wb") as stream:
        stream.truncate(2**40)


def many(path: Path) -> None:
    path.write_bytes(archive_of({f"model/{i}": b"" for i in range(MAX_ENTRIES + 1)}))


def noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5_000_000))


def signatures(path: Path) -> None:
    """Every header that there is, over and over."""
    path.write_bytes((CENTRAL + LOCAL + END + b"PK\x06\x06PK\x06\x07PK\x07\x08") * 200_000 + bytes(18))


@pytest.mark.parametrize("make", [sparse, many, noise, signatures])
def test_large_rubbish_is_refused_in_bounded_memory(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"file\.pte"):
            open_archive(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_large_entries_are_read_by_parts(tmp_path: Path) -> None:
    path = tmp_path / "file.pte"
    path.write_bytes(archive_of({"model/a": bytes(30_000_000)}))
    with open_archive(path) as archive:
        tracemalloc.start()
        try:
            assert sum(map(len, archive.chunks("model/a"))) == 30_000_000
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()


def test_names_in_errors_are_plain(tmp_path: Path) -> None:
    """A name of an entry must not reach a terminal as it is."""
    path = tmp_path / "file.pte"
    path.write_bytes(named("model/\x1b[2Jx"))
    with pytest.raises(InputError) as error:
        open_archive(path)
    assert "\x1b" not in str(error.value)
    assert json.dumps(str(error.value))
