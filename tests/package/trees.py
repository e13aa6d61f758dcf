"""Trees of dicts, lists, scalars and arrays for tests of files, and when two are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from carryall.package.arrays import DTYPES

TEXT = st.text(max_size=12)
KEYS = TEXT.filter(lambda key: key != "@class")
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT


def all_arrays() -> st.SearchStrategy[np.ndarray]:
    """Arrays of every dtype that a file may hold, of up to three axes, some of length 0."""
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    return arrays.arrays(st.sampled_from(sorted(DTYPES)).map(np.dtype), shapes)


def trees() -> st.SearchStrategy[dict[str, Any]]:
    """Nested dicts."""
    leaves = SCALARS | all_arrays()
    inner = st.recursive(leaves, lambda one: st.lists(one, max_size=3) | st.dictionaries(KEYS, one, max_size=3), max_leaves=8)
    return st.dictionaries(KEYS, inner, max_size=4)


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same keys in the same order, the same scalars, and arrays of the same type, shape and bits."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        both = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        return bool(both and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    return type(a) is type(b) and repr(a) == repr(b)  # repr: -0.0 is not 0.0
