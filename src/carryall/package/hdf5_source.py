"""DeePMD's `.dp`: HDF5 whose attribute `json` is the tree, in which an array stands as the path of its data set.

Only data sets of the file's own root are read, of the types that models have, and only as much as the file can hold: HDF5 can
point at other files, and can claim arrays of any size that take no room in the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from carryall.errors import InputError
from carryall.package.arrays import DTYPES, encode

VARIABLE = re.compile(r"/variable_\d{4,}")
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
ALWAYS, FACTOR, MOST = 1 << 26, 200, 1 << 32  # bytes of all arrays: so many, or so many times the file's, but never more


def read_dp(path: Path) -> Any:
    """The tree of a `.dp` file; InputError says what is wrong with it."""
    size = path.stat().st_size
    try:
        with h5py.File(path, "r") as file:
            attribute = file.attrs.get_id("json")
            # looked at before it is read: a damaged one may claim to be many
            text = file.attrs["json"] if attribute.shape == () and attribute.dtype.kind in "OSU" else None
            if not isinstance(text, str | bytes):
                raise InputError(f"{path}: the attribute 'json' is no text")
            tree = json.loads(text)
            return _filled(tree, _Arrays(path, file, min(max(ALWAYS, FACTOR * size), MOST)))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise InputError(f"{path} is not a DeePMD model file (HDF5 with an attribute 'json'): {error}") from None


def write_dp(path: Path, tree: Any) -> None:
    """Write a tree to a `.dp` file, the same bytes each time."""
    arrays: list[np.ndarray] = []

    def keep(value: np.ndarray) -> str:
        arrays.append(value)
        return f"/variable_{len(arrays) - 1:04d}"

    _refuse_names(tree)
    try:
        text = json.dumps(encode(tree, keep), separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the tree cannot be written as JSON: {error}") from None
    with h5py.File(path, "w") as file:
        for index, value in enumerate(arrays):
            file.create_dataset(f"variable_{index:04d}", data=value, track_times=False)
        file.attrs["json"] = text


class _Arrays:
    """The data sets of a file by name, each read once, and `room` bytes in all."""

    def __init__(self, path: Path, file: h5py.File, room: int) -> None:
        self.path, self.file, self.room = path, file, room
        self.read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.read:
            self.read[name] = self._checked(name)
        return self.read[name]

    def _checked(self, name: str) -> np.ndarray:
        link = self.file.get(name[1:], getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{self.path}: {name} {'leads elsewhere' if link else 'is missing'}; a model's arrays are its own")
        data = self.file[name]
        if not isinstance(data, h5py.Dataset) or data.shape is None or data.dtype.name not in DTYPES:
            raise InputError(f"{self.path}: {name} is no array of numbers ({getattr(data, 'dtype', type(data).__name__)})")
        if data.external is not None or data.is_virtual:
            raise InputError(f"{self.path}: {name} has its numbers in another file; a model's arrays are its own")
        filters = data.id.get_create_plist()
        if unknown := [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]:
            unknown = [one for one in unknown if one not in FILTERS]
        if unknown:
            raise InputError(f"{self.path}: {name} is compressed by the HDF5 filter {unknown[0]}, which models are not")
        self.room -= data.size * data.dtype.itemsize
        if self.room < 0:
            raise InputError(f"{self.path}: {name} claims the shape {data.shape}, far more than the file holds: it is damaged")
        return np.array(data[()], dtype=np.dtype(data.dtype.name))


def _filled(tree: Any, arrays: _Arrays) -> Any:
    if isinstance(tree, dict):
        return {key: _filled(value, arrays) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, arrays) for value in tree]
    return arrays[tree].copy() if isinstance(tree, str) and VARIABLE.fullmatch(tree) else tree


def _refuse_names(tree: Any) -> None:
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        _refuse_names(value)
    if isinstance(tree, str) and VARIABLE.fullmatch(tree):
        raise InputError(f"the text {tree!r} names an array in a .dp file: change it, or write .json")
