"""Run the program of a `.pte` without torch's deserializer, which runs what the file says as Python.

`torch.export.load` unpickles sample inputs, and weights and constants that ask for it; it hands size expressions to sympy's
`sympify`, which is `eval`; and the module it makes runs guards by `exec`. Each of the three runs code of a file (torch 2.11,
2.13). Here the same file is plain data: JSON and raw arrays in, a list of calls out. An operation is looked up in a fixed
table (package/operations.py), an argument is a number, a word, a name of a value or a list of those, and nothing else is
understood. Size expressions and guards need no reading: at run time sizes are those of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carryall.errors import CarryallError, InputError
from carryall.package.archive import AGAIN, open_archive, rewrite
from carryall.package.manifest import Packed, as_packed, parse_json
from carryall.package.operations import OURS, find_operation
from carryall.package.steps import DTYPES, Checks, Reader, Ref, Step, checks_of, text

PROGRAM, SAMPLE = "model/models/model.json", "model/data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "model/data/weights/", "model/data/constants/"
WEIGHTS_CONFIG, CONSTANTS_CONFIG = WEIGHTS + "model_weights_config.json", CONSTANTS + "model_constants_config.json"
PARTS = (
    PROGRAM, SAMPLE, "model/archive_format", "model/archive_version", "model/byteorder", "model/.data/version",
    "model/.data/serialization_id",
)  # fmt: skip
FOLDERS = (WEIGHTS, CONSTANTS, "model/extra/")
SCHEMA = 8
"""Major version of torch's serialized programs, of torch 2.7 to 2.13."""
MAX_PROGRAM_BYTES = 1 << 26


