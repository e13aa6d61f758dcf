"""The facts inside a packed file, and how to read them without running anything from it.

Layout (a ZIP archive; what torch wrote keeps torch's own layout):

    model/...                        the compiled graph (.pt2) or the exported program (.pte)
    model/extra/metadata.json        flat facts: cutoff, type map, inputs, outputs, dtype, units, versions
    model/extra/model.json           the source model: nested dict, arrays as base64 with dtype and shape
    model/extra/model_def_script.json  training configuration
    model/extra/manifest.json        SHA-256 and size of every other entry
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryall.errors import InputError

FORMAT_VERSION = 1
EXTRA = "model/extra/"
METADATA, MODEL, SCRIPT, MANIFEST = (
    EXTRA + name for name in ("metadata.json", "model.json", "model_def_script.json", "manifest.json")
)
MAX_JSON_BYTES = 1 << 30
# what zipfile and json raise on damaged input (RuntimeError: an entry that claims to be encrypted or of a later format)
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OSError, EOFError, json.JSONDecodeError, UnicodeDecodeError,
    LookupError, TypeError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One entry of the archive."""

    sha256: str
    size: int


def entries_of(archive: zipfile.ZipFile) -> dict[str, Entry]:
    """Hash and size of every entry except the manifest."""
    found = {}
    for info in archive.infolist():
        if info.filename != MANIFEST and not info.is_dir():
            digest = hashlib.sha256()
            with archive.open(info) as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            found[info.filename] = Entry(digest.hexdigest(), info.file_size)
    return found


def append_facts(path: Path, metadata: dict[str, Any], model_json: str, script: dict[str, Any]) -> None:
    """Add our four entries to an archive that torch wrote."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(METADATA, json.dumps(metadata, indent=1))
        archive.writestr(MODEL, model_json)
        archive.writestr(SCRIPT, json.dumps(script))
    with zipfile.ZipFile(path) as archive:
        entries = {name: vars(entry) for name, entry in sorted(entries_of(archive).items())}
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(MANIFEST, json.dumps({"format_version": FORMAT_VERSION, "entries": entries}, indent=1))


def read_json(path: Path, name: str) -> Any:
    """One JSON entry of a packed file; InputError when the file is not one of ours."""
    return json.loads(read_entry(path, name))


def read_entry(path: Path, name: str) -> bytes:
    """One entry of a packed file as bytes."""
    with open_archive(path) as archive:
        try:
            info = archive.getinfo(name)
        except KeyError:
            raise InputError(f"{path} has no {name}: it was not written by carryall, or not copied whole") from None
        if info.file_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: entry {name} claims {info.file_size} bytes, more than a packed file may hold")
        return archive.read(info)


def open_archive(path: Path) -> zipfile.ZipFile:
    """The ZIP archive at `path`; InputError when there is none or it is damaged."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"{path} is not a packed potential (a ZIP archive is expected: {error}); was it copied whole?"
        ) from None


def verify(path: Path) -> dict[str, Any]:
    """Check every entry against the manifest and return the metadata; InputError names what differs."""
    try:
        manifest = read_json(path, MANIFEST)
        if manifest["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {manifest['format_version']}, newer than {FORMAT_VERSION}: update carryall"
            )
        with open_archive(path) as archive:
            found = {name: vars(entry) for name, entry in entries_of(archive).items()}
        for name in sorted(set(found) | set(manifest["entries"])):
            if found.get(name) != manifest["entries"].get(name):
                raise InputError(
                    f"{path}: entry {name} does not match the manifest; the file is damaged or was changed: pack it again"
                )
        metadata = read_json(path, METADATA)
    except DAMAGE as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): copy or pack it again") from None
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: {METADATA} does not hold an object")
    return metadata
