"""Nested dicts with arrays through JSON, bit by bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from carryall.errors import InputError
from carryall.package.arrays import DTYPES, from_json, to_json

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def any_bits(draw: st.DrawFn) -> np.ndarray:
    """An array of any readable dtype and shape, of any bit pattern: signed zeros, subnormals, NaN with payloads."""
    dtype = np.dtype(draw(st.sampled_from(sorted(DTYPES))))
    shape = draw(SHAPES)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8)
    return (raw % 2).view(bool).reshape(shape) if dtype.kind == "b" else raw.view(dtype).reshape(shape)


@given(any_bits())
def test_arrays_are_bit_exact(array: np.ndarray) -> None:
    again = from_json(to_json({"x": [array]}))["x"][0]
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()
    assert again.flags.writeable


@pytest.mark.parametrize("dtype", sorted(DTYPES - {"bool", "int8", "uint8"}))
def test_byte_order_and_strides_do_not_matter(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for variant in (array.astype(np.dtype(dtype).newbyteorder(">")), np.asfortranarray(array), array[:, ::-1][:, ::-1]):
        again = from_json(to_json(variant))
        assert again.dtype == np.dtype(dtype)
        assert np.array_equal(again, array)


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@given(TREES)
def test_trees_of_scalars(tree: object) -> None:
    assert from_json(to_json(tree)) == tree


def test_numpy_scalars_and_tuples_become_plain() -> None:
    assert from_json(to_json({"a": np.float32(0.5), "b": np.int64(3), "c": (1, np.bool_(True))})) == {
        "a": 0.5,
        "b": 3,
        "c": [1, True],
    }


def test_a_nan_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("nan")})


def test_an_array_that_could_not_be_read_back_is_not_written() -> None:
    for array in (np.zeros(2, dtype=complex), np.array(["a"]), np.array([None])):
        with pytest.raises(InputError, match="cannot be written"):
            to_json({"x": array})


def test_deepmds_list_form() -> None:
    text = json.dumps({"@class": "np.ndarray", "@is_variable": True, "dtype": "float32", "value": [[1.5, 2.0]]})
    array = from_json(text)
    assert (array.dtype, array.tolist()) == (np.float32, [[1.5, 2.0]])


DAMAGED = {
    "not JSON": ("{", "not valid JSON"),
    "not text": (b"\xff\xfe\x00", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "dtype": ({"@class": "np.ndarray", "dtype": "object", "base64": "", "shape": [0]}, "array of dtype 'object'"),
    "no dtype": ({"@class": "np.ndarray", "base64": "", "shape": [0]}, "array of dtype None"),
    "base64": ({"@class": "np.ndarray", "dtype": "int8", "base64": "%", "shape": [0]}, "damaged array"),
    "short": ({"@class": "np.ndarray", "dtype": "int64", "base64": "AAAA", "shape": [1]}, "damaged array"),
    "shape": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": [2]}, "damaged array"),
    "no data": ({"@class": "np.ndarray", "dtype": "int8", "shape": [2]}, "damaged array"),
    "dtype is a list": ({"@class": "np.ndarray", "dtype": [], "base64": "", "shape": [0]}, "array of dtype \\[\\]"),
    "negative": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": [-3, -1]}, "is no shape"),
    "any size": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": [-1]}, "is no shape"),
    "enormous": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": [2**62, 4]}, "is no shape"),
    "enormous product": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": [2**39] * 9}, "do not make int8"),
    "many axes": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AA==", "shape": [1] * 65}, "is no shape"),
    "shape of a number": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": 3}, "is no shape"),
    "shape of floats": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AAAA", "shape": [3.0]}, "is no shape"),
    "shape of truths": ({"@class": "np.ndarray", "dtype": "int8", "base64": "AA==", "shape": [True]}, "is no shape"),
    "bytes are a number": ({"@class": "np.ndarray", "dtype": "int8", "base64": 5, "shape": [1]}, "damaged array"),
    "neither true nor false": ({"@class": "np.ndarray", "dtype": "bool", "base64": "Ag==", "shape": [1]}, "neither 0 nor 1"),
    "ragged": ({"@class": "np.ndarray", "dtype": "float64", "value": [[1.0], [1.0, 2.0]]}, "damaged array"),
    "no value": ({"@class": "np.ndarray", "dtype": "float64", "value": None}, "neither a number nor a list"),
    "beyond the type": ({"@class": "np.ndarray", "dtype": "int64", "value": [2**70]}, "damaged array"),
    "deep value": ({"@class": "np.ndarray", "dtype": "int64", "value": json.loads("[" * 80 + "]" * 80)}, "damaged array"),
    "NaN": ('{"x": NaN}', "not valid JSON: NaN is no number"),
    "infinite": ('{"x": -Infinity}', "not valid JSON: -Infinity is no number"),
    "huge number": ('{"x": ' + "9" * 5000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_text_is_an_input_error(name: str) -> None:
    content, message = DAMAGED[name]
    with pytest.raises(InputError, match=message):
        from_json(json.dumps(content) if isinstance(content, dict) else content)


def test_nan_where_another_program_wrote_it() -> None:
    assert np.isnan(from_json('{"x": NaN}', finite=False)["x"])
