"""What is in a file, without running anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carryall.errors import InputError
from carryall.package.manifest import MODEL, SCRIPT, SIGNATURE, entries_of, is_packed, open_archive, open_packed, read_json
from carryall.package.metadata import read_metadata
from carryall.package.sources import is_source, read_source


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts of a packed file (metadata, entries with hashes and sizes, training configuration, signatures) or a source dict.

    Of a file that is not ours, such as DeePMD's, what it says about itself; nothing there vouches for it.
    """
    path = Path(path)
    if path.suffix in (".pt2", ".pte"):
        facts = _packed(path) if is_packed(path) else _foreign(path)
    elif is_source(path):
        facts = {"metadata": {"kind": "source", **_scalars(read_source(path))}}
    else:
        raise InputError(f"{path}: cannot inspect a {path.suffix or 'nameless'} file: expected .pt2, .pte or a source dict")
    return {"path": str(path), "bytes": path.stat().st_size, **facts}


def _packed(path: Path) -> dict[str, Any]:
    with open_packed(path) as packed:
        values = packed.check()
        read_metadata(path, values)
        return {
            "metadata": values,
            "training": packed.json(SCRIPT),
            "source_bytes": packed.entries[MODEL].size,
            "signed": SIGNATURE in packed.archive.records,
            "entries": {name: vars(entry) for name, entry in sorted(packed.entries.items())},
        }


def _foreign(path: Path) -> dict[str, Any]:
    with open_archive(path) as archive:
        entries = {name: vars(entry) for name, entry in sorted(entries_of(archive).items())}
    found = [name for name in entries if name.endswith("extra/metadata.json")]
    if len(found) != 1:
        raise InputError(
            f"{path} has no manifest and no metadata.json: it is neither carryall's nor DeePMD's, or not copied whole"
        )
    return {"metadata": read_json(path, found[0]), "training": {}, "foreign": True, "entries": entries}


def _scalars(model: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in model.items() if isinstance(value, str | int | float | list)}
    descriptor = model.get("descriptor", {})
    return kept | {
        f"descriptor.{key}": value for key, value in descriptor.items() if isinstance(value, str | int | float | list)
    }
