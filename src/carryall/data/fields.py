"""The fields of a structure: which level each belongs to, its shape, and how values become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from carryall.errors import InputError

ArrayLike: TypeAlias = Tensor | np.ndarray | Sequence[Any] | float | int | bool

LEVELS = ("system", "atom", "edge")


@dataclass(frozen=True)
class Field:
    """Level, allowed shapes of one row, and kind ("float", "int" or "bool") of a standard field."""

    level: str
    row_shapes: tuple[tuple[int, ...], ...]
    kind: str = "float"


FIELDS: dict[str, Field] = {
    "positions": Field("atom", ((3,),)),
    "atomic_numbers": Field("atom", ((),), "int"),
    "velocities": Field("atom", ((3,),)),
    "masses": Field("atom", ((),)),
    "charges": Field("atom", ((),)),
    "spins": Field("atom", ((), (3,))),
    "forces": Field("atom", ((3,),)),
    "cell": Field("system", ((3, 3),)),
    "pbc": Field("system", ((3,),), "bool"),
    "energy": Field("system", ((),)),
    "stress": Field("system", ((3, 3),)),
    "edge_index": Field("edge", ((2,),), "int"),
}
"""Standard fields by name; every other name is an extra, whose level the owner gives."""

ALWAYS = ("positions", "atomic_numbers", "cell", "pbc")
"""Fields that every system of a batch has."""

INDEX_KEYS = frozenset({"edge_index"})
"""Edge fields that hold atom indices: shifted when systems are concatenated or selected."""

OF_EXTRAS = {"atom": "atom_extras", "system": "system_extras", "edge": "edge_extras"}


def as_tensor(name: str, value: ArrayLike, kind: str | None = None) -> Tensor:
    """`value` as a tensor: a tensor is kept, everything else copied. `kind` "float" turns integers into float64.

    Floating-point dtypes are kept; integers of kind "int" become int64. Without a kind the dtype stays as it is.
    """
    if not isinstance(value, Tensor):
        value = _from_array(name, value)
    if kind == "float" and not value.is_floating_point():
        return value.to(torch.float64)
    if kind == "int":
        if value.numel() and (value.dtype == torch.bool or value.is_floating_point() or value.is_complex()):
            raise InputError(f"{name} must be integers, got {short_name(value.dtype)}")
        return value.to(torch.int64)
    if kind == "bool" and value.dtype != torch.bool:
        if not bool(((value == 0) | (value == 1)).all()):
            raise InputError(f"{name} must be true or false, got {value.tolist()}")
        return value.to(torch.bool)
    return value


def _from_array(name: str, value: Any) -> Tensor:
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack(list(value))
    try:
        array = np.array(value)
    except ValueError as error:
        raise InputError(f"{name} is not an array: {error}") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} must be numbers, got an array of {array.dtype}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape))


def check_finite(name: str, value: Tensor, level: str) -> None:
    """InputError with the first row of `value` that is NaN or infinite, counted in atoms for level "atom"."""
    finite = torch.isfinite(value)
    if bool(finite.all()):
        return
    if level == "atom":
        atom = int((~finite.reshape(len(value), -1).all(1)).nonzero()[0])
        raise InputError(f"{name} of atom {atom} is {value[atom].tolist()}: expected finite numbers")
    raise InputError(f"{name} is {value.tolist()}: expected finite numbers")


def kind_of(dtype: torch.dtype) -> str:
    """ "float", "bool" or "int": dtypes of one kind widen to the larger one, kinds never mix."""
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype == torch.bool else "int"


def short_name(dtype: torch.dtype) -> str:
    """`float64` for `torch.float64`."""
    return str(dtype).removeprefix("torch.")
