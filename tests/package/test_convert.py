"""From file to file, and what deepmd-kit gets to see (test_deepmd_dicts.py has it read all of that)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from trees import same

from carryall.cli.main import main
from carryall.errors import InputError
from carryall.models import DPA1, LennardJones, SuttonChen, model_from_source, model_to_source
from carryall.models.combination import LinearEnergyModel
from carryall.models.dpa1.semantics import with_method
from carryall.models.eager import EagerPotential
from carryall.package.check import check_graphs
from carryall.package.convert import convert, for_deepmd, root_of
from carryall.package.export import source_of
from carryall.package.serialization import serialize_from_file
from carryall.package.sources import read_root, read_source, write_source
from combined_models import small_bridged, small_sum, small_table, small_zbl
from structures import small_dpa1

REFERENCE = Path(__file__).parents[1] / "reference_data"
SPIN = sorted(REFERENCE.glob("spin/*.dp"))[0]
FOUND = [path for form in ("*/*.dp", "bridging/*.json.gz") for path in REFERENCE.glob(form)]
FILES = sorted(path for path in FOUND if path.parent.name in ("bridging", "dpa1", "spin"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_dict_to_model_to_dict_is_stable(path: Path) -> None:
    """Once through a model is in the newest form; from then on nothing changes, not even the order of keys."""
    once = model_to_source(model_from_source(read_source(path)))
    twice = model_to_source(model_from_source(once))
    assert same(once, twice)
    written = for_deepmd({"model": once})["model"]
    assert same(written if written["type"] == "standard" else {**written, "type": once["type"]}, once)


@pytest.mark.parametrize("form", [".dp", ".yaml", ".yml", ".json", ".json.gz"])
@pytest.mark.parametrize("target", ["deepmd", "carryall"])
def test_every_form_for_both(tmp_path: Path, form: str, target: str, dpa1: DPA1) -> None:
    source = write_source(tmp_path / "source.json", {**source_of(dpa1), "model_def_script": {"seed": 1}})
    path = convert(source, tmp_path / f"to{form}", target=target)  # type: ignore[arg-type]
    root = serialize_from_file(path)
    assert root["model_def_script"] == {"seed": 1}
    assert root["software"] == "carryall"
    assert ("backend" in root) == (target == "deepmd")
    assert same(root["model"], model_to_source(dpa1))
    again = convert(path, tmp_path / f"again{form}", target=target)  # type: ignore[arg-type]
    assert again.read_bytes() == path.read_bytes()


def test_what_stands_for_whom_by_default(tmp_path: Path) -> None:
    assert "backend" in read_root(convert("water", tmp_path / "m.dp"))
    assert "backend" not in read_root(convert("water", tmp_path / "m.json.gz"))
    assert b'"value":[' in convert("water", tmp_path / "m.json", target="deepmd").read_bytes()
    assert b'"base64"' in convert("water", tmp_path / "m.json").read_bytes()


@pytest.mark.parametrize("make", [lambda: with_method(small_dpa1(), "legacy"), lambda: with_method(small_bridged(), "legacy")])
def test_padded_semantics_are_kept_beside_the_model(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    source = write_source(tmp_path / "source.json", source_of(make()))
    root = for_deepmd(root_of(source))
    assert "neighbor_graph_method" not in str(root["model"].keys()) + str([*root["model"].get("models", [{}])[0]])
    found = model_from_source(read_source(convert(source, tmp_path / "m.dp")))
    assert getattr(found, "neighbor_graph_method") == "legacy"  # noqa: B009


@pytest.mark.parametrize("make", [small_table, small_bridged, small_sum])
def test_same_energies_after_the_way_to_deepmd(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    if isinstance(model, LinearEnergyModel):
        model = LinearEnergyModel([small_dpa1(), small_table(("O", "H"))], ("O", "H"), weights=(0.7, -0.4))
    source = write_source(tmp_path / "source.json", source_of(model))
    root = read_root(convert(source, tmp_path / "m.dp"))
    assert root["model"]["type"] in ("zbl", "linear_ener")  # whole models that deepmd-kit has
    found = model_from_source(root["model"])
    for graph in check_graphs(model.spec)[:3]:  # type: ignore[arg-type]
        energies = [EagerPotential(one)(graph)["atomic_energy"] for one in (model, found)]  # type: ignore[arg-type]
        assert torch.equal(*energies)


@pytest.mark.parametrize(
    ("make", "name", "instead"),
    [
        (LennardJones.argon, "lennard_jones", "pack --target deepmd"),
        (lambda: SuttonChen(("Cu",)), "sutton_chen", "pack --target deepmd"),
        (small_zbl, "ziegler_biersack_littmark", "write_zbl_table"),
        (small_sum, "lennard_jones", "pack --target deepmd"),
    ],
)
def test_models_that_deepmd_does_not_have(tmp_path: Path, make: Callable[[], nn.Module], name: str, instead: str) -> None:
    source = write_source(tmp_path / "source.json", source_of(make()))
    for path in ("m.dp", "m.yaml"):
        with pytest.raises(InputError, match=f"no model of type '{name}'.*{instead}"):
            convert(source, tmp_path / path)
    kept = convert(source, tmp_path / "m.dp", target="carryall")
    assert same(read_source(kept), read_source(source))
    assert same(read_source(convert(kept, tmp_path / "m.json")), read_source(source))


def test_spin_models(tmp_path: Path) -> None:
    """deepmd-kit knows no margin: it is kept beside the model, and comes back."""
    model = model_to_source(model_from_source(read_source(SPIN)))
    source = write_source(tmp_path / "source.json", {"model": {**model, "neighbor_margin": 0.25}})
    path = convert(source, tmp_path / "m.dp")
    with h5py.File(path) as file:
        root = json.loads(file.attrs["json"])
    assert root["neighbor_margin"] == 0.25
    assert root["model"].keys() == {"type", "backbone_model", "spin"}
    assert read_source(path)["neighbor_margin"] == 0.25
    assert "neighbor_margin" not in read_root(convert(SPIN, tmp_path / "plain.dp"))


def test_unlike_semantics_in_one_model(tmp_path: Path) -> None:
    model = LinearEnergyModel([small_dpa1(), with_method(small_dpa1(), "legacy")])
    source = write_source(tmp_path / "source.json", source_of(model))
    with pytest.raises(InputError, match="differ in neighbor_graph_method"):
        convert(source, tmp_path / "m.dp")


def test_programs(tmp_path: Path) -> None:
    path = convert("lj-argon", tmp_path / "m.pte")
    assert read_source(convert(path, tmp_path / "m.json"))["type"] == "lennard_jones"
    with pytest.raises(InputError, match="expected one of"):
        convert("lj-argon", tmp_path / "m.txt")
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "absent.dp", tmp_path / "m.json")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = REFERENCE / "dpa1" / "a2_smooth.dp"
    assert main(["convert", str(source), str(tmp_path / "m.yaml")]) == 0
    assert "m.yaml" in capsys.readouterr().out
    assert np.array_equal(
        read_source(tmp_path / "m.yaml")["@variables"]["out_bias"], read_source(source)["@variables"]["out_bias"]
    )
    assert main(["convert", "lj-argon", str(tmp_path / "m.dp"), "--to", "deepmd"]) == 2
    assert "lennard_jones" in capsys.readouterr().err
    assert main(["convert", "lj-argon", str(tmp_path / "m.dp"), "--to", "carryall"]) == 0
