"""The code of docs/pipelines.md runs as it stands, its YAML and its script over ranks too; its messages are the program's."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from carryall.cli.inputs import face_centered_cubic
from carryall.cli.main import main
from carryall.cli.pipeline import load_all, show_plan
from carryall.cli.pipeline_stages import stages_of
from carryall.data import write_structures
from carryall.dynamics import LedgerResults
from carryall.dynamics.folder_status import folder_status
from carryall.dynamics.pipeline.config import read_pipeline_config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
TEXT = re.sub(r'--8<-- "(.*?)"\n', lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), PAGE)
BIN = Path(sys.executable).parent


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{re.escape(kind)}\n(.*?)```", TEXT, re.DOTALL)


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) == 3
    names: dict[str, object] = {"__name__": "page"}
    for block in found:
        exec(compile(block, "pipelines.md", "exec"), names)
    told = capsys.readouterr().out
    assert "30 crystals, mean energy" in told
    assert "DistributedPipeline(relax | run, comm_mode='sync') 9 9" in told
    assert "30 {'step_budget': 30}" in told
    assert "finished 30 [('FIRE', 30), ('NVTLangevin', 30), ('NVE', 30)] ()" in told


def test_the_script_gives_the_same_over_three_ranks(tmp_path):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "3", str(EXAMPLES / "pipeline.py")]
    assert "torchrun --nproc-per-node 3 pipeline.py" in TEXT
    told = []
    for launcher in (command, [sys.executable, command[-1]]):
        folder = tmp_path / Path(launcher[0]).name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(launcher, cwd=folder, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert "30 crystals" in told[0]
    assert told[0] == told[1]
    a, b = sorted(tmp_path.glob("*/run/finished.extxyz"))
    assert a.read_bytes() == b.read_bytes()


def test_the_yaml_runs(tmp_path, monkeypatch, capsys):
    (shown,) = blocks('yaml title="pipeline.yaml"')
    assert shown == (EXAMPLES / "pipeline.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    Path("structures").mkdir()
    for seed in range(3):
        frame = face_centered_cubic("Ar", 5.3, 2, rattle=0.05, seed=seed)
        write_structures(f"structures/{seed}.extxyz", [frame])
    assert main(["pipeline", str(EXAMPLES / "pipeline.yaml")]) == 0
    assert "3 finished, 0 failed" in capsys.readouterr().out
    assert main(["status", "run/"]) == 0
    assert "run: finished, 3 of 3 inputs done" in capsys.readouterr().out
    assert [one["name"] for one in folder_status("run").stages] == ["relax", "heat", "md"]
    final = LedgerResults("run")[0].structure
    # heating at constant pressure has changed the cell, the last stage has not
    info = final.info
    assert info["relax_volume"] != info["heat_volume"] == info["md_volume"]
    table = re.findall(r"^\| `(.*?)` \|", TEXT.partition("## What is in the folder")[2].partition("## ")[0], re.MULTILINE)
    for name in (one for row in table for one in row.split("`, `")):
        assert Path("run", name).is_file(), name
    assert main(["pipeline", str(EXAMPLES / "pipeline.yaml"), "--resume", "--dry-run"]) == 0


@pytest.mark.parametrize("row", re.findall(r"^\| `(.*?)` \| ", TEXT.partition("## When something goes wrong")[2], re.MULTILINE))
def test_messages_are_there(row):
    source = " ".join(
        part.value
        for file in [*(ROOT / "src/carryall/dynamics/pipeline").glob("*.py"), ROOT / "src/carryall/dynamics/ledger.py"]
        for text in [ast.parse(file.read_text(encoding="utf-8"))]
        for part in ast.walk(text)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )
    # numbers and names are filled in
    fixed = re.split(r"rank \d|\(stage 1: md\)|\.\.\.|host:port|\d", row)
    fixed = [one.strip(" :") for one in fixed if one.strip(" :")]
    assert fixed
    for words in fixed:
        assert words in source, words


def test_every_key_of_the_page_is_one():
    config = read_pipeline_config(EXAMPLES / "pipeline.yaml")
    described = set(re.findall(r"`([a-z_]+)`", TEXT))
    for name in type(config).model_fields:
        assert name in described, name
    pipeline = stages_of(config, load_all(config, leads=False, rebuild=False))
    assert [one.name for one in pipeline] == ["relax", "heat", "md"]
    show_plan(config, [Path("a")], None)
