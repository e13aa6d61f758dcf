from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_samples import assert_same_info

from carryall.data.extxyz_comment import format_comment, parse_comment
from carryall.errors import InputError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.dictionaries(st.text(), inner, max_size=3) | st.lists(st.text(), max_size=3),
    max_leaves=5,
)
KEYS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8).filter(
    lambda key: key not in ("Lattice", "virial", "stress") and key.lower() != "uid"
)
ARRAYS = st.lists(st.floats(allow_nan=False), max_size=4).map(np.array) | st.lists(st.integers(-9, 9), min_size=1).map(np.array)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, JSON_VALUES | ARRAYS, max_size=4))
def test_comment_round_trip(info: dict[str, Any]) -> None:
    assert_same_info(parse_comment(format_comment(info)), info)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, JSON_VALUES | ARRAYS, max_size=4))
def test_ase_reads_our_comment(info: dict[str, Any]) -> None:
    extxyz = pytest.importorskip("ase.io.extxyz")
    found = extxyz.key_val_str_to_dict(format_comment(info))
    assert found.keys() - {""} == info.keys()
    for key, value in info.items():
        np.testing.assert_equal(found[key], value)


def closed(line: str) -> bool:
    """Whether every quote and bracket of the line has its end."""
    rest = re.sub(r"\\.", "", line, flags=re.DOTALL)
    return not re.search(r"['\"{\[]", re.sub(r"'[^']*'|\"[^\"]*\"|\{[^}]*\}|\[[^\]]*\]", "", rest))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("ab1.=\"'{}[]\\ ,T-_"), max_size=25))
def test_any_comment_parses_as_ase_does(line: str) -> None:
    extxyz = pytest.importorskip("ase.io.extxyz")
    line = f"x=1 {line}"
    expected = extxyz.key_val_str_to_dict(line)
    if not closed(line):
        with pytest.raises(InputError, match="not closed"):
            parse_comment(line)
        return
    found = parse_comment(line)
    expected.pop("", None)
    found.pop("", None)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_equal(found[key], value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a=1 b=2.5 c=text d", {"a": 1, "b": 2.5, "c": "text", "d": True}),
        ('a=\'x y\' b={1 2} c=[T F] d="q\\"r"', {"a": "x y", "b": np.array([1, 2]), "c": [True, False], "d": 'q"r'}),
        ("a = 1  b= 2", {"a": 1, "b": 2}),
        ("a=b=c", {"a": "b=c"}),
        ('a="_JSON {\\"k\\": [1, 2]}"', {"a": {"k": [1, 2]}}),
        ("uid=123 n=T", {"uid": "123", "n": True}),
        ("a bulk cell", {"comment": "a bulk cell"}),
        ("", {}),
    ],
)
def test_comment_rules(line: str, expected: dict[str, Any]) -> None:
    assert_same_info(parse_comment(line), expected)
