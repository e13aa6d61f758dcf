"""What is in a file, without running anything from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carryall.errors import InputError
from carryall.package.manifest import MODEL, SCRIPT, entries_of, open_archive, read_json, verify
from carryall.package.sources import is_source, read_source


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts of a packed file (metadata, entries with hashes and sizes, training configuration) or of a source dict."""
    path = Path(path)
    if path.suffix in (".pt2", ".pte"):
        metadata = verify(path)
        with open_archive(path) as archive:
            entries = {name: vars(entry) for name, entry in sorted(entries_of(archive).items())}
        return {
            "path": str(path),
            "bytes": path.stat().st_size,
            "metadata": metadata,
            "training": read_json(path, SCRIPT),
            "source_bytes": entries[MODEL]["size"],
            "entries": entries,
        }
    if is_source(path):
        model = read_source(path)
        return {"path": str(path), "bytes": path.stat().st_size, "metadata": {"kind": "source", **_scalars(model)}}
    raise InputError(f"{path}: cannot inspect a {path.suffix or 'nameless'} file: expected .pt2, .pte or a source dict")


def _scalars(model: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in model.items() if isinstance(value, str | int | float | list)}
    descriptor = model.get("descriptor", {})
    return kept | {
        f"descriptor.{key}": value for key, value in descriptor.items() if isinstance(value, str | int | float | list)
    }
