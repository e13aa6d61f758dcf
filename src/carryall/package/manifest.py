"""The facts inside a packed file, and how to read them without running anything from it.

Layout (a ZIP archive of stored entries; what torch wrote keeps torch's own names):

    model/...                          the compiled graph (.pt2) or the exported program (.pte)
    model/extra/metadata.json          flat facts: cutoff, type map, inputs, outputs, dtype, units, versions
    model/extra/model.json             the source model: nested dict, arrays as base64 with dtype and shape
    model/extra/model_def_script.json  training configuration
    model/extra/manifest.json          SHA-256 and size of every other entry but the signature
    model/extra/signature.json         optional: signatures of the manifest (package/signing.py)

A file is read through one open handle, and what is returned is what was hashed: whoever exchanges the file between check and
use is noticed. What cannot be read by handle (torch's loader of native code wants a name) gets a private copy, written from
hashed bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from carryall.errors import InputError
from carryall.package.archive import AGAIN, Archive, open_archive, read_entry, rewrite, write_archive

__all__ = [
    "EXTRA", "FORMAT_VERSION", "MANIFEST", "METADATA", "MODEL", "SCRIPT", "SIGNATURE", "Entry", "Packed", "append_facts",
    "as_packed", "entries_of", "is_packed", "open_archive", "open_packed", "parse_json", "read_entry", "read_json", "seal",
    "verified_copy", "verify",
]  # fmt: skip

FORMAT_VERSION = 2
EXTRA = "model/extra/"
METADATA, MODEL, SCRIPT, MANIFEST, SIGNATURE = (
    EXTRA + name for name in ("metadata.json", "model.json", "model_def_script.json", "manifest.json", "signature.json")
)
UNLISTED = (MANIFEST, SIGNATURE)
MAX_JSON_BYTES = 1 << 22
"""Of metadata, training configuration, manifest and signature; a parsed entry takes some thirty times its size."""
COMPILED_PARTS = re.compile(
    r"model/(data/aotinductor/.+|archive_format|archive_version|byteorder|\.data/(version|serialization_id))"
)
"""What torch's loader of compiled code needs of a file."""


@dataclass(frozen=True)
class Entry:
    """One entry of the archive."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Packed:
    """An open packed file, whose entries have the names and sizes that its manifest lists."""

    archive: Archive
    manifest: bytes
    entries: dict[str, Entry]

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.archive.path

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of one entry, whose hash is the manifest's; InputError otherwise, or when there are more than `limit`."""
        if name not in self.entries:
            self.archive.record(name)
            raise InputError(f"{self.path}: entry {name} is not in the manifest")
        data = self.archive.read(name) if limit is None else self.archive.read(name, limit)
        self._check(name, hashlib.sha256(data).hexdigest())
        return data

    def json(self, name: str) -> Any:
        """One small JSON entry."""
        return parse_json(self.read(name, MAX_JSON_BYTES), f"{self.path}: entry {name}")

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one entry, part by part; InputError at the end when their hash is not the manifest's."""
        digest = hashlib.sha256()
        for part in self.archive.chunks(name):
            digest.update(part)
            yield part
        self._check(name, digest.hexdigest())

    def check(self) -> dict[str, Any]:
        """Hash every entry and return the metadata; InputError names the entry that differs."""
        for name in self.entries:
            for _ in self.chunks(name):
                pass
        metadata = self.json(METADATA)
        if not isinstance(metadata, dict):
            raise InputError(f"{self.path}: {METADATA} does not hold an object")
        return metadata

    def _check(self, name: str, digest: str) -> None:
        if digest != self.entries[name].sha256:
            raise _differs(self.path, name)


@contextlib.contextmanager
def open_packed(path: str | Path) -> Iterator[Packed]:
    """A packed file, opened; InputError when it is none, is of a newer format, or has other entries than its manifest lists."""
    with open_archive(path) as archive:
        manifest = archive.read(MANIFEST, MAX_JSON_BYTES)
        entries = _listed(archive.path, parse_json(manifest, f"{path}: entry {MANIFEST}"))
        found = {name: record.size for name, record in archive.records.items() if name not in UNLISTED}
        for name in sorted(found.keys() | entries.keys()):
            if name not in found or name not in entries or found[name] != entries[name].size:
                raise _differs(archive.path, name)
        yield Packed(archive, manifest, entries)


@contextlib.contextmanager
def as_packed(source: str | Path | Packed) -> Iterator[Packed]:
    """What is open already stays open; a path is opened and closed."""
    if isinstance(source, Packed):
        yield source
    else:
        with open_packed(source) as packed:
            yield packed


