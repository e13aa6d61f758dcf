"""Each verb on small input."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from command_line import SMALL_MODEL, argon, columns, dimer, is_png, refused, write

from carryall.cli.main import main
from carryall.data import read_structures


def test_inspect(dpa1_pte, capsys):
    assert main(["inspect", str(dpa1_pte)]) == 0
    assert "cutoff" in capsys.readouterr().out
    assert main(["inspect", str(dpa1_pte), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["metadata"]["kind"] == "pte"
    assert facts["entries"]


def test_rebuild(tmp_path, capsys):
    kept = Path(__file__).parents[1] / "reference_data" / "packed" / "lj-argon-0.1.pte.gz"
    old, new = tmp_path / "old.pte", tmp_path / "new.pte"
    old.write_bytes(gzip.decompress(kept.read_bytes()))
    assert main(["rebuild", str(old), str(new)]) == 0
    assert "LennardJones" in capsys.readouterr().out
    assert main(["inspect", str(new)]) == 0
    out = capsys.readouterr().out
    assert "inputs of the program" in out
    assert "eV, -dE/dstrain" in out
    assert "expected a packed file" in refused(["rebuild", "lj-argon", new], capsys)
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(old.read_bytes()[:-100])
    assert "damaged.pte" in refused(["rebuild", damaged, tmp_path / "other.pte"], capsys)
    assert not (tmp_path / "other.pte").exists()


def test_pack_options_are_checked_before_anything_is_made(tmp_path, capsys):
    line = refused(["pack", "lj-argon", tmp_path / "m.pt2", "--cpu-level", "avx9"], capsys)
    assert "cpu level 'avx9'" in line
    assert "nothing to compress" in refused(["pack", "lj-argon", tmp_path / "m.pte", "--compress"], capsys)
    assert "give a name that ends in .pt2" in refused(["pack", "lj-argon", tmp_path / "m.pte", "--target", "deepmd"], capsys)
    assert not list(tmp_path.iterdir())


def test_eval(tmp_path, capsys):
    data = write(tmp_path / "data.extxyz", [argon(labels=True, seed=seed) for seed in range(3)])
    assert main(["eval", "lj-argon", str(data), "--out", str(tmp_path / "eval")]) == 0
    assert "meV/atom" in capsys.readouterr().out
    rows = {row["quantity"]: row for row in columns(tmp_path / "eval" / "errors.csv")}
    assert set(rows) == {"energy", "forces", "stress"}
    assert all(float(row["rmse"]) < 1e-6 for row in rows.values())
    assert is_png(tmp_path / "eval" / "parity.png")


def test_relax_sets_failures_aside(tmp_path, capsys):
    files = [write(tmp_path / "a.extxyz", [argon(seed=0), argon(seed=1)]), tmp_path / "absent.cif"]
    for name, text in (("copper", dimer("Cu")), ("touching", dimer(distance=0.0)), ("pair", dimer())):
        files.append(tmp_path / f"{name}.extxyz")
        files[-1].write_text(text)
    out = tmp_path / "out"
    assert main(["relax", *map(str, files), "--model", "lj-argon", "-o", str(out), "--fmax", "0.01"]) == 0
    rows = columns(out / "results.csv")
    assert [row["outcome"] for row in rows] == ["converged", "converged", "failed", "failed", "failed", "converged"]
    assert [row["input"] for row in rows] == [str(files[i]) for i in (0, 0, 1, 2, 3, 4)]
    assert [row["frame"] for row in rows] == ["0", "1", "", "0", "0", "0"]
    assert all(float(row["fmax"]) <= 0.01 for row in rows if row["outcome"] == "converged")
    reasons = [row["reason"] for row in rows[2:5]]
    assert "no such file" in reasons[0]
    assert "Cu" in reasons[1]
    assert "coincide" in reasons[2]
    relaxed = read_structures(out / "relaxed.extxyz")
    assert [one.info["source"] for one in relaxed] == [str(files[i]) for i in (0, 0, 4)]
    assert capsys.readouterr().err.count("set aside") == 3


def test_relax_without_anything_usable(tmp_path, capsys):
    (tmp_path / "copper.extxyz").write_text(dimer("Cu"))
    line = refused(["relax", tmp_path / "copper.extxyz", "--model", "lj-argon", "-o", tmp_path / "out"], capsys)
    assert "it knows Ar" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["lj-argon", "sutton-chen"])
def test_md_of_built_in_structures(model, tmp_path):
    out = tmp_path / "md"
    flags = ["--n-steps", "4", "--log-interval", "2", "--trajectory-interval", "4", "-o", str(out)]
    assert main(["md", "--model", model, *flags]) == 0
    rows = columns(out / "log.csv")
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert (out / "log.csv").read_text().splitlines()[1].startswith(",,fs,K,eV,eV,eV,GPa,")
    assert len(read_structures(out / "trajectory.extxyz")) == 2
    assert read_structures(out / "final.extxyz")[0].n_atoms == 256
    assert is_png(out / "thermo.png")


def test_md_of_files_and_resume(tmp_path, capsys):
    start = write(tmp_path / "start.extxyz", [argon(seed=0), argon(seed=1)])
    out = tmp_path / "md"
    flags = ["md", str(start), "--model", "lj-argon", "--ensemble", "nve", "--log-interval", "5", "-o", str(out)]
    assert main([*flags, "--n-steps", "5"]) == 0
    assert "--resume" in refused([*flags, "--n-steps", "10"], capsys)
    assert main([*flags, "--n-steps", "10", "--resume"]) == 0
    rows = columns(out / "log.csv")
    assert [(row["step"], row["system_id"]) for row in rows] == [(step, system) for step in ("0", "5", "10") for system in "01"]


def test_train_then_pack(tmp_path, capsys):
    data = write(tmp_path / "data.extxyz", [argon(labels=True, seed=seed) for seed in range(4)])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": [str(data)]}, "n_steps": 1, "model": SMALL_MODEL}))
    out = tmp_path / "training"
    flags = ["train", str(config), "--out", str(out), "--n-steps", "3", "--model.fitting.neuron", "4", "4"]
    assert main(flags) == 0
    assert "training" in capsys.readouterr().out
    assert [row["step"] for row in columns(out / "learning_curve.csv")] == ["3"]
    assert is_png(out / "learning_curve.png")
    assert yaml.safe_load((out / "config.yaml").read_text())["n_steps"] == 3
    assert main(["pack", str(out / "best.pt"), str(tmp_path / "model.pte")]) == 0
    assert main(["eval", str(tmp_path / "model.pte"), str(data), "--out", str(tmp_path / "eval")]) == 0


def test_train_resumes(tmp_path):
    data = write(tmp_path / "data.extxyz", [argon(labels=True, seed=seed) for seed in range(4)])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": [str(data)]}, "out": str(tmp_path / "out"), "model": SMALL_MODEL}))
    for n_steps in ("2", "3"):
        assert main(["train", str(config), "--n-steps", n_steps]) == 0
    assert [row["step"] for row in columns(tmp_path / "out" / "learning_curve.csv")] == ["2", "3"]


def test_pack_without_a_compiler(dpa1_pte, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    line = refused(["pack", dpa1_pte, tmp_path / "model.pt2"], capsys)
    assert "apt install g++" in line
    assert list(tmp_path.iterdir()) == []
