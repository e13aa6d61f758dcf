"""Nested dicts with arrays to JSON and back, bit by bit; DeePMD's list form is read too."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from carryall.errors import InputError

ARRAY = "np.ndarray"
DTYPES = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def to_json(tree: Any) -> str:
    """JSON of a tree of dicts, lists, scalars and numpy arrays (as base64 of their little-endian bytes, dtype and shape)."""
    return json.dumps(_encode(tree), separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The inverse of `to_json`."""
    try:
        return _decode(json.loads(text))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.name not in DTYPES:
            raise InputError(
                f"array of dtype {value.dtype.name!r} cannot be written: expected one of {', '.join(sorted(DTYPES))}"
            )
        little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        data = base64.b64encode(little.tobytes()).decode("ascii")
        return {"@class": ARRAY, "dtype": value.dtype.name, "shape": list(value.shape), "base64": data}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _encode(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(one) for one in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return _array(value) if value.get("@class") == ARRAY else {key: _decode(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_decode(one) for one in value]
    return value


def _array(entry: dict[str, Any]) -> np.ndarray:
    name = entry.get("dtype")
    if name not in DTYPES:
        raise InputError(f"array of dtype {name!r} in the model dict: expected one of {', '.join(sorted(DTYPES))}")
    dtype = np.dtype(name).newbyteorder("<")
    try:
        if "base64" in entry:
            flat = np.frombuffer(base64.b64decode(entry["base64"], validate=True), dtype=dtype)
            return flat.reshape(entry["shape"]).astype(np.dtype(name))
        return np.array(entry["value"], dtype=np.dtype(name))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"damaged array in the model dict: {error}") from None
