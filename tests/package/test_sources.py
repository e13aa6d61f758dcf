"""Source dicts in files of every form."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

from carryall.errors import InputError
from carryall.models import DPA1, LennardJones, model_from_source, model_to_source
from carryall.package.archive import write_archive
from carryall.package.export import source_of
from carryall.package.sources import is_source, read_root, read_source, write_source

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


# -- files of others, and files that mean harm


def archive_of(path: Path, entries: dict[str, Any]) -> Path:
    write_archive(
        path, ((name, value if isinstance(value, bytes) else json.dumps(value).encode()) for name, value in entries.items())
    )
    return path


@pytest.mark.parametrize("folder", ["frozen/extra/", "model/extra/", "extra/"])
def test_the_source_in_a_file_of_deepmd(tmp_path: Path, folder: str) -> None:
    """As deepmd-kit lays it out; no program is there, so none can be run."""
    source = read_source(REFERENCE)
    root = {"software": "deepmd-kit", "backend": "pt_expt", "model": as_lists(source)}
    entries = {
        f"{folder}model.json": root,
        f"{folder}model_def_script.json": {"type_map": ["Cu"]},
        f"{folder}metadata.json": {},
    }
    for name in ("m.pte", "m.pt2"):
        path = archive_of(tmp_path / name, {"frozen/archive_format": b"pt2", **entries})
        found = read_root(path)
        assert found["software"] == "deepmd-kit"
        assert found["model_def_script"] == {"type_map": ["Cu"]}
        assert_same_model(found["model"], source)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model/extra/metadata.json": {}}, "carries no source"),
        ({"a/extra/model.json": {}, "b/extra/model.json": {}}, "holds 2 models"),
        ({"model/extra/model.json": b"\x80\x04pickle"}, "not valid JSON"),
        ({"model/extra/model.json": [1]}, "holds no model dict"),
        ({"model/extra/notmodel.json": {}}, "carries no source"),
    ],
)
def test_files_of_others_without_one_source(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    path = archive_of(tmp_path / "foreign.pt2", entries)
    with pytest.raises(InputError, match=f"foreign.pt2.*{message}"):
        read_source(path)


def hdf5(change: Callable[[h5py.File], None], folder: Path) -> Path:
    path = folder / "odd.dp"
    with h5py.File(path, "w") as file:
        file.attrs["json"] = '{"model": {"@variables": {"w": "/variable_0000"}}}'
        change(file)
    return path


def elsewhere(file: h5py.File) -> None:
    other = Path(file.filename).with_name("other.dp")
    with h5py.File(other, "w") as target:
        target["variable_0000"] = np.ones(3)
    file["variable_0000"] = h5py.ExternalLink(str(other), "/variable_0000")


def soft(file: h5py.File) -> None:
    file["hidden"] = np.ones(3)
    file["variable_0000"] = h5py.SoftLink("/hidden")


def raw(file: h5py.File) -> None:
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(bytes(24))
    file.create_dataset("variable_0000", (3,), "f8", external=[(str(secret), 0, 24)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(Path(file.filename).with_name("other.dp")), "x", (3,))
    file.create_virtual_dataset("variable_0000", layout)


def group(file: h5py.File) -> None:
    file.create_group("variable_0000")


def bomb(file: h5py.File) -> None:
    file.create_dataset("variable_0000", (1 << 20, 1 << 20), "f8", chunks=(1024, 1024), compression="gzip")


def many_bombs(file: h5py.File) -> None:
    names = [f"/variable_{k:04d}" for k in range(4)]
    file.attrs["json"] = json.dumps({"model": names})
    for name in names:
        file.create_dataset(name, (5 << 20,), "f8", chunks=(1 << 20,))


def objects(file: h5py.File) -> None:
    file.create_dataset("variable_0000", data=np.array(["text"], dtype=object), dtype=h5py.string_dtype())


def number(file: h5py.File) -> None:
    file.attrs["json"] = 3


def numbers(file: h5py.File) -> None:
    file.attrs["json"] = ["{}"] * 3


def deep(file: h5py.File) -> None:
    file.attrs["json"] = "[" * 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (elsewhere, "leads elsewhere"),
        (soft, "leads elsewhere"),
        (raw, "in another file"),
        (virtual, "in another file"),
        (group, "no array of numbers"),
        (objects, "no array of numbers"),
        (bomb, "far more than the file holds"),
        (many_bombs, "far more than the file holds"),
        (number, "is no text"),
        (numbers, "is no text"),
        (deep, "not a DeePMD model file"),
        (lambda file: None, "is missing"),
    ],
)
def test_hdf5_that_points_elsewhere_or_claims_too_much(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    path = hdf5(change, tmp_path)
    tracemalloc.start()
    with pytest.raises(InputError, match=f"odd.dp.*{message}"):
        read_source(path)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {k: v}"] + [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bomb.yaml", laughs(12), "references multiply"),
        ("bomb.yaml", merges(12), "not valid YAML"),
        ("odd.yaml", "model: {when: 2020-01-01}", "type date"),
        ("odd.yaml", "model: {1: 2}", "the key 1 is no text"),
        ("odd.yaml", "model: !!set {a, b}", "type set"),
        ("odd.yaml", "model: {a: .nan}", "nan outside of an array"),
        ("odd.json", '{"model": {"a": Infinity}}', "inf outside of an array"),
        ("deep.yaml", "[" * 20_000, "not valid YAML"),
        ("deep.json", "[" * 200_000, "nested too deep"),
        ("long.json", '{"model": ' + "9" * 10_000 + "}", "not valid JSON"),
    ],
)
def test_text_that_grows_or_means_nothing(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"(?s){name}.*{message}"):
        read_source(tmp_path / name)


def test_references_of_deepmd_are_read(tmp_path: Path) -> None:
    """PyYAML writes a list that is there twice once, and a reference."""
    names = ["Cu", "O"]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"type_map": names, "again": names}}))
    assert "&id001" in (tmp_path / "m.yaml").read_text()
    assert read_source(tmp_path / "m.yaml") == {"type_map": names, "again": names}


def test_compressed_text_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * (300 << 20), 9))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"bomb\.json\.gz unpacks to more than"):
        read_source(path)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


def test_the_method_beside_a_model_goes_into_it(tmp_path: Path) -> None:
    source = read_source(REFERENCE)
    combined = {"type": "linear", "models": [source, {"type": "pairtab"}]}
    path = write_source(tmp_path / "m.json", {"neighbor_graph_method": "legacy", "model": combined})
    found = read_source(path)
    assert found["models"][0]["neighbor_graph_method"] == "legacy"
    assert "neighbor_graph_method" not in found
    assert "neighbor_graph_method" not in found["models"][1]
