"""Dicts to files and back, by DeePMD's names: everything that was there, bit by bit, and the same bytes when written again."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from trees import same, trees

from carryall.errors import InputError
from carryall.models import LennardJones
from carryall.package.export import source_of
from carryall.package.load import load_packed
from carryall.package.manifest import METADATA, MODEL, SCRIPT
from carryall.package.serialization import deserialize_to_file, serialize_from_file
from combined_models import small_table

REFERENCE = Path(__file__).parents[1] / "reference_data"
FORMS = (".json", ".json.gz", ".dp", ".yaml", ".yml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees")


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(tree=trees())
def test_every_tree_comes_back(form: str, folder: Path, tree: dict[str, Any]) -> None:
    if form in (".yaml", ".yml"):
        tree = plain_nan(tree)
    data = {"software": "carryall", "model": tree}
    path = deserialize_to_file(folder / f"tree{form}", data)
    first = path.read_bytes()
    found = serialize_from_file(path)
    assert same(found, data)
    assert deserialize_to_file(path, found).read_bytes() == first
    assert [one.name for one in folder.iterdir() if one.name.startswith(".")] == []


def plain_nan(tree: Any) -> Any:
    """YAML has one NaN: bits that say which are lost."""
    if isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        return np.where(np.isnan(tree), np.array(np.nan, tree.dtype), tree)
    if isinstance(tree, dict):
        return {key: plain_nan(one) for key, one in tree.items()}
    return [plain_nan(one) for one in tree] if isinstance(tree, list) else tree


def test_arrays_keep_their_bits(tmp_path: Path) -> None:
    odd = np.array([0x7FF8000000000001, 0x7FF0000000000000, 0x8000000000000000, 1], dtype=np.uint64).view(np.float64)
    values = {"odd": odd, "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(3, dtype=">f4")}
    for form in (".json", ".json.gz", ".dp"):
        found = serialize_from_file(deserialize_to_file(tmp_path / f"m{form}", {"model": values}))["model"]
        assert found["odd"].view(np.uint64).tolist() == odd.view(np.uint64).tolist()
        assert found["big"].dtype == np.dtype("float32")
        assert found["big"].tolist() == [0, 1, 2]
        assert found["fortran"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("model", ["dpa1/a2_smooth", "dpa1/float32_strip", "bridging/zbl", "bridging/linear"])
def test_what_deepmd_wrote_comes_back(tmp_path: Path, model: str) -> None:
    """Its root goes through every form, and the model of the last is the model of the first."""
    data = serialize_from_file(REFERENCE / f"{model}.dp")
    for form in FORMS:
        found = serialize_from_file(deserialize_to_file(tmp_path / f"m{form}", data))
        assert same(found, data), form


def test_a_program_keeps_the_dict(tmp_path: Path) -> None:
    data = {**source_of(small_table()), "model_def_script": {"descriptor": {"rcut": 3.0}}, "time": "then"}
    first = deserialize_to_file(tmp_path / "first.pte", data, check=False)
    found = serialize_from_file(first)
    assert found["time"] == "then"
    assert found["model_def_script"] == {"descriptor": {"rcut": 3.0}}
    assert same(found["model"], data["model"])
    second = deserialize_to_file(tmp_path / "second.pte", found, check=False)
    contents = []
    for path in (first, second):
        with zipfile.ZipFile(path) as archive:
            facts = json.loads(archive.read(METADATA))
            contents.append([archive.read(MODEL), archive.read(SCRIPT), {**facts, "created": ""}])
    assert contents[0] == contents[1]


def test_what_is_in_a_program_runs(tmp_path: Path) -> None:
    data = serialize_from_file(deserialize_to_file(tmp_path / "lj.json", source_of(LennardJones.argon())))
    path = deserialize_to_file(tmp_path / "lj.pte", data)
    assert load_packed(path).spec.cutoff == 8.5


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.json", {"weights": 1}, "has no 'model'"),
        ("m.json", {"model": [1]}, "has no 'model'"),
        ("m.txt", {"model": {}}, "the suffix says what to write"),
        ("m.json", {"model": {1: 2}}, "keys must be strings"),
        ("m.yaml", {"model": {"a": {1: 2}}}, "keys must be strings"),
        ("m.json", {"model": {"a": float("nan")}}, "cannot be written"),
        ("m.dp", {"model": {"a": float("inf")}}, "cannot be written"),
        ("m.json", {"model": {"a": object()}}, "cannot be written"),
        ("m.json", {"model": {"a": np.array([1 + 2j])}}, "dtype 'complex128'"),
        ("m.dp", {"model": {"a": "/variable_0000"}}, "names an array"),
        ("m.json", {"model": {"@class": "np.ndarray"}}, "stands for an array"),
        ("m.pte", {"model": {"type": "unheard"}}, "unknown model type"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, name: str, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        deserialize_to_file(tmp_path / name, data)
    assert not list(tmp_path.iterdir())


def test_only_files_that_hold_a_dict_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"")
    for name in ("m.pt", "m"):
        with pytest.raises(InputError, match=r"expected \.json"):
            serialize_from_file(tmp_path / name)


def test_a_bare_model_gets_a_root(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"type": "lennard_jones"}')
    assert serialize_from_file(tmp_path / "m.json") == {"model": {"type": "lennard_jones"}}