class Program(nn.Module):
    """The calls of a program, in order, and its weights."""

    def __init__(
        self, where: str, weights: list[Tensor], inputs: Checks, steps: list[Step], outputs: list[Ref], n_values: int
    ) -> None:
        super().__init__()
        self.where = where
        for index, weight in enumerate(weights):
            self.register_buffer(f"weight_{index}", weight)
        self.n_weights, self.n_values = len(weights), n_values
        self.checks, self.steps, self.outputs = inputs, steps, outputs

    def giving(self, places: Sequence[int]) -> Program:
        """The same program for some of its outputs only, without the calls that these do not need; weights are shared."""
        weights = [getattr(self, f"weight_{index}") for index in range(self.n_weights)]
        outputs = [self.outputs[place] for place in places]
        needed, steps = {one.slot for one in outputs}, []
        for step in reversed(self.steps):
            if step.serves(needed):
                needed |= {ref.slot for ref in step.refs()}
                steps.append(step)
        keep = {one.slot for one in outputs} | set(range(self.n_weights + len(self.checks.names)))
        return Program(self.where, weights, self.checks, free_early(steps[::-1], keep), outputs, self.n_values)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the program; InputError when the inputs do not fit it, or when one of its operations fails."""
        try:
            self.checks.check(inputs)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None
        values: list[Any] = [*(getattr(self, f"weight_{i}") for i in range(self.n_weights)), *inputs]
        values.extend([None] * (self.n_values - len(values)))
        with torch.no_grad():
            for step in self.steps:
                try:
                    step.run(values)
                except (CarryallError, torch.OutOfMemoryError, MemoryError):
                    raise
                except Exception as error:
                    if step.target.startswith(f"torch.ops.{OURS}."):
                        raise
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise InputError(f"{self.where}: its program fails in {step.target} ({reason}); pack it again") from error
        found = tuple(values[one.slot] for one in self.outputs)
        if not all(isinstance(value, Tensor) for value in found):
            raise InputError(f"{self.where}: an output of its program is no tensor; pack it again")
        return found


def load_program(source: str | Path | Packed, device: str | torch.device = "cpu") -> Program:
    """The program of a `.pte` on a device, whichever it was made on; InputError for anything that is not plain data.

    Every part is hashed as it is read. No code of the file runs, nothing is unpickled or evaluated, now or later.
    """
    with as_packed(source) as packed:
        try:
            _check_parts(packed)
            root = _parsed(packed.read(PROGRAM, MAX_PROGRAM_BYTES), f"entry {PROGRAM}")
            weights = _weights(packed, WEIGHTS_CONFIG) | _weights(packed, CONSTANTS_CONFIG)
            return _program(str(packed.path), root, weights, torch.device(device))
        except InputError as error:
            where = str(packed.path)
            if str(error).startswith(where):
                raise
            raise InputError(f"{where}: {error}; pack it again") from None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{packed.path}: its program is not as torch writes it ({type(error).__name__}: {error}); {AGAIN}"
            ) from None


def strip_pickles(path: Path) -> None:
    """Take what is pickled out of an archive that `torch.export.save` wrote.

    `torch.export.load` still reads it: it takes an empty entry for "no sample inputs". InputError when weights are pickled.
    """
    with open_archive(path) as archive:
        for name in (WEIGHTS_CONFIG, CONSTANTS_CONFIG):
            for key, payload in parse_json(archive.read(name), name)["config"].items():
                if payload["use_pickle"]:
                    raise InputError(f"{key} of the model is of a kind that only a pickle holds, which a packed file never has")
    rewrite(path, {SAMPLE: b""})


def _check_parts(packed: Packed) -> None:
    for name in packed.entries:
        known = name in PARTS or any(name.startswith(folder) and "/" not in name[len(folder) :] for folder in FOLDERS)
        if not known or (name.endswith(".pt") and name != SAMPLE):
            raise InputError(f"entry {name} has no place in a portable program; it was not written by carryall")


def _parsed(data: bytes, what: str) -> dict[str, Any]:
    root = parse_json(data, what)
    if not isinstance(root, dict):
        raise InputError(f"{what} does not hold an object")
    return root


def _weights(packed: Packed, config: str) -> dict[str, Tensor]:
    """Arrays by name; those that share memory in the file share it here."""
    folder = config.rpartition("/")[0] + "/"
    found: dict[str, Tensor] = {}
    flat: dict[tuple[str, int], Tensor] = {}
    for name, payload in _parsed(packed.read(config, MAX_PROGRAM_BYTES), f"entry {config}")["config"].items():
        entry, meta = folder + text(payload["path_name"]), payload["tensor_meta"]
        if payload["use_pickle"] is not False or meta is None:
            raise InputError(f"{name} is pickled, and no pickle is ever read")
        number = meta["dtype"]
        if type(number) is not int or number not in DTYPES or meta["layout"] != 7:
            raise InputError(f"{name} is of a type or layout that a program may not have")
        key = (entry, number)
        if key not in flat:
            data = bytearray(packed.read(entry))
            if len(data) % DTYPES[number].itemsize:
                raise InputError(f"entry {entry} has {len(data)} bytes, no whole number of {DTYPES[number]}")
            flat[key] = torch.frombuffer(data, dtype=DTYPES[number]) if data else torch.empty(0, dtype=DTYPES[number])
        sizes, strides, offset = _ints(meta["sizes"]), _ints(meta["strides"]), _ints([meta["storage_offset"]])[0]
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if math.prod(sizes) and max(last + 1, math.prod(sizes)) > flat[key].numel():
            raise InputError(f"{name} is larger than its entry {entry}")
        found[name] = flat[key].as_strided(sizes, strides, offset if math.prod(sizes) else 0)
    return found


def _ints(values: Sequence[dict[str, Any]]) -> list[int]:
    found = [value["as_int"] for value in values]
    if not all(type(one) is int and 0 <= one < 2**48 for one in found) or len(found) > 16:
        raise InputError("an array has sizes that no array has")
    return found


def _program(where: str, root: dict[str, Any], weights: dict[str, Tensor], device: torch.device) -> Program:
    major = root["schema_version"]["major"]
    if major != SCHEMA:
        raise InputError(f"it was written by a torch with schema version {major}, and {SCHEMA} is the one that is read")
    module = root["graph_module"]
    graph, signature = module["graph"], module["signature"]
    reader = Reader(device)
    tensors, n_inputs, names = _inputs(graph, signature, weights, reader)
    steps = [_step(node, reader) for node in graph["nodes"]]
    outputs = [reader.value(one["as_tensor"]["name"]) for one in graph["outputs"]]
    for spec in signature["output_specs"]:
        if set(spec) != {"user_output"}:
            raise InputError("an output of the program changes weights or inputs")
    keep = {one.slot for one in outputs} | set(range(len(tensors) + n_inputs))
    return Program(where, tensors, checks_of(graph, names), free_early(steps, keep), outputs, reader.n_values).to(device)


def _inputs(
    graph: dict[str, Any], signature: dict[str, Any], weights: dict[str, Tensor], reader: Reader
) -> tuple[list[Tensor], int, list[str]]:
    """Weights in the order of their slots, number and names of the other inputs, which take the slots after those."""
    names = [text(one["as_tensor"]["name"]) for one in graph["inputs"]]
    specs = signature["input_specs"]
    tensors, given = [], []
    for name, spec in zip(names, specs, strict=True):
        (kind, content), *others = spec.items()
        if others or kind not in ("parameter", "buffer", "tensor_constant", "user_input"):
            raise InputError(f"input {name!r} of the program is neither a tensor nor a weight")
        if kind == "user_input":
            given.append(name)
        else:
            if given:
                raise InputError("a weight stands behind the inputs of the program")
            tensors.append(weights[content[f"{kind}_name"]])
            reader.define(name)
    for name in given:
        reader.define(name)
    return tensors, len(given), given


def _step(node: dict[str, Any], reader: Reader) -> Step:
    target = text(node["target"])
    function: Callable[..., Any] = find_operation(target)
    args = [reader.argument(one["arg"]) for one in node["inputs"] if one.get("kind") != 2]
    kwargs = {text(one["name"]): reader.argument(one["arg"]) for one in node["inputs"] if one.get("kind") == 2}
    if schema := getattr(function, "_schema", None):
        known = {argument.name for argument in schema.arguments}
        if len(args) + len(kwargs) > len(known) or not kwargs.keys() <= known or (schema.is_mutable and not args):
            raise InputError(f"it calls {target} with arguments that it does not take")
    return Step(target, function, tuple(args), kwargs, reader.results(node["outputs"]), ())


def free_early(steps: list[Step], keep: set[int]) -> list[Step]:
    """The steps, each of which forgets the values that no later one needs."""
    done, freed = set(keep), []
    for step in reversed(steps):
        last = {ref.slot for ref in step.refs()} - done
        done |= last
        freed.append(step.freeing(tuple(sorted(last))))
    return freed[::-1]
