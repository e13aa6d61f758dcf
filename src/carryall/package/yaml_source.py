"""DeePMD's `.yaml`: the tree with its arrays as nested lists of numbers; nothing but plain values is ever made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from carryall.errors import InputError
from carryall.package.arrays import as_list, decode, encode

FEWEST = 10_000  # values that any file may have; more than its bytes can only come of references to references


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Without merge keys, which multiply."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` as it is: it is then of no known kind."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Without references."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def read_yaml(path: Path) -> Any:
    """The tree of a YAML file; InputError says what is wrong with it."""
    text = path.read_bytes()
    try:
        tree = yaml.load(text, Loader=_Loader)
        return decode(_plain(tree, [max(len(text), FEWEST)], path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def write_yaml(path: Path, tree: Any) -> None:
    """Write a tree to a YAML file, the same bytes each time; keys keep their order."""
    try:
        text = yaml.dump(encode(tree, as_list), Dumper=_Dumper, sort_keys=False, default_flow_style=None)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"the tree cannot be written as YAML: {error}") from None
    path.write_text(text, encoding="utf-8", newline="\n")


def _plain(value: Any, room: list[int], path: Path) -> Any:
    """A copy of the tree, references written out, as long as there is room; InputError for what JSON would not have."""
    room[0] -= 1
    if room[0] < 0:
        raise InputError(f"{path} has more values than bytes: its references multiply, which a model's do not")
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise InputError(f"{path}: the key {odd[0]!r} is no text")
        return {key: _plain(one, room, path) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one, room, path) for one in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise InputError(f"{path} has a value of type {type(value).__name__}, which a model does not have")
