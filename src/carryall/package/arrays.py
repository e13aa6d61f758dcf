"""Nested dicts with arrays to JSON and back, bit by bit; DeePMD's list form of arrays is written on request, and read too."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from carryall.errors import InputError

ARRAY = "np.ndarray"
DTYPES = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def to_json(tree: Any, array: Callable[[np.ndarray], Any] | None = None) -> str:
    """JSON of a tree of dicts, lists, scalars and numpy arrays (as base64 of their little-endian bytes, dtype and shape).

    `array` gives them another form. InputError for what JSON has no form of.
    """
    try:
        # arrays in digits may hold NaN, for which Python, deepmd-kit's too, has a word
        return json.dumps(encode(tree, array or as_base64), separators=(",", ":"), allow_nan=array is not None)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the tree cannot be written as JSON: {error}") from None


def from_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The inverse of `to_json`; InputError for other text, and for NaN and infinities outside of arrays where `finite`."""
    try:
        return decode(json.loads(text, parse_constant=_no_number if finite else None))
    except InputError:
        raise
    except RecursionError:
        raise InputError("not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}") from None


def encode(value: Any, array: Callable[[np.ndarray], Any]) -> Any:
    """The tree with `array(...)` in place of its arrays, lists for tuples and Python's scalars for numpy's."""
    if isinstance(value, np.ndarray):
        if value.dtype.name not in DTYPES:
            raise InputError(
                f"array of dtype {value.dtype.name!r} cannot be written: expected one of {', '.join(sorted(DTYPES))}"
            )
        return array(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise InputError(f"a key of the tree is {odd[0]!r}: keys must be strings")
        if value.get("@class") == ARRAY:
            raise InputError(f"a dict of class {ARRAY!r} stands for an array in a file: give the array itself")
        return {key: encode(one, array) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [encode(one, array) for one in value]
    return value


def as_base64(value: np.ndarray) -> dict[str, Any]:
    """An array bit by bit."""
    little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(little.tobytes()).decode("ascii")
    return {"@class": ARRAY, "dtype": value.dtype.name, "shape": list(value.shape), "base64": data}


def as_list(value: np.ndarray) -> dict[str, Any]:
    """An array as deepmd-kit writes it, in digits that give every number back; the shape is ours, for empty arrays."""
    head = {"@class": ARRAY, "@is_variable": True, "@version": 1, "dtype": value.dtype.name, "shape": list(value.shape)}
    return {**head, "value": value.tolist()}


def decode(value: Any) -> Any:
    """The tree with arrays in place of either form of them."""
    if isinstance(value, dict):
        return _array(value) if value.get("@class") == ARRAY else {key: decode(one) for key, one in value.items()}
    if isinstance(value, list):
        return [decode(one) for one in value]
    return value


def _array(entry: dict[str, Any]) -> np.ndarray:
    name = entry.get("dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"array of dtype {name!r} in the model dict: expected one of {', '.join(sorted(DTYPES))}")
    try:
        return _from_bytes(entry, np.dtype(name)) if "base64" in entry else _from_list(entry, np.dtype(name))
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"damaged array in the model dict: {error}") from None


def _from_bytes(entry: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    shape, text = entry["shape"], entry["base64"]
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise InputError(f"damaged array in the model dict: {str(shape)[:80]} is no shape")
    raw = base64.b64decode(text, validate=True)
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise InputError(f"damaged array in the model dict: {len(raw)} bytes do not make {dtype} of the shape {shape}")
    if dtype.kind == "b" and raw.strip(b"\0\1"):
        raise InputError("damaged array in the model dict: a bool that is neither 0 nor 1")
    return np.frombuffer(raw, dtype=dtype.newbyteorder("<")).reshape(shape).astype(dtype)


def _from_list(entry: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    value = entry["value"]
    if not isinstance(value, list | int | float):
        raise InputError(f"damaged array in the model dict: {str(value)[:80]} is neither a number nor a list")
    found = np.array(value, dtype=dtype)
    if dtype.kind == "f":
        found[np.isnan(found)] = np.nan  # digits have one NaN, of which readers make different ones
    # deepmd-kit writes no shape, and the digits of an array without elements do not say it
    return found if found.size or "shape" not in entry else found.reshape(entry["shape"])


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
