"""A portable program gives torch's numbers, and whatever it says, nothing of it is unpickled, evaluated or looked up freely."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._export.serde import schema, serialize

from carryall.errors import InputError
from carryall.graph.potential import PotentialSpec
from carryall.models.pair import LennardJones
from carryall.package import steps
from carryall.package.archive import rewrite
from carryall.package.check import check_graphs
from carryall.package.manifest import METADATA, open_archive, read_entry, read_json, seal
from carryall.package.program import (
    CONSTANTS_CONFIG,
    PROGRAM,
    SAMPLE,
    WEIGHTS_CONFIG,
    Program,
    load_program,
    strip_pickles,
)
from carryall.package.signature import to_inputs

SPEC = LennardJones.argon().spec
INPUTS = [to_inputs(graph, SPEC) for graph in check_graphs(SPEC)]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def packed(lj_pte: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(lj_pte, tmp_path / "model.pte"))


def changed(path: Path, change: Change, name: str = PROGRAM) -> Path:
    """The file after a change of one of its JSON entries, with a manifest that agrees."""
    root = read_json(path, name)
    change(root)
    rewrite(path, {name: json.dumps(root).encode()})
    seal(path)
    return path


def outputs(program: Program) -> list[Tensor]:
    return [value for inputs in INPUTS for value in program(*inputs)]


@pytest.fixture(scope="module")
def expected(lj_pte: Path) -> list[Tensor]:
    return outputs(load_program(lj_pte))


def test_the_same_numbers_as_by_torchs_own_loader(lj_pte: Path, dpa1_pte: Path) -> None:
    """Bit for bit; torch's loader must be able to read our files, for whoever wants that."""
    for path in (lj_pte, dpa1_pte):
        spec = PotentialSpec.from_dict(read_json(path, METADATA))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = torch.export.load(io.BytesIO(path.read_bytes())).module()
        program = load_program(path)
        for inputs in [to_inputs(graph, spec) for graph in check_graphs(spec)]:
            found, wanted = program(*inputs), reference(*inputs)
            assert len(found) == len(wanted) > 4
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_numbers_of_torchs_format() -> None:
    assert {schema.ScalarType(number): dtype for number, dtype in steps.DTYPES.items()}.items() <= (
        serialize._SERIALIZE_TO_TORCH_DTYPE.items()
    )
    names = {1: "ContiguousFormat", 2: "ChannelsLast", 3: "ChannelsLast3d", 4: "PreserveFormat"}
    assert {number: schema.MemoryFormat(number).name for number in steps.MEMORY_FORMATS} == names
    assert [schema.Layout(number).name for number in steps.LAYOUTS] == ["Strided"]
    assert schema.SCHEMA_VERSION[0] == 8


@pytest.mark.parametrize("target", ["torch.os.system", "torch.ops.aten.from_file.default", "_operator.attrgetter", "eval"])
def test_a_program_cannot_call_what_is_no_operation_on_tensors(target: str, packed: Path) -> None:
    changed(packed, lambda root: root["graph_module"]["graph"]["nodes"][5].update(target=target))
    with pytest.raises(InputError, match=r"model\.pte: it calls .*, which (is no|is not).*; pack it again"):
        load_program(packed)


# --- what torch would run, and what happens to it here ---


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def everywhere(tree: Any, key: str, value: Any) -> None:
    """Set a key wherever it is."""
    if isinstance(tree, dict):
        for name in tree:
            if name == key:
                tree[name] = value
            else:
                everywhere(tree[name], key, value)
    elif isinstance(tree, list):
        for one in tree:
            everywhere(one, key, value)


def rename(tree: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(tree).replace(f'"{old}"', json.dumps(new)))


