"""The second line of an extended XYZ frame: key=value pairs, with the quoting and typing rules of ASE's reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from carryall.errors import InputError

_CLOSING = {"'": "'", '"': '"', "{": "}", "[": "]"}
_BOOLEANS = {
    "T": True, "F": False, "true": True, "false": False, "True": True, "False": False, "TRUE": True, "FALSE": False,
}  # fmt: skip
_SPECIAL = re.compile(r"[\s\"'{}\[\]=\\]")
_WORDS = re.compile(r"[^\s,]+")
_QUICK = re.compile(r"""([^\s"'{}\[\]=\\]+)=(?:"([^"\\]*)"|([^\s"'{}\[\]=\\]+))(?:\s+(?![\s=])|$)""")
_COLUMN_MAJOR = ("Lattice", "virial", "stress")  # nine values, column by column, as the format has it
RESERVED = ("Lattice", "Properties", "pbc")


def parse_comment(line: str) -> dict[str, Any]:
    """Values by key: bool, int, float, str, numpy arrays of several numbers, lists of bools, and what follows `_JSON`.

    A key without a value is True. `Lattice`, `virial` and `stress` become (3, 3) with lattice vectors as rows. A line without
    any `=` is free text, as in plain XYZ: {"comment": line}.
    """
    line = line.strip()
    if not line:
        return {}
    if "=" not in line:
        return {"comment": line}
    return {key: _typed(key, value) for key, value in _pairs(line)}


def format_comment(values: Mapping[str, Any]) -> str:
    """`key=value` pairs that `parse_comment` and ASE read back; an object that JSON does not know is written as str(object)."""
    return " ".join(f"{_quote(key)}={_text(key, value)}" for key, value in values.items())


def _pairs(line: str) -> list[tuple[str, str]]:
    found, place = [], 0
    while match := _QUICK.match(line, place):
        key, quoted, bare = match.groups()
        found.append((key, bare if quoted is None else quoted))
        place = match.end()
    return found + (_slow_pairs(line[place:]) if place < len(line) else [])


def _slow_pairs(line: str) -> list[tuple[str, str]]:
    """Character by character: brackets and quotes as delimiters, backslash escapes, spaces around `=`, keys without value."""
    pairs: list[list[list[str]]] = [[[]]]
    closing, escaped = "", False
    for char in line:
        current = pairs[-1]
        if escaped:
            current[-1].append(char)
            escaped = False
        elif char == "\\":
            escaped = True
        elif closing:
            if char == closing:
                closing = ""
            else:
                current[-1].append(char)
        elif char in _CLOSING:
            closing = _CLOSING[char]
        elif char.isspace():
            if current[-1]:
                pairs.append([[]])
        elif char == "=":
            if current == [[]] and len(pairs) > 1:
                pairs.pop()
            pairs[-1].append([])
        else:
            current[-1].append(char)
    if closing:
        raise InputError(f"a quote or bracket is not closed: expected {closing!r}")
    joined = [["".join(part) for part in pair] for pair in pairs if pair != [[]]]
    return [(key, "=".join(rest) if rest else "T") for key, *rest in joined]


def _typed(key: str, text: str) -> Any:
    if key.lower() == "uid":
        return text
    words = _WORDS.findall(text)
    numbers = _as_numbers(words)
    if key in _COLUMN_MAJOR:
        if numbers is None or numbers.size not in ((9,) if key == "Lattice" else (9, 6)):
            more = "" if key == "Lattice" else ", or 6 in Voigt order"
            raise InputError(f"{key} is {text!r}: expected 9 numbers{more}")
        # Row by row gives lattice vectors as rows; a stress or virial is the transpose of that, and symmetric as a rule.
        matrix = numbers.reshape(3, 3) if numbers.size == 9 else numbers
        return matrix if key == "Lattice" else matrix.T
    if numbers is not None:
        return numbers[0].item() if len(numbers) == 1 else numbers
    booleans = [_BOOLEANS.get(word) for word in words]
    if words and None not in booleans:
        return booleans[0] if len(booleans) == 1 else booleans
    if text.startswith("_JSON "):
        return _from_json(key, text.removeprefix("_JSON "))
    return text


def _as_numbers(words: list[str]) -> np.ndarray | None:
    try:
        return np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError):
        pass
    try:
        return np.array([float(word) for word in words])
    except ValueError:
        return None


def _from_json(key: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{key} is no JSON: {error}") from None
    if not isinstance(value, list):
        return value
    try:
        array = np.array(value)
    except ValueError:
        return value
    return array if array.dtype.kind in "ifb" else value


def _text(key: str, value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        plain = value and value.isprintable() and "\\" not in value and not value.startswith("_JSON ")
        return _quote(value if plain and _safe_type(key, value) == value else f"_JSON {json.dumps(value)}")
    if isinstance(value, np.ndarray):
        if key in _COLUMN_MAJOR and value.shape == (3, 3):
            value = (value if key == "Lattice" else value.T).reshape(9)
        if value.ndim == 1 and len(value) > 1 and value.dtype.kind in "fiu":
            return f'"{" ".join(repr(entry) for entry in value.tolist())}"'
        value = value.tolist()
    return _quote(f"_JSON {json.dumps(value, default=_plain)}")


def _safe_type(key: str, text: str) -> Any:
    found = _typed(key, text) if key not in _COLUMN_MAJOR else text
    return found if isinstance(found, str) else None


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _quote(text: str) -> str:
    if not _SPECIAL.search(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
