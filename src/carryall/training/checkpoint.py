"""Checkpoints: everything a run needs to go on, in a file that holds only plain values and tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from carryall.errors import InputError

FORMAT_VERSION = 1


def write(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary name, then rename: an interrupted run leaves the previous checkpoint whole."""
    part = path.with_name(f".{path.name}.part")
    torch.save({"format_version": FORMAT_VERSION, **content}, part)
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """The content; `weights_only`: nothing in the file can run. `model` and `raw_model` are source dicts with arrays."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a checkpoint of carryall or is damaged ({reason})") from None
    if not isinstance(content, dict) or "model" not in content or "format_version" not in content:
        raise InputError(f"{path} is not a checkpoint of carryall")
    if content["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{path} has checkpoint version {content['format_version']}, newer than {FORMAT_VERSION}: update carryall"
        )
    return {**content, **{name: to_arrays(content[name]) for name in ("model", "raw_model") if name in content}}


def to_tensors(tree: Any) -> Any:
    """A source dict with its arrays as tensors."""
    if isinstance(tree, dict):
        return {key: to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [to_tensors(value) for value in tree]
    return torch.from_numpy(tree) if hasattr(tree, "dtype") and hasattr(tree, "shape") else tree


def to_arrays(tree: Any) -> Any:
    """The inverse of `to_tensors`."""
    if isinstance(tree, dict):
        return {key: to_arrays(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [to_arrays(value) for value in tree]
    return tree.numpy() if isinstance(tree, torch.Tensor) else tree