def test_nothing_of_a_hostile_program_is_evaluated(packed: Path, expected: list[Tensor], tmp_path: Path) -> None:
    """Expressions, guards and the pickle run in `torch.export.load(...).module()`; the others reach code, or are looked up."""
    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"

    def hostile(root: dict[str, Any]) -> None:
        graph = root["graph_module"]["graph"]
        everywhere(root, "expr_str", code)
        root["guards_code"] = [code]
        root["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [code] * 11
        root["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = code
        for node in graph["nodes"]:
            node["metadata"] = {"stack_trace": f"File\n{code}", "source_fn_stack": "x,torch.os.system", "custom": code}
        root["verifiers"] = [code]
        first = graph["nodes"][0]["outputs"][0]
        name = first["as_sym_int"]["as_name"] if "as_sym_int" in first else first["as_tensor"]["name"]
        root["graph_module"] = rename(root["graph_module"], name, f"x\n{code}\n")

    changed(packed, hostile)
    rewrite(packed, {SAMPLE: pickle.dumps(Payload(canary))})
    seal(packed)
    assert all(torch.equal(a, b) for a, b in zip(outputs(load_program(packed)), expected, strict=True))
    assert not canary.exists()
    pickle.loads(read_entry(packed, SAMPLE))
    assert canary.exists()


def test_no_pickle_code_or_deserializer_is_reached(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something of the file was run")

    for name in (
        "torch.export.load", "torch.load", "pickle.loads", "pickle.load", "pickle.Unpickler", "sympy.sympify", "builtins.eval",
        "builtins.exec", "torch._C.PyTorchFileReader", "torch.fx.Graph",
        "torch._export.serde.serialize.GraphModuleDeserializer",
    ):  # fmt: skip
        monkeypatch.setattr(name, refuse)
    program = load_program(packed)
    found = outputs(program)
    monkeypatch.undo()
    assert len(found) > 10


def nodes(change: Change) -> Change:
    return lambda root: change(root["graph_module"]["graph"])


def first_arg(kind: str, value: Any) -> Change:
    return nodes(lambda graph: graph["nodes"][-1]["inputs"][0].update(arg={kind: value}))


REFUSED: dict[str, tuple[Change, str]] = {
    "another schema": (lambda r: r["schema_version"].update(major=9), "schema version 9, and 8 is the one"),
    "no schema": (lambda r: r.pop("schema_version"), r"not as torch writes it \(KeyError: 'schema_version'\)"),
    "no graph": (lambda r: r.update(graph_module=None), "not as torch writes it"),
    "a graph inside": (first_arg("as_graph", {"name": "x", "graph": {}}), "an argument 'as_graph' that is not read"),
    "an object": (first_arg("as_custom_obj", {"name": "x", "class_fqn": "os.system"}), "'as_custom_obj' that is not read"),
    "a function": (first_arg("as_operator", "os.system"), "'as_operator' that is not read"),
    "an unknown value": (first_arg("as_tensor", {"name": "nothing"}), "uses 'nothing' before it is defined"),
    "no name": (first_arg("as_tensor", {"name": ["x"]}), "where a name belongs"),
    "a huge number": (first_arg("as_int", 2**64), "'as_int' that is not read"),
    "a truth for a number": (first_arg("as_int", True), "'as_int' that is not read"),
    "a string for a number": (first_arg("as_float", "1e5"), "'as_float' that is not read"),
    "another device": (first_arg("as_device", {"type": "meta", "index": None}), "names the device 'meta'"),
    "another layout": (first_arg("as_layout", 1), "'as_layout' that is not read"),
    "two kinds": (nodes(lambda g: g["nodes"][-1]["inputs"][0]["arg"].update(as_int=1)), "not as torch writes it"),
    "twice": (nodes(lambda g: g["nodes"].append(g["nodes"][-1])), "twice"),
    "not in order": (nodes(lambda g: g["nodes"].reverse()), "before it is defined"),
    "many arguments": (nodes(lambda g: g["nodes"][-1].update(inputs=g["nodes"][-1]["inputs"] * 20)), "does not take"),
    "a keyword": (nodes(lambda g: g["nodes"][-1]["inputs"][0].update(kind=2, name="os")), "does not take"),
    "an odd result": (nodes(lambda g: g["nodes"][-1].update(outputs=[{"as_string": "x"}])), "result of the kind 'as_string'"),
    "unknown output": (nodes(lambda g: g.update(outputs=[{"as_tensor": {"name": "x"}}])), "uses 'x' before"),
    "an output changes a weight": (
        lambda r: r["graph_module"]["signature"]["output_specs"].append({"buffer_mutation": {}}),
        "changes weights or inputs",
    ),
    "an input that is an object": (
        lambda r: r["graph_module"]["signature"]["input_specs"].__setitem__(0, {"custom_obj": {}}),
        "neither a tensor nor a weight",
    ),
    "a weight that is not there": (
        lambda r: r["graph_module"]["signature"]["input_specs"][0].update(buffer={"buffer_name": "x"}),
        "not as torch writes it",
    ),
    "a list": (lambda r: r["graph_module"].update(graph=[]), "not as torch writes it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_program_that_is_none_is_an_input_error(case: str, packed: Path) -> None:
    change, message = REFUSED[case]
    changed(packed, change)
    with pytest.raises(InputError, match=f"model\\.pte: .*{message}"):
        load_program(packed)


def weight(**values: Any) -> Change:
    return lambda root: next(iter(root["config"].values())).update(values)


def meta(**values: Any) -> Change:
    return lambda root: next(iter(root["config"].values()))["tensor_meta"].update(values)


BAD_WEIGHTS: dict[str, tuple[Change, str]] = {
    "pickled": (weight(use_pickle=True), "is pickled, and no pickle is ever read"),
    "pickled as one": (weight(use_pickle=1), "is pickled, and no pickle is ever read"),
    "an object": (weight(path_name="custom_obj_0", tensor_meta=None), "is pickled"),
    "elsewhere": (weight(path_name="../../../etc/passwd"), r"has no model/data/weights/\.\./\.\./\.\./etc/passwd"),
    "no name": (weight(path_name=5), "where a name belongs"),
    "type": (meta(dtype=99), "of a type or layout that a program may not have"),
    "odd type": (meta(dtype=[8]), "of a type or layout that a program may not have"),
    "layout": (meta(layout=1), "of a type or layout that a program may not have"),
    "too long": (meta(sizes=[{"as_int": 2}], strides=[{"as_int": 1}]), "is larger than its entry"),
    "beyond": (meta(storage_offset={"as_int": 1}), "is larger than its entry"),
    "spread": (meta(sizes=[{"as_int": 2**40}], strides=[{"as_int": 0}]), "is larger than its entry"),
    "negative": (meta(storage_offset={"as_int": -1}), "has sizes that no array has"),
    "expression": (meta(sizes=[{"as_expr": {"expr_str": "x"}}]), "not as torch writes it"),
    "axes": (meta(sizes=[{"as_int": 1}] * 17, strides=[{"as_int": 1}] * 17), "has sizes that no array has"),
    "uneven": (meta(sizes=[], strides=[{"as_int": 1}]), "not as torch writes it"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_are_no_arrays(case: str, packed: Path) -> None:
    change, message = BAD_WEIGHTS[case]
    changed(packed, change, WEIGHTS_CONFIG)
    with pytest.raises(InputError, match=f"model\\.pte.*{message}"):
        load_program(packed)


@pytest.mark.parametrize(
    "name",
    ["model/data/weights/model.pt", "model/data/constants/model.pt", "model/data/aotinductor/model/x.so",
     "other/models/model.json", "model/models/more.json", "model/data/sample_inputs/more.pt",
     "model/data/weights/more/weight_0"],
)  # fmt: skip
def test_entries_that_torch_would_unpickle_or_map(name: str, packed: Path) -> None:
    rewrite(packed, {name: b"x"})
    seal(packed)
    with pytest.raises(InputError, match=f"model\\.pte: entry {name} has no place in a portable program"):
        load_program(packed)


def test_a_program_that_was_exchanged_after_it_was_packed(packed: Path) -> None:
    rewrite(packed, {PROGRAM: b"{}"})
    with pytest.raises(InputError, match=r"entry model/models/model\.json does not match the manifest"):
        load_program(packed)


# --- running ---


def test_inputs_that_do_not_fit(lj_pte: Path) -> None:
    program, good = load_program(lj_pte), list(INPUTS[0])
    for index, wrong, message in (
        (0, good[0].float(), "input 0 of its program is torch.float64 with 2 axes, not torch.float32 with 2"),
        (0, good[0][0], "not torch.float64 with 1"),
        (0, good[0][:, :2], r"input 0 of its program has the shape \(27, 2\): 2 is not 3"),
        (1, good[1][:-1], "input 1 of its program has the shape"),
    ):
        with pytest.raises(InputError, match=message):
            program(*good[:index], wrong, *good[index + 1 :])
    with pytest.raises(InputError, match=f"takes {len(good)} inputs, not 2"):
        program(*good[:2])


def test_an_operation_that_fails_is_named(packed: Path) -> None:
    def change(graph: dict[str, Any]) -> None:
        node = next(node for node in graph["nodes"] if node["target"] == "torch.ops.aten.unsqueeze.default")
        node["inputs"][1]["arg"] = {"as_int": 77}

    program = load_program(changed(packed, nodes(change)))
    with pytest.raises(
        InputError, match=r"model\.pte: its program fails in torch\.ops\.aten\.unsqueeze\.default \(Dimension out"
    ):
        program(*INPUTS[0])


def test_values_are_forgotten_when_no_later_step_needs_them(lj_pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_program(lj_pte)
    alive: list[int] = []
    run = steps.Step.run

    def counted(step: steps.Step, values: list[Any]) -> None:
        run(step, values)
        alive.append(sum(value is not None for value in values[program.n_weights + len(INPUTS[0]) :]))

    monkeypatch.setattr(steps.Step, "run", counted)
    assert len(program(*INPUTS[0])) == len(program.outputs)
    assert alive[-1] == len({one.slot for one in program.outputs})
    assert max(alive) < len(program.steps) / 3


def test_no_step_tracks_gradients(lj_pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [one.clone().requires_grad_() if one.is_floating_point() else one for one in INPUTS[0]]
    run, tracked = steps.Step.run, []

    def watched(step: steps.Step, values: list[Any]) -> None:
        run(step, values)
        tracked.append(torch.is_grad_enabled())

    monkeypatch.setattr(steps.Step, "run", watched)
    assert not any(value.requires_grad for value in load_program(lj_pte)(*inputs))
    assert tracked
    assert not any(tracked)


def test_a_program_runs_where_its_weights_are() -> None:
    """Wherever it was traced: devices that it names are those of its loading."""
    reader = steps.Reader(torch.device("meta"))
    for kind in ("cpu", "cuda"):
        assert reader.argument({"as_device": {"type": kind, "index": None}}) == torch.device("meta")


def test_arguments_of_every_kind_that_is_read() -> None:
    reader = steps.Reader(torch.device("cpu"))
    a, b = reader.define("a"), reader.define("b")
    for entry, value in (
        ({"as_none": True}, None),
        ({"as_tensors": [{"name": "a"}, {"name": "b"}]}, [a, b]),
        ({"as_optional_tensors": [{"as_none": True}, {"as_tensor": {"name": "b"}}]}, [None, b]),
        ({"as_optional_tensor": {"as_tensor": {"name": "a"}}}, a),
        ({"as_sym_ints": [{"as_name": "a"}, {"as_int": -1}]}, [a, -1]),
        ({"as_sym_float": {"as_float": 0.5}}, 0.5),
        ({"as_ints": [1, 2]}, [1, 2]),
        ({"as_float": "-Infinity"}, float("-inf")),
        ({"as_floats": [1, 0.5]}, [1.0, 0.5]),
        ({"as_bools": [True, False]}, [True, False]),
        ({"as_string": "floor"}, "floor"),
        ({"as_scalar_type": 7}, torch.float32),
        ({"as_memory_format": 1}, torch.contiguous_format),
        ({"as_layout": 7}, torch.strided),
    ):
        assert reader.argument(entry) == value


# --- writing ---


def test_nothing_pickled_is_left_in_a_file(lj_pte: Path, dpa1_pte: Path) -> None:
    for path in (lj_pte, dpa1_pte):
        assert read_entry(path, SAMPLE) == b""
        with open_archive(path) as archive:
            for name in archive.namelist():
                data = archive.read(name)
                assert not data.startswith((b"\x80", b"PK")), name
        program = read_json(path, PROGRAM)
        assert all(node["metadata"] == {} for node in program["graph_module"]["graph"]["nodes"])
        for config in (WEIGHTS_CONFIG, CONSTANTS_CONFIG):
            assert all(one["use_pickle"] is False for one in read_json(path, config)["config"].values())


def test_a_file_of_torch_is_stripped(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    program = torch.export.export(torch.nn.Linear(2, 3).double(), (torch.zeros(1, 2, dtype=torch.float64),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path)
        assert len(read_entry(path, SAMPLE)) > 100
        strip_pickles(path)
        again = torch.export.load(path)
    assert read_entry(path, SAMPLE) == b""
    x = torch.randn(1, 2, dtype=torch.float64)
    assert torch.equal(again.module()(x), program.module()(x))


def test_pickled_weights_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),)), path)
    root = read_json(path, WEIGHTS_CONFIG)
    weight(use_pickle=True)(root)
    rewrite(path, {WEIGHTS_CONFIG: json.dumps(root).encode()})
    with pytest.raises(InputError, match="of a kind that only a pickle holds"):
        strip_pickles(path)
