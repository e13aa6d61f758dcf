"""Source dicts in files: carryall's and DeePMD's `.json`, DeePMD's `.yaml` and `.dp` (HDF5), and those in packed files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from carryall.errors import InputError
from carryall.package.arrays import from_json, to_json
from carryall.package.manifest import MODEL, read_entry, verify

SOURCE_SUFFIXES = (".json", ".json.gz", ".yaml", ".yml", ".dp")


def is_source(path: Path) -> bool:
    """Whether the name is one of a source file."""
    return path.name.endswith(SOURCE_SUFFIXES)


def read_source(path: str | Path) -> dict[str, Any]:
    """The `model` part of a source file, or of the source inside a `.pt2` or `.pte`, with its arrays as numpy arrays."""
    root = read_root(path)
    return root.get("model", root)


def read_root(path: str | Path) -> dict[str, Any]:
    """All of a source file: what wrote it (`software`), and the `model`; some of DeePMD's are the model alone."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.suffix in (".pt2", ".pte"):
        verify(path)
        root = _parse(path, read_entry(path, MODEL))
    elif path.suffix == ".dp":
        root = _read_dp(path)
    elif path.suffix in (".yaml", ".yml"):
        root = _read_yaml(path)
    else:
        root = _parse(path, _text(path))
    if not isinstance(root, dict) or not isinstance(root.get("model", root), dict):
        raise InputError(f"{path} holds no model dict")
    return root


def write_source(path: str | Path, root: dict[str, Any]) -> Path:
    """Write a root dict (`software`, `version`, `model`) as `.json` or `.json.gz`."""
    path = Path(path)
    data = to_json(root).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, 9, mtime=0)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
    return path


def _parse(path: Path, text: str | bytes) -> Any:
    try:
        return from_json(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _text(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _read_dp(path: Path) -> Any:
    """HDF5: the tree is JSON in the attribute `json`; an array stands there as the path of its data set, `/variable_0000`."""
    try:
        with h5py.File(path) as file:
            tree = json.loads(file.attrs["json"])
            return _fill(tree, {f"/{name}": np.array(data) for name, data in file.items()})
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a DeePMD model file (HDF5 with an attribute 'json'): {error}") from None


def _fill(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(tree, dict):
        return {key: _fill(value, arrays) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_fill(value, arrays) for value in tree]
    return arrays.get(tree, tree) if isinstance(tree, str) else tree


def _read_yaml(path: Path) -> Any:
    try:
        tree = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return _parse(path, json.dumps(tree))
