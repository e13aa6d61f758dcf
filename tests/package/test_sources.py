"""Source dicts in files of every form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

from carryall.errors import InputError
from carryall.models import DPA1, LennardJones, model_from_source, model_to_source
from carryall.package.export import source_of
from carryall.package.sources import is_source, read_source, write_source

REFERENCE = Path(__file__).parents[1] / "reference_data" / "dpa1" / "a2_smooth.dp"


def as_lists(tree: Any) -> Any:
    """DeePMD's text form: arrays as nested lists with a dtype."""
    if isinstance(tree, np.ndarray):
        return {"@class": "np.ndarray", "@is_variable": True, "dtype": tree.dtype.name, "value": tree.tolist()}
    if isinstance(tree, dict):
        return {key: as_lists(value) for key, value in tree.items()}
    return [as_lists(value) for value in tree] if isinstance(tree, list) else tree


def weights(source: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dict(model_from_source(source).state_dict())


def assert_same_model(first: dict[str, Any], second: dict[str, Any]) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_dp_json_and_yaml_hold_the_same_model(tmp_path: Path) -> None:
    source = read_source(REFERENCE)
    assert source["descriptor"]["rcut"] == 4.5
    assert isinstance(source["@variables"]["out_bias"], np.ndarray)
    root = {"backend": "dpmodel", "model": as_lists(source), "model_def_script": {}}
    (tmp_path / "m.json").write_text(json.dumps(root))
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(json.dumps(root).encode()))
    for name in ("m.yaml", "m.yml"):
        (tmp_path / name).write_text(yaml.dump(root, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    (tmp_path / "bare.json").write_text(json.dumps(as_lists(source)))
    for path in sorted(tmp_path.iterdir()):
        assert is_source(path)
        assert_same_model(read_source(path), source)


@pytest.mark.parametrize("name", ["model.json", "model.json.gz"])
def test_write_and_read_back(tmp_path: Path, name: str, dpa1: DPA1) -> None:
    path = write_source(tmp_path / name, source_of(dpa1))
    assert_same_model(read_source(path), model_to_source(dpa1))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    again = write_source(tmp_path / f"again-{name}", source_of(dpa1))
    assert again.read_bytes() == path.read_bytes()  # no dates inside


def test_the_source_inside_a_packed_file(dpa1: DPA1, dpa1_pte: Path) -> None:
    assert_same_model(read_source(dpa1_pte), model_to_source(dpa1))


def test_analytic_models_have_a_source_too(tmp_path: Path) -> None:
    path = write_source(tmp_path / "lj.json", source_of(LennardJones.argon()))
    assert isinstance(model_from_source(read_source(path)), LennardJones)


def write_bad(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "no_attribute.dp":
        with h5py.File(path, "w") as file:
            file["variable_0000"] = np.zeros(3)
    elif name == "text.dp":
        path.write_text("not HDF5")
    elif name == "broken.json":
        path.write_text('{"model": ')
    elif name == "list.json":
        path.write_text("[1, 2]")
    elif name == "model_is_text.json":
        path.write_text('{"model": "x"}')
    elif name == "broken.yaml":
        path.write_text("a: [1, 2")
    elif name == "code.yaml":
        path.write_text("model: !!python/object/apply:os.getcwd []")
    elif name == "binary.yaml":
        path.write_bytes(b"\x00\x01\xff")
    elif name == "cut.json.gz":
        path.write_bytes(gzip.compress(b'{"model": {}}' * 50)[:-12])
    elif name == "not.json.gz":
        path.write_text("{}")
    return path


BAD = {
    "no_attribute.dp": "not a DeePMD model file",
    "text.dp": "not a DeePMD model file",
    "broken.json": "not valid JSON",
    "list.json": "holds no model dict",
    "model_is_text.json": "holds no model dict",
    "broken.yaml": "is not valid YAML",
    "code.yaml": "is not valid YAML",
    "binary.yaml": "is not valid YAML",
    "cut.json.gz": "cannot be read",
    "not.json.gz": "cannot be read",
    "absent.json": "no such file",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    path = write_bad(tmp_path, name)
    with pytest.raises(InputError, match=rf"(?s){name}.*{BAD[name]}|{BAD[name]}.*{name}"):
        read_source(path)
