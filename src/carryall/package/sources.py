"""Source dicts in files: carryall's and DeePMD's `.json`, DeePMD's `.yaml` and `.dp` (HDF5), and those in packed files.

Nothing of a file is ever run to read its source, whoever packed it: a packed file is an archive with a JSON entry.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carryall.errors import InputError
from carryall.package.archive import open_archive
from carryall.package.arrays import as_list, from_json, to_json
from carryall.package.hdf5_source import read_dp, write_dp
from carryall.package.manifest import EXTRA, MODEL, SCRIPT, is_packed, open_packed, parse_json
from carryall.package.yaml_source import read_yaml, write_yaml

SOURCE_SUFFIXES = (".json", ".json.gz", ".yaml", ".yml", ".dp")
PACKED_SUFFIXES = (".pt2", ".pte")
OWN_SOURCE = EXTRA + "source.json"
"""The source in a file packed for deepmd-kit of a model that it has no dict for: model.json is empty there."""
BESIDE = {"neighbor_graph_method": "standard", "neighbor_margin": "spin_ener"}
"""Fields that deepmd-kit does not know, and the type of the dict that they belong into."""
ALWAYS, FACTOR, MOST = 1 << 26, 200, 1 << 32  # bytes of a .json.gz, unpacked: so many, or so many times the file's, never more


def is_source(path: Path) -> bool:
    """Whether the name is one of a source file."""
    return path.name.endswith(SOURCE_SUFFIXES)


def read_source(path: str | Path) -> dict[str, Any]:
    """The `model` part of a source file, or of the source inside a `.pt2` or `.pte`, with its arrays as numpy arrays."""
    root = read_root(path)
    return root.get("model", root)


def read_root(path: str | Path) -> dict[str, Any]:
    """All of a source file: what wrote it (`software`), and the `model`; some of DeePMD's are the model alone.

    Of a `.pt2` or `.pte`, ours or DeePMD's, the source inside it, with its training configuration as `model_def_script`.
    What stands beside the model only so that DeePMD's own readers do not trip over it is put into the model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    root = _read(path)
    if not isinstance(root, dict) or not isinstance(root.get("model", root), dict):
        raise InputError(f"{path} holds no model dict")
    _refuse_numberless(root, path)
    for name, kind in BESIDE.items() if "model" in root else ():
        if name in root:
            put_into(root["model"], kind, name, root.pop(name))
    return root


def write_source(path: str | Path, root: dict[str, Any], *, digits: bool = False) -> Path:
    """Write a root dict (`software`, `version`, `model`) as `.json`, `.json.gz`, `.dp`, `.yaml` or `.yml`; returns the path.

    The same root makes the same bytes. Arrays are base64 in `.json` (`digits`: decimal numbers in lists, as deepmd-kit has
    them in its packed files), data sets in `.dp`, lists in `.yaml`. The file gets its name when it is whole.
    """
    path = Path(path)
    write = _writer(path, digits)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part, root)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def put_into(model: dict[str, Any], kind: str, name: str, value: Any) -> None:
    """Set `name` in each dict of that type in a model dict that does not have it."""
    if model.get("type") == kind:
        model.setdefault(name, value)
    for part in model_parts(model):
        put_into(part, kind, name, value)


def model_parts(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The model dicts right inside a model dict."""
    listed = model.get("models")
    found = [*(listed if isinstance(listed, list) else []), model.get("backbone_model")]
    return [part for part in found if isinstance(part, dict)]


def _read(path: Path) -> Any:
    if path.suffix in PACKED_SUFFIXES:
        return _of_ours(path) if is_packed(path) else _of_deepmd(path)
    if path.suffix == ".dp":
        return read_dp(path)
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path)
    return _parse(str(path), _text(path))


def _of_ours(path: Path) -> Any:
    with open_packed(path) as packed:
        name = MODEL if packed.read(MODEL) else OWN_SOURCE
        return with_script(_parse(f"{path}: {name}", packed.read(name)), packed.json(SCRIPT))


def _of_deepmd(path: Path) -> Any:
    """DeePMD puts the entries below a folder named after the file it was written to first, or after `model`."""
    with open_archive(path) as archive:
        found = [name for name in archive.records if name == "extra/model.json" or name.endswith("/extra/model.json")]
        if len(found) != 1:
            many = f"holds {len(found)} models" if found else "carries no source (no extra/model.json)"
            raise InputError(
                f"{path} is not carryall's, and {many}: only the program that wrote it can use it; "
                "convert what it was made from, such as a .dp file"
            )
        script = found[0].removesuffix("model.json") + "model_def_script.json"
        config = parse_json(archive.read(script), f"{path}: {script}") if script in archive.records else {}
        return with_script(_parse(f"{path}: {found[0]}", archive.read(found[0])), config)


def with_script(root: Any, script: Any) -> Any:
    """The root with the training configuration that lay beside it."""
    return {**root, "model_def_script": script} if isinstance(root, dict) and "model" in root else root


def _parse(where: str, text: bytes) -> Any:
    try:
        return from_json(text, finite=False)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _refuse_numberless(value: Any, path: Path) -> None:
    """Arrays may hold NaN; other values of a model are numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path} has {value} outside of an array, where a number is expected")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_numberless(one, path)


def _text(path: Path) -> bytes:
    data = path.read_bytes()
    if not path.name.endswith(".gz"):
        return data
    room = min(max(ALWAYS, FACTOR * len(data)), MOST)
    unpack = zlib.decompressobj(wbits=31)
    try:
        text = unpack.decompress(data, room)
    except zlib.error as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if unpack.unconsumed_tail:
        raise InputError(f"{path} unpacks to more than {room} bytes, far more than a model of its size: it is damaged")
    if not unpack.eof or unpack.unused_data:
        raise InputError(f"{path} cannot be read: it {'has data after its end' if unpack.eof else 'is cut off'}; copy it again")
    return text


def _writer(path: Path, digits: bool) -> Callable[[Path, dict[str, Any]], None]:
    if path.suffix == ".dp":
        return write_dp
    if path.suffix in (".yaml", ".yml"):
        return write_yaml
    if not path.name.endswith((".json", ".json.gz")):
        raise InputError(f"{path}: the suffix says what to write: expected one of {', '.join(SOURCE_SUFFIXES)}")

    def write_json(part: Path, root: dict[str, Any]) -> None:
        data = to_json(root, as_list if digits else None).encode()
        part.write_bytes(gzip.compress(data, 9, mtime=0) if path.name.endswith(".gz") else data)

    return write_json
