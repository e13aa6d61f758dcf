"""Calls and arguments of a portable program: from torch's JSON to what is called, and the call itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError

# numbers of torch._export.serde.schema.ScalarType, MemoryFormat and Layout (major version 8); tests compare them
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
LAYOUTS = {7: torch.strided}
SYMBOL = re.compile(r"(?:Symbol\('(\w+)'(?:, \w+=(?:True|False))*\)|([a-z]\w*))")
SPELLED = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
MAX_DEPTH = 4


@dataclass(frozen=True)
class Ref:
    """A value of the program, by its place in the list of values."""

    slot: int


@dataclass(frozen=True)
class Step:
    """One call. `out` is where its result goes: a Ref, a list of them for several results, None for none."""

    target: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    free: tuple[int, ...]

    def run(self, values: list[Any]) -> None:
        """Call it on `values`, put its results there and forget what no later step needs."""
        result = self.function(
            *[_filled(one, values) for one in self.args], **{name: _filled(one, values) for name, one in self.kwargs.items()}
        )
        _store(self.out, result, values)
        for slot in self.free:
            values[slot] = None

    def refs(self) -> Iterator[Ref]:
        """All values that it takes or makes."""
        yield from _refs([*self.args, *self.kwargs.values(), self.out])

    def serves(self, slots: set[int]) -> bool:
        """Whether it makes one of these values, or changes what it takes."""
        mutable: bool = getattr(getattr(self.function, "_schema", None), "is_mutable", False)
        return mutable or any(ref.slot in slots for ref in _refs(self.out))

    def freeing(self, slots: tuple[int, ...]) -> Step:
        """The same call, which forgets these values."""
        return replace(self, free=slots)


def _filled(argument: Any, values: list[Any]) -> Any:
    if type(argument) is Ref:
        return values[argument.slot]
    if type(argument) is list:
        return [_filled(one, values) for one in argument]
    return argument


def _store(out: Any, result: Any, values: list[Any]) -> None:
    if type(out) is Ref:
        values[out.slot] = result
    elif type(out) is list:
        for one, part in zip(out, result, strict=True):
            _store(one, part, values)


def _refs(tree: Any) -> Iterator[Ref]:
    if type(tree) is Ref:
        yield tree
    elif type(tree) is list:
        for one in tree:
            yield from _refs(one)


class Reader:
    """Names of values, as far as they are defined, and arguments made of them and of plain numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots: dict[str, int] = {}

    @property
    def n_values(self) -> int:
        """Number of values so far."""
        return len(self.slots)

    def define(self, name: Any) -> Ref:
        """A new value; InputError when there is one of that name."""
        if text(name) in self.slots:
            raise InputError(f"its program defines {name[:100]!r} twice")
        self.slots[name] = len(self.slots)
        return Ref(self.slots[name])

    def value(self, name: Any) -> Ref:
        """The value of that name; InputError when it is not defined yet."""
        if text(name) not in self.slots:
            raise InputError(f"its program uses {name[:100]!r} before it is defined")
        return Ref(self.slots[name])

    def argument(self, entry: dict[str, Any]) -> Any:
        """An argument of torch's JSON: an object with one key, which is its kind."""
        ((kind, value),) = entry.items()
        if kind in ("as_tensor", "as_optional_tensor"):
            return self.value(value["name"]) if kind == "as_tensor" else self.argument(value)
        if kind in ("as_tensors", "as_optional_tensors"):
            return [self.value(one["name"]) if kind == "as_tensors" else self.argument(one) for one in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._size(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._size(one) for one in value]
        if kind in ("as_ints", "as_floats", "as_bools"):
            return [_plain(kind[:-1], one) for one in value]
        if kind == "as_device":
            if value["type"] not in ("cpu", "cuda"):
                raise InputError(f"its program names the device {value['type']!r}")
            return self.device  # wherever it was traced, it runs where its weights are
        return _plain(kind, value)

    def _size(self, entry: dict[str, Any]) -> Any:
        ((kind, value),) = entry.items()
        return self.value(value) if kind == "as_name" else _plain(kind, value)

    def results(self, outputs: Sequence[dict[str, Any]]) -> Any:
        """Where the results of a node go."""
        found = [self._result(one, 0) for one in outputs]
        return found[0] if len(found) == 1 else found or None

    def _result(self, entry: dict[str, Any], depth: int) -> Any:
        ((kind, value),) = entry.items()
        if kind == "as_tensor":
            return self.define(value["name"])
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool") and set(value) == {"as_name"}:
            return self.define(value["as_name"])
        if kind == "as_tensors" and depth < MAX_DEPTH:
            return [self.define(one["name"]) for one in value]
        if kind == "as_none":
            return None
        raise InputError(f"its program has a result of the kind {kind!r}, which is not read")


def _plain(kind: str, value: Any) -> Any:
    """A constant argument."""
    if kind == "as_none":
        return None
    if kind == "as_int" and type(value) is int and -(2**63) <= value < 2**63:
        return value
    if kind == "as_float":
        if isinstance(value, str) and value in SPELLED:
            return SPELLED[value]
        if type(value) in (int, float):
            return float(value)
    if kind == "as_bool" and type(value) is bool:
        return value
    if kind == "as_string" and type(value) is str and len(value) < 1000:
        return value
    tables: dict[str, dict[int, Any]] = {"as_scalar_type": DTYPES, "as_memory_format": MEMORY_FORMATS, "as_layout": LAYOUTS}
    if kind in tables and type(value) is int and value in tables[kind]:
        return tables[kind][value]
    raise InputError(f"its program has an argument {kind!r} that is not read: {str(value)[:80]}")


def text(value: Any) -> str:
    """A name; InputError for anything else."""
    if type(value) is not str:
        raise InputError(f"its program has {str(value)[:80]!r} where a name belongs")
    return value


@dataclass(frozen=True)
class Checks:
    """Types and sizes of the inputs; sizes of the same name are equal."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[int | str | None, ...], ...]

    def check(self, inputs: Sequence[Tensor]) -> None:
        """InputError for inputs that do not fit the program."""
        if len(inputs) != len(self.names):
            raise InputError(f"its program takes {len(self.names)} inputs, not {len(inputs)}")
        found: dict[str, int] = {}
        for index, (tensor, dtype, sizes) in enumerate(zip(inputs, self.dtypes, self.sizes, strict=True)):
            if tensor.dtype != dtype or tensor.dim() != len(sizes):
                raise InputError(
                    f"input {index} of its program is {dtype} with {len(sizes)} axes, not {tensor.dtype} with {tensor.dim()}"
                )
            for size, wanted in zip(tensor.shape, sizes, strict=True):
                expected = found.setdefault(wanted, size) if type(wanted) is str else wanted
                if expected is not None and size != expected:
                    raise InputError(
                        f"input {index} of its program has the shape {tuple(tensor.shape)}: {size} is not {expected}"
                    )


def checks_of(graph: dict[str, Any], names: Sequence[str]) -> Checks:
    """What the program knows of its inputs; sizes that are expressions of others are not compared."""
    metas = [graph["tensor_values"][name] for name in names]
    sizes = tuple(tuple(_expected(size) for size in meta["sizes"]) for meta in metas)
    return Checks(tuple(names), tuple(DTYPES[meta["dtype"]] for meta in metas), sizes)


def _expected(size: dict[str, Any]) -> int | str | None:
    ((kind, value),) = size.items()
    if kind == "as_int":
        if type(value) is not int:
            raise InputError("its program has an input of a size that is no number")
        return value
    match = SYMBOL.fullmatch(text(value["expr_str"]))
    return (match[1] or match[2]) if match else None
