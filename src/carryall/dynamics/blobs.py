"""Structures and batches as bytes and back, exactly: a JSON head, then the tensors' memory. Reading runs nothing."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryall.data.atomic_data import AtomicData, unchecked
from carryall.data.batch import Batch
from carryall.data.fields import FIELDS, LEVELS, OF_EXTRAS, short_name
from carryall.data.levels import Columns
from carryall.errors import InputError

MAGIC = b"CAB1"
LABELS = ("energy", "forces", "stress")
ARRAY, TENSOR, TEXTS, TUPLE, DICT = "\0array", "\0tensor", "\0texts", "\0tuple", "\0dict"
"""Keys that mark what JSON has no word for."""


def to_bytes(tensors: Mapping[str, Tensor], facts: Any = None) -> bytes:
    """Tensors by name and free-form facts; a fact that is no number, text, array, or list or dict of them, becomes its text."""
    parts = dict(tensors)
    head = json.dumps(
        {"facts": _plain(facts, parts), "tensors": {key: _layout(value) for key, value in parts.items()}}
    ).encode()
    memory = [_memory(value) for value in parts.values()]
    return b"".join([MAGIC, struct.pack("<Q", len(head)), head, *memory])


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """The inverse of `to_bytes`; InputError for anything else."""
    start = len(MAGIC) + 8
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise InputError("the bytes are not a structure or a batch of carryall")
    end = start + struct.unpack("<Q", data[len(MAGIC) : start])[0]
    head = json.loads(data[start:end])
    tensors: dict[str, Tensor] = {}
    for key, (dtype, shape) in head["tensors"].items():
        kind = getattr(torch, dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        memory = torch.frombuffer(bytearray(data[end : end + size]), dtype=kind) if size else torch.zeros(0, dtype=kind)
        tensors[key] = memory.reshape(shape)
        end += size
    return tensors, _restored(head["facts"], tensors)


def structure_to_bytes(data: AtomicData) -> bytes:
    """One structure with every field, extra and fact."""
    tensors = {name: value for name in FIELDS if (value := getattr(data, name)) is not None}
    for level, name in OF_EXTRAS.items():
        tensors |= {f"{level}/{key}": value for key, value in getattr(data, name).items()}
    return to_bytes(tensors, data.info)


def structure_from_bytes(data: bytes) -> AtomicData:
    """The inverse of `structure_to_bytes`."""
    tensors, info = from_bytes(data)
    extras: dict[str, dict[str, Tensor]] = {level: {} for level in OF_EXTRAS}
    values: dict[str, Tensor] = {}
    for key, value in tensors.items():
        level, slash, name = key.partition("/")
        if slash and level in extras:
            extras[level][name] = value
        elif key in FIELDS:
            values[key] = value
    return unchecked(values, extras, info)


def batch_to_bytes(batch: Batch, facts: Mapping[str, Any]) -> bytes:
    """A batch with every key of every system, and facts beside it."""
    tensors = {f"{level}/{key}": batch.get(key) for level in LEVELS for key in batch.keys(level)}
    rows = {"atom_counts": batch.atom_counts, "edge_counts": batch.edge_counts, "info": batch.info}
    return to_bytes(tensors, {**rows, "facts": dict(facts)})


def batch_from_bytes(data: bytes) -> tuple[Batch, dict[str, Any]]:
    """The inverse of `batch_to_bytes`, on the CPU."""
    tensors, found = from_bytes(data)
    values: dict[str, dict[str, Tensor]] = {level: {} for level in LEVELS}
    for key, value in tensors.items():
        level, slash, name = key.partition("/")
        if slash and level in values:
            values[level][name] = value
    atoms, edges = (np.array(found[name], dtype=np.int64) for name in ("atom_counts", "edge_counts"))
    return Batch(Columns(atoms, edges, values, found["info"])), found["facts"]


def content_hash(data: AtomicData) -> bytes:
    """16 bytes that tell structures to compute apart: everything but labels and `info`."""
    digest = hashlib.blake2b(digest_size=16)
    fields = {name: value for name in FIELDS if name not in LABELS and (value := getattr(data, name)) is not None}
    for name, value in {**fields, **data.atom_extras, **data.system_extras}.items():
        digest.update(f"{name} {_layout(value)};".encode())
        digest.update(_memory(value))
    return digest.digest()


def _layout(value: Tensor) -> tuple[str, list[int]]:
    return short_name(value.dtype), list(value.shape)


def _memory(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` for JSON; arrays in it become tensors of the blob."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "fiubU":
        return value.item()
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub"):
        name = f"\0{len(tensors)}"
        tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(_native(value))
        return {TENSOR if isinstance(value, Tensor) else ARRAY: name}
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        return {TEXTS: value.tolist()}
    if isinstance(value, Mapping):
        return {DICT: [[str(key), _plain(one, tensors)] for key, one in value.items()]}
    if isinstance(value, tuple):
        return {TUPLE: [_plain(one, tensors) for one in value]}
    return [_plain(one, tensors) for one in value] if isinstance(value, list) else str(value)


def _native(value: np.ndarray) -> np.ndarray:
    """A copy in a dtype that torch has."""
    if value.dtype.kind == "f" and value.dtype.itemsize > 8:
        value = value.astype(np.float64)
    if value.dtype.kind == "u" and value.dtype.itemsize > 1:
        value = value.astype(np.int64)
    return np.array(value, dtype=value.dtype.newbyteorder("="), order="C")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((mark, content),) = value.items()
    if mark == TENSOR:
        return tensors.pop(content)
    if mark == ARRAY:
        return tensors.pop(content).numpy()
    if mark == TEXTS:
        return np.array(content)
    if mark == DICT:
        return {key: _restored(one, tensors) for key, one in content}
    return tuple(_restored(one, tensors) for one in content)
