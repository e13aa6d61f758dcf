"""The `info` of a system as JSON text and back: arrays with their dtype, anything that JSON does not know as its own text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from torch import Tensor

ARRAY = "__array__"


def info_to_json(info: dict[str, Any]) -> str:
    """One line of JSON; tuples become lists, keys become texts, tensors become arrays."""
    return json.dumps(info, default=_plain, skipkeys=False)


def info_from_json(text: str | bytes) -> dict[str, Any]:
    """The inverse of `info_to_json`."""
    found: dict[str, Any] = json.loads(text, object_hook=_restored)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubU":
        return {ARRAY: value.dtype.str, "shape": list(value.shape), "values": value.reshape(-1).tolist()}
    return str(value)


def _restored(value: dict[str, Any]) -> Any:
    if ARRAY in value:
        return np.array(value["values"], dtype=value[ARRAY]).reshape(value["shape"])
    return value
