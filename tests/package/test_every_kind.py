"""Every kind of model in the registry: to its dict and back, through files, and as a packed program beside eager.

A kind that is added to the registry fails here until it has a sample, and then passes everything below.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from carryall import load, pack
from carryall.graph import NeighborGraph, PotentialSpec
from carryall.models import EagerPotential, Ewald, LearnedEwald
from carryall.models.registry import READERS, model_from_source, model_to_source
from carryall.package.arrays import from_json, to_json
from carryall.package.check import check_graphs, deviation, with_parameters
from carryall.package.load import edge_places
from carryall.package.manifest import MANIFEST, METADATA, MODEL, SCRIPT
from carryall.package.metadata import Metadata, json_schema
from carryall.package.program import load_program
from carryall.package.run import EDGE_OUTPUTS, PackedPotential
from carryall.package.serialization import deserialize_to_file, serialize_from_file
from carryall.package.signature import to_inputs
from carryall.package.trace import LARGEST, trace
from combined_models import small_bridged, small_sum, small_table, small_zbl
from message_passing import small_message_passing
from spin_models import ChargedSprings, small_spin
from structures import add_ghosts, small_alloy, small_dpa1, small_lj

SAMPLES: dict[str, Callable[[], nn.Module]] = {
    "standard": lambda: small_dpa1(attn_layer=1, numb_fparam=2, numb_aparam=1),
    "zbl": small_bridged,
    "linear": small_sum,
    "pairtab": small_table,
    "ziegler_biersack_littmark": small_zbl,
    "lennard_jones": small_lj,
    "sutton_chen": small_alloy,
    "spin_ener": small_spin,
    "message_passing": small_message_passing,  # of the examples, registered as a user would
    "ewald": lambda: Ewald(("Cu", "Au"), (0.5, -0.5), 3.5, 1e-4),
    "ewald_learned": lambda: LearnedEwald(("Cu", "Au"), 3.5, (0.5, -0.5), accuracy=1e-4, width=4),
    "charged_springs": lambda: ChargedSprings((0.5, 1.0), spin=True),
}
ALIASES = {"linear_ener": "linear"}
OF_OTHER_TESTS = {"tangled"}


def test_every_kind_has_a_sample() -> None:
    for kind, build in SAMPLES.items():
        assert model_to_source(build())["type"] in (kind, *(alias for alias, of in ALIASES.items() if of == kind))
    assert set(SAMPLES) | set(ALIASES) == set(READERS) - OF_OTHER_TESTS


@pytest.fixture(scope="module", params=SAMPLES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return SAMPLES[request.param]().eval()


@pytest.fixture(scope="module")
def pte(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(model, tmp_path_factory.mktemp("kind") / "model.pte", training_config={"seed": 3}, check=False)


def assert_same_tree(a: Any, b: Any) -> None:
    """Equal to the bit, in type, order of keys, dtype and shape."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same_tree(one, other)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b or (a != a and b != b)


def test_model_and_dict(model: nn.Module) -> None:
    source = model_to_source(model)
    again = model_from_source(from_json(to_json(source)))
    assert_same_tree(from_json(to_json(source)), from_json(to_json(model_to_source(again))))
    graphs = check_graphs(model.spec)  # type: ignore[arg-type]
    assert deviation(EagerPotential(again), EagerPotential(model), graphs)[0] == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".yaml", ".dp"])
def test_model_and_source_files(model: nn.Module, suffix: str, tmp_path: Path, pte: Path) -> None:
    root = serialize_from_file(pte)
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    deserialize_to_file(first, root)
    found = serialize_from_file(first)
    assert_same_tree(json.loads(to_json(found["model"])), json.loads(to_json(root["model"])))
    deserialize_to_file(second, found)
    assert_same_tree(serialize_from_file(second), found)
    if suffix != ".dp":
        assert second.read_bytes() == first.read_bytes()


def test_the_program_is_the_model_on_graphs_that_the_trace_never_saw(model: nn.Module, pte: Path) -> None:
    packed, eager = load(pte), EagerPotential(model)  # type: ignore[arg-type]
    assert packed.spec == eager.spec
    worst, where = deviation(packed, eager, check_graphs(packed.spec))
    assert worst <= 1e-12, where