def verify(path: str | Path) -> dict[str, Any]:
    """Check every entry against the manifest and return the metadata; InputError names what differs."""
    with open_packed(path) as packed:
        return packed.check()


@contextlib.contextmanager
def verified_copy(source: str | Path | Packed, folder: Path) -> Iterator[Path]:
    """What torch needs of a compiled file, written to `folder` (private to this process) while it is hashed, then deleted.

    Torch opens a `.pt2` by name and maps native code from it: this copy is what was verified, whatever happens to the file.
    """
    with as_packed(source) as packed:
        needed = [name for name in packed.entries if not name.startswith(EXTRA)]
        for name in needed:
            if not COMPILED_PARTS.fullmatch(name):
                raise InputError(f"{packed.path}: entry {name} has no place in a compiled file; it was not written by carryall")
        copy = folder / "model.pt2"
        try:
            write_archive(copy, ((name, packed.chunks(name)) for name in needed))
            yield copy
        finally:
            copy.unlink(missing_ok=True)


def is_packed(path: str | Path) -> bool:
    """Whether the archive at `path` is one of ours: it has a manifest; InputError when it is no archive that can be read."""
    with open_archive(path) as archive:
        return MANIFEST in archive.records


def append_facts(path: Path, metadata: dict[str, Any], model_json: str, script: dict[str, Any]) -> None:
    """Add our four entries to an archive that torch wrote; the file is replaced in one step, and dates in it are fixed."""
    facts = {
        METADATA: json.dumps(metadata, indent=1, allow_nan=False).encode(),
        MODEL: model_json.encode(),
        SCRIPT: json.dumps(_spelled(script), allow_nan=False).encode(),
    }
    _rewrite_sealed(path, facts)


def seal(path: Path) -> None:
    """Write the manifest anew, for entries that were changed on purpose; signatures of the old one are left out."""
    _rewrite_sealed(path, {})


def _rewrite_sealed(path: Path, changes: dict[str, bytes]) -> None:
    with open_archive(path) as archive:
        entries = entries_of(archive)
    entries |= {name: Entry(hashlib.sha256(data).hexdigest(), len(data)) for name, data in changes.items()}
    listed = {name: vars(entry) for name, entry in sorted(entries.items())}
    manifest = json.dumps({"format_version": FORMAT_VERSION, "entries": listed}, indent=1).encode()
    rewrite(path, {SIGNATURE: None, **changes, MANIFEST: manifest})


def entries_of(archive: Archive) -> dict[str, Entry]:
    """Hash and size of every entry that a manifest lists."""
    found = {}
    for name, record in archive.records.items():
        if name not in UNLISTED:
            digest = hashlib.sha256()
            for part in archive.chunks(name):
                digest.update(part)
            found[name] = Entry(digest.hexdigest(), record.size)
    return found


def read_json(path: str | Path, name: str) -> Any:
    """One small JSON entry of an archive, ours or another's."""
    return parse_json(read_entry(path, name, MAX_JSON_BYTES), f"{path}: entry {name}")


def parse_json(data: bytes | str, where: str) -> Any:
    """JSON of which all readers see the same: no key twice, no NaN, no numbers beyond a double; InputError says `where`."""
    try:
        return json.loads(data, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_object)
    except RecursionError:
        raise InputError(f"{where} is nested too deep to be read; {AGAIN}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not valid JSON ({error}); {AGAIN}") from None


def _spelled(value: Any) -> Any:
    """A tree of a YAML file, with what JSON has no number for as a string."""
    if isinstance(value, dict):
        return {str(key): _spelled(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:30]} is beyond a double")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _listed(path: Path, manifest: Any) -> dict[str, Entry]:
    """The entries of a manifest of a format that this version reads."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise InputError(f"{path}: {MANIFEST} has no format version; {AGAIN}")
    if version > FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, newer than {FORMAT_VERSION}: update carryall")
    entries = manifest.get("entries")
    if not isinstance(entries, dict):
        raise InputError(f"{path}: {MANIFEST} lists no entries; {AGAIN}")
    for name, entry in entries.items():
        plain = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
        if not plain:
            raise InputError(f"{path}: {MANIFEST} has no hash and size of {name[:100]!r}; {AGAIN}")
    return {name: Entry(entry["sha256"], entry["size"]) for name, entry in entries.items()}


def _differs(path: Path, name: str) -> InputError:
    return InputError(f"{path}: entry {name} does not match the manifest; the file is damaged or was changed: pack it again")
