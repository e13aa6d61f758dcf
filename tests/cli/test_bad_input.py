"""What cannot be used is refused in one line that says what to do; nothing is written."""

import pytest
import yaml
from command_line import argon, dimer, refused, write

BAD_FRAMES = {
    "missing": (None, "no such file"),
    "element": (dimer("Xx"), "not a chemical element"),
    "unknown element": (dimer("Cu"), "it knows Ar"),
    "empty": ('0\nLattice="5 0 0 0 5 0 0 0 5"\n', "0 atoms: remove it"),
    "nothing": ("", "holds no frame"),
    "nan label": (dimer().replace('pbc="T T T"', 'pbc="T T T" energy=nan'), "expected finite numbers"),
    "nan position": (dimer(distance=float("nan")), "expected finite numbers"),
    "flat cell": (dimer().replace("0 0 20", "0 20 0"), "no volume"),
    "coincident": (dimer(distance=0.0), "remove one or move it"),
    "truncated": ("5" + dimer()[1:], "truncated"),
}


@pytest.mark.parametrize("verb", ["eval", "relax", "md"])
@pytest.mark.parametrize("case", list(BAD_FRAMES))
def test_structures(case, verb, tmp_path, capsys):
    text, expected = BAD_FRAMES[case]
    path, out = tmp_path / "bad.extxyz", tmp_path / "out"
    if text is not None:
        path.write_text(text)
    arguments = ["eval", "lj-argon", path] if verb == "eval" else [verb, path, "--model", "lj-argon"]
    line = refused([*arguments, "--out", out], capsys)
    assert expected in line
    assert "bad.extxyz" in line
    assert not out.exists()


@pytest.mark.parametrize("case", ["missing", "empty", "nan label", "flat cell", "coincident"])
def test_training_data(case, tmp_path, capsys):
    text, expected = BAD_FRAMES[case]
    path, out = tmp_path / "bad.extxyz", tmp_path / "out"
    if text is not None:
        path.write_text(text if "energy" in text else text.replace("pbc=", "energy=-1.0 pbc="))
    line = refused(["train", "--data.train", path, "--out", out, "--data.validation-fraction", "0"], capsys)
    assert expected in line
    assert not (out / "checkpoint.pt").exists()


def test_configuration(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    assert "no such file" in refused(["train", config], capsys)
    config.write_text(yaml.safe_dump({"data": {"train": ["a.extxyz"]}, "n_stepss": 3}))
    line = refused(["train", config], capsys)
    assert "'n_stepss'" in line
    assert "perhaps you meant 'n_steps'" in line
    config.write_text(yaml.safe_dump({"data": {"train": ["a.extxyz"]}, "model": {"descriptor": {"rcutt": 3}}}))
    assert "perhaps you meant 'rcut'" in refused(["train", config], capsys)
    config.write_text("a: [")
    assert "not valid YAML" in refused(["train", config], capsys)


def test_potentials(tmp_path, capsys):
    start = write(tmp_path / "start.extxyz", [argon()])
    out = tmp_path / "out"
    line = refused(["md", start, "--model", "lj-argn", "-o", out], capsys)
    assert "perhaps you meant 'lj-argon'" in line
    (tmp_path / "model.pt2").write_bytes(b"not a potential")
    assert "not a packed potential" in refused(["md", start, "--model", tmp_path / "model.pt2", "-o", out], capsys)
    assert "not a checkpoint" in refused(["pack", _text(tmp_path / "model.pt"), tmp_path / "model.pte"], capsys)
    assert ".pt2" in refused(["pack", "lj-argon", tmp_path / "model.bin"], capsys)
    assert "no such file" in refused(["inspect", tmp_path / "absent.pt2"], capsys)
    assert "start.extxyz" in refused(["md", "--model", tmp_path / "model.pt", "-o", out], capsys)
    assert not out.exists()


def test_labels_and_settings(tmp_path, capsys):
    start = write(tmp_path / "start.extxyz", [argon()])
    assert "no labels" in refused(["eval", "lj-argon", start, "--out", tmp_path / "eval"], capsys)
    assert not (tmp_path / "eval").exists()
    assert "timestep" in refused(["md", start, "--model", "lj-argon", "--timestep", "0", "-o", tmp_path / "md"], capsys)
    assert "fmax" in refused(["relax", start, "--model", "lj-argon", "--fmax", "-1", "-o", tmp_path / "relax"], capsys)
    assert not (tmp_path / "relax").exists()


def _text(path):
    path.write_text("not a checkpoint")
    return path