def test_a_part_of_the_program_gives_a_part_of_its_outputs(model: nn.Module, pte: Path) -> None:
    packed = load(pte)
    assert isinstance(packed, PackedPotential)
    if packed.spec.message_passing:
        pytest.skip("is evaluated whole")
    program = load_program(pte)
    part = program.giving(edge_places(packed.facts))
    assert 0 < len(part.steps) < len(program.steps)
    for graph in check_graphs(packed.spec):
        inputs = to_inputs(graph, packed.spec)
        whole = dict(zip(packed.facts.output_keys, program(*inputs), strict=True))
        expected = [whole[name] for name in EDGE_OUTPUTS if name in whole]
        assert all(torch.equal(a, b) for a, b in zip(part(*inputs), expected, strict=True))


def test_the_program_takes_sizes_that_happen_to_be_equal_and_none(model: nn.Module, pte: Path) -> None:
    packed, eager = load(pte), EagerPotential(model)  # type: ignore[arg-type]
    for graph in odd_graphs(eager.spec):
        worst, where = deviation(packed, eager, [graph])
        assert worst <= 1e-12, where


def odd_graphs(spec: PotentialSpec) -> list[NeighborGraph]:
    """As many ghosts as local atoms; atoms as systems; nothing but ghosts; nothing; more rank than anybody needs."""
    whole = check_graphs(spec)[1]
    generator = torch.Generator().manual_seed(1)
    n = whole.n_atoms
    alone = whole.replace(
        edge_center=whole.edge_center[:0], edge_neighbor=whole.edge_neighbor[:0], edge_shift=whole.edge_shift[:0],
        edge_mask=whole.edge_mask[:0], ptr=torch.zeros_like(whole.ptr),
    )  # fmt: skip
    apart = alone.replace(system=torch.arange(n), cell=whole.cell.expand(n, 3, 3).contiguous())
    nothing = alone.replace(
        positions=alone.positions[:0], atom_types=alone.atom_types[:0], system=alone.system[:0], ptr=alone.ptr[:1]
    )
    graphs = [add_ghosts(check_graphs(spec)[0]), apart, nothing, whole.replace(rank=torch.arange(n + 5))]
    if not spec.message_passing:  # ghosts of nobody
        even = {name: getattr(alone, name)[:6] for name in ("positions", "atom_types", "system")}
        graphs += [alone.replace(ptr=alone.ptr[:1]), alone.replace(**even, ptr=alone.ptr[:4])]
    return [with_parameters(graph, spec, generator) for graph in graphs]


def test_nothing_is_specialised(model: nn.Module) -> None:
    program = trace(model)
    assert [str(node.target) for node in program.graph.nodes if "assert" in str(node.target)] == []
    assert {(int(r.lower), int(r.upper)) for r in program.range_constraints.values()} == {(0, LARGEST)}
    sizes = {str(size) for node in program.graph.nodes if node.op == "placeholder" for size in sizes_of(node)}
    # atoms, systems, edges, ptr, local, rank, ghosts where they are exchanged, k vectors and places where it is long-range
    spec: Any = model.spec
    assert len([size for size in sizes if not size.isdigit()]) == 6 + spec.message_passing + 2 * spec.long_range


def sizes_of(node: torch.fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, torch.Tensor) else []


def test_metadata_follow_the_schema(pte: Path) -> None:
    facts = json.loads(zipfile.ZipFile(pte).read(METADATA))
    assert set(facts) >= set(Metadata.model_fields)
    assert [one["name"] for one in facts["input_defs"]] == facts["input_keys"]
    assert [one["name"] for one in facts["output_defs"]] == facts["output_keys"]
    assert set(facts) <= set(json_schema()["properties"])


def test_the_schema_in_the_repository_is_that_of_the_code() -> None:
    committed = Path(__file__).parents[2] / "docs" / "metadata.schema.json"
    assert json.loads(committed.read_text()) == json_schema(), "run scripts/make_metadata_schema.py"


def test_written_again_a_file_has_the_same_content(model: nn.Module, pte: Path, tmp_path: Path) -> None:
    again = deserialize_to_file(tmp_path / "again.pte", serialize_from_file(pte))
    assert_same_tree(serialize_from_file(again), serialize_from_file(pte))
    with zipfile.ZipFile(pte) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()
        for name in first.namelist():
            a, b = first.read(name), second.read(name)
            if name in (METADATA, MANIFEST):  # hold the time
                a, b = (without_time(name, one) for one in (a, b))
            assert a == b, name
        assert json.loads(second.read(SCRIPT)) == {"seed": 3}
        assert first.read(MODEL) == second.read(MODEL)


def without_time(name: str, data: bytes) -> Any:
    values = json.loads(data)
    if name == METADATA:
        return {key: value for key, value in values.items() if key != "created"}
    return {key: value for key, value in values["entries"].items() if key != METADATA}
