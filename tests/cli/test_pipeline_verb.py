"""`carryall pipeline`: a strict configuration; the numbers of `relax` and `md`; the same bit by bit over ranks and kills."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import argon, columns, dimer, is_png, refused, write

from carryall import load, md, relax
from carryall.cli.main import main
from carryall.cli.pipeline import input_files
from carryall.data import AtomicData, read_structures, write_structures
from carryall.dynamics import NVE, LedgerResults, initialize_velocities, read_csv_log
from carryall.dynamics.folder_status import folder_status
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.pipeline.config import PipelineConfig, read_pipeline_config
from carryall.dynamics.pipeline.statistics import StageStatistics
from carryall.errors import InputError
from carryall.properties import radial_distribution
from carryall.properties.analysis import analyse

BIN = Path(sys.executable).parent
RELAX = {"fmax": 0.02, "max_steps": 100, "max_atoms_per_batch": 64}
MD = {"temperature": 40, "timestep": 2.0, "n_steps": 60, "sample_interval": 5, "max_atoms_per_batch": 64}
OUTPUT = ("analysis.csv", "rdf.csv", "results.csv", "finished.extxyz")


def configured(folder: Path, *stages: object, name: str = "pipeline.yaml", **more: object) -> Path:
    """A file with these stages."""
    path = folder / name
    text = {"inputs": str(folder / "in"), "model": "lj-argon", "out": str(folder / "run"), "stages": list(stages), **more}
    path.write_text(yaml.safe_dump(text))
    return path


def inputs(folder: Path, count: int) -> Path:
    """A folder of structures, one of which no potential for argon can work on."""
    into = folder / "in"
    into.mkdir()
    for seed in range(count):
        write(into / f"a{seed}.extxyz", [argon(2, seed=seed)])
    (into / "b.xyz").write_text(dimer("Cu"))
    (into / ".hidden").write_text("no structure")
    return into


# -- the configuration


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "stages: [{relax: {fmaxx: 1}}, md]",
            "unknown key 'stages.0.relax.fmaxx', perhaps you meant 'fmax' (known: name, model",
        ),
        ("stages: [relax, {md: {steps: 10}}]", "unknown key 'stages.1.md.steps', perhaps you meant 'n_steps'"),
        ("stages: [relax, md]\nhelp: true", "unknown key 'help', perhaps you meant 'helping'"),
        ("stages: [relax, mdd]", "unknown key 'stages.1.mdd', perhaps you meant 'md' (known: relax, md, analysis)"),
        (
            "stages: [{relax: {optimizer: fires}}, md]",
            "stages.0.relax.optimizer: must be one of fire, lbfgs, gradient_descent, got 'fires', perhaps you meant 'fire'",
        ),
        ("stages: [{relax: {fmax: -1}}, md]", "stages.0.relax.fmax: Input should be greater than 0, got -1"),
        ("stages: [{relax: {}, md: {}}]", "stages.0: a stage is one of relax, md and analysis with its keys below it"),
        ("stages: [relax, analysis]", "a pipeline has at least two of relax and md, got 1"),
        ("stages: [relax, analysis, md]", "analysis is what is done at the end"),
        ("stages: [{relax: {name: a}}, {md: {name: a}}]", "two have the same name: a, a"),
        ("stages: [relax, {md: {n_steps: 5}}]", "stages.1.md: sample_interval (10) is larger than n_steps (5): no sample"),
        ("stages: [relax, md]\nstages: [relax, md]", "the key 'stages' is there twice"),
        ("stages: [relax, {md: {n_steps: 5, n_steps: 6}}]", "the key 'n_steps' is there twice"),
        ("stages: [relax", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(text, said, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(f"inputs: x\nmodel: lj-argon\n{text}\n")
    with pytest.raises(InputError) as error:
        read_pipeline_config(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_the_rest_of_the_configuration(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_pipeline_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="model: give one to the pipeline, or one to every stage"):
        read_pipeline_config({"inputs": "x", "stages": ["relax", {"md": {"model": "water"}}]})
    with pytest.raises(InputError, match="must hold a mapping"):
        read_pipeline_config([])  # type: ignore[arg-type]
    path = tmp_path / "p.yaml"
    # plain YAML 1.1 reads 20:40 as 1240, and 1e-3 as a text
    path.write_text(
        "inputs: [a, b]\nmodel: m\nstages:\n- relax: {fmax: 1e-3}\n- md: {temperature: 20:40, seed: 7}\n- md:\n"
        "- analysis: {r_max: 4}\n"
    )
    found = read_pipeline_config(path)
    assert [name for name, _ in found.work] == ["relax", "md", "md2"]
    (_, first), (_, second), (_, third) = found.work
    assert (first.fmax, second.temperature, second.seed, third.temperature) == (1e-3, "20:40", 7, "300")
    assert found.inputs == ("a", "b")
    assert found.analysis.r_max == 4.0
    assert found.helping is True
    assert read_pipeline_config(found) is found
    # what the run writes into its folder is read with the usual YAML too
    path.write_text(yaml.safe_dump(found.plain()))
    assert read_pipeline_config(path) == found
    assert PipelineConfig.model_validate(yaml.safe_load(path.read_text())) == found


def test_inputs_are_files_folders_and_patterns(tmp_path):
    into = inputs(tmp_path, 2)
    write_structures(tmp_path / "deepmd", [argon(1, labels=True)])
    names = [
        one.name for one in input_files([str(into / "*.xyz"), str(into), str(into / "a1.extxyz"), str(tmp_path / "deepmd")])
    ]
    assert names == ["b.xyz", "a0.extxyz", "a1.extxyz", "b.xyz", "a1.extxyz", "deepmd"]
    (tmp_path / "empty").mkdir()
    for one, said in (
        (into / "*.cif", "no file matches"),
        (into / "c", "no such file"),
        (tmp_path / "empty", "holds no files"),
    ):
        with pytest.raises(InputError, match=said):
            input_files([str(one)])


# -- a run


def test_a_run_does_what_relax_and_md_do(tmp_path, capsys):
    into = inputs(tmp_path, 5)
    path = configured(tmp_path, {"relax": RELAX}, {"md": MD}, {"analysis": {"r_max": 5.0, "n_bins": 50}})
    out = tmp_path / "run"
    assert main(["pipeline", str(path), "--dry-run"]) == 0
    assert not out.exists()
    told = capsys.readouterr().out
    assert "one process, stage by stage in turn" in told
    assert "torchrun --nproc-per-node 2" in " ".join(told.split())
    assert main(["pipeline", str(path)]) == 0
    captured = capsys.readouterr()
    assert "6 structures" in captured.out
    assert "5 finished, 1 failed" in captured.out
    assert "1 failed: atom 0 is Cu" in captured.err

    # the same by the two calls, the second with its own log
    potential = load("lj-argon")
    start = [one for file in sorted(into.glob("a*")) for one in read_structures(file)]
    relaxed = relax(start, potential, 0.02, 100, progress=False)
    log = tmp_path / "log.csv"
    moved = md(
        [one.structure for one in relaxed], potential, "nvt", 40.0, 2.0, 60, seed=1, log=log, log_interval=5, progress=False
    )
    results = list(LedgerResults(out))
    assert [one.outcome for one in results] == ["step_budget"] * 5 + ["failed"]
    for one, other in zip(results, moved.systems, strict=False):
        for name in ("positions", "velocities", "forces"):
            assert torch.equal(getattr(one.structure, name), getattr(other.structure, name))
    rows, by_log = columns(out / "analysis.csv"), read_csv_log(log)
    for index, row in enumerate(rows[:5]):
        own = (by_log["system_id"] == index) & (by_log["step"] > 0)
        assert own.sum() == 12
        for name, factor in (("temperature", 1), ("potential_energy", 32), ("pressure", 1)):
            values = by_log[name][own] / factor
            assert float(row[f"md_{name}_mean"]) == pytest.approx(values.mean(), rel=1e-8)
            assert float(row[f"md_{name}_std"]) == pytest.approx(values.std(), rel=1e-6)
        shift = (relaxed[index].structure.positions - start[index].positions).numpy()
        assert float(row["relax_displacement"]) == pytest.approx(np.sqrt((shift**2).sum(1).mean()), rel=1e-8)
        assert float(row["relax_energy"]) == pytest.approx(relaxed[index].energy / 32, rel=1e-9)
        assert int(row["relax_steps"]) == relaxed[index].steps
        final = moved.systems[index].structure
        assert float(row["density"]) == pytest.approx(32 * 39.948 / final.volume * 1.66053904, rel=1e-9)
        assert float(row["md_volume"]) == pytest.approx(final.volume / 32, rel=1e-9)
    assert rows[5]["outcome"] == "failed"
    assert rows[5]["md_temperature_mean"] == ""
    with (out / "rdf.csv").open() as stream:
        table = np.array(list(csv.reader(stream))[2:], float)
    expected = radial_distribution([one.structure for one in moved.systems], [("Ar", "Ar")], 5.0, 50)
    np.testing.assert_allclose(table[:, 0], expected.r)
    # images of an atom count among its pairs here
    np.testing.assert_allclose(table[:, 1], expected.g[("Ar", "Ar")] * 31 / 32, rtol=1e-8)
    assert is_png(out / "analysis.png")
    finished = read_structures(out / "finished.extxyz")
    assert len(finished) == 5
    assert finished[0].info["md_temperature_mean"] == pytest.approx(float(rows[0]["md_temperature_mean"]), rel=1e-9)

    # the run is there; another one is not mixed into it; the same goes on
    assert "holds a run already: go on with --resume, or write elsewhere with -o" in refused(["pipeline", path], capsys)
    other = configured(tmp_path, {"relax": RELAX}, {"md": {**MD, "friction": 2}}, "analysis", name="other.yaml")
    line = refused(["pipeline", other, "--resume"], capsys)
    assert "was begun with stages.md.friction = 1.0, this run has stages.md.friction = 2.0" in line
    before = {name: (out / name).read_bytes() for name in OUTPUT}
    for name in OUTPUT:
        (out / name).unlink()
    write(into / "c.extxyz", [argon(2, seed=9)])  # a further input, after the others
    free = configured(
        tmp_path, {"relax": RELAX | {"ranks": 2}}, {"md": MD}, {"analysis": {"r_max": 5.0, "n_bins": 50}}, comm_mode="sync"
    )
    assert main(["pipeline", str(free), "--resume"]) == 0
    assert (out / "analysis.csv").read_bytes().startswith(before["analysis.csv"])
    assert len(columns(out / "analysis.csv")) == 7


def test_velocities_of_a_file_stay_and_others_are_drawn(tmp_path):
    frames = [argon(1, seed=seed) for seed in range(4)]
    own = {1: 0.03, 2: 0.0}
    for index, size in own.items():
        velocities = size * np.random.default_rng(index).standard_normal((4, 3))
        frames[index] = frames[index].replace(velocities=velocities)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.extxyz", frames)
    brief = {"temperature": 30, "n_steps": 1, "sample_interval": 1, "timestep": 1e-6, "ensemble": "nve"}
    assert main(["pipeline", str(configured(tmp_path, {"relax": {"max_steps": 2}}, {"md": brief}, {"md": brief}))]) == 0
    found = [one.structure.velocities for one in LedgerResults(tmp_path / "run")]
    for index in own:
        torch.testing.assert_close(found[index], frames[index].velocities, atol=1e-6, rtol=0)
    # others are drawn by temperature, seed and place, whatever is beside them
    alone = tmp_path / "alone"
    write(tmp_path / "in" / "a.extxyz", [frames[0], frames[0], frames[0], frames[3]])
    path = configured(tmp_path, {"relax": {"max_steps": 2}}, {"md": brief}, {"md": brief}, out=str(alone))
    assert main(["pipeline", str(path)]) == 0
    again = [one.structure.velocities for one in LedgerResults(alone)]
    for index in (0, 3):
        assert found[index].norm() > 0.01
        assert torch.equal(found[index], again[index])


def test_structures_without_a_cell_have_no_density(tmp_path):
    (tmp_path / "in").mkdir()
    cluster = AtomicData([[0, 0, 0], [3.8, 0, 0], [0, 3.8, 0]], [18] * 3)
    lone = AtomicData([[0, 0, 0]], [18])
    write(tmp_path / "in" / "a.extxyz", [cluster, lone, argon(1)])
    brief = {"temperature": 5, "n_steps": 4, "sample_interval": 2}
    assert main(["pipeline", str(configured(tmp_path, "relax", {"md": brief}, {"analysis": {"r_max": 20.0}}))]) == 0
    first, second, third = columns(tmp_path / "run" / "analysis.csv")
    final = LedgerResults(tmp_path / "run")[0].structure.positions
    shortest = torch.pdist(final).min().item()
    assert float(first["nearest_neighbor"]) == pytest.approx(shortest, rel=1e-9)
    for row in (first, second):
        assert [row[name] for name in ("density", "md_volume", "md_pressure_mean")] == [""] * 3
        assert float(row["md_temperature_mean"]) > 0
    assert second["nearest_neighbor"] == ""
    assert float(third["density"]) > 1
    # the one crystal alone makes the distribution, several images deep
    with (tmp_path / "run" / "rdf.csv").open() as stream:
        g = np.array([row[1] for row in list(csv.reader(stream))[2:]], float)
    assert g[-30:].mean() == pytest.approx(1.0, abs=0.06)


def test_a_state_is_sampled_once():
    numbers = StageStatistics("md", 2)
    batch = moving_batch([argon(1, seed=0), argon(1, seed=1)], [0, 1])
    initialize_velocities(batch, 30.0)
    numbers.start(batch)
    dynamics = NVE(load("lj-argon"), timestep=1.0, n_steps=10, hooks=[numbers])
    counts = []
    for _ in range(5):
        dynamics.run(batch, 1)
        # as where a system enters a batch again and waits for its forces: its state is looked at twice
        numbers(batch, dynamics)
        counts.append(batch.get("stage_samples").tolist())
    assert counts == [[0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]


def test_statistics_say_what_is_wrong():
    for interval in (0, True, 2.5):
        with pytest.raises(InputError, match="expected an integer of at least 1"):
            StageStatistics("md", interval)
    with pytest.raises(InputError, match="r_max must be positive"):
        analyse([], {}, Path(), r_max=0.0)


def test_exit_codes_where_nothing_finishes(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.xyz").write_text(2 * dimer("Cu"))
    path = configured(tmp_path, "relax", "md", "analysis")
    assert main(["pipeline", str(path)]) == 2
    assert "none of 2 structures finished; the first: atom 0 is Cu" in capsys.readouterr().err
    assert [row["outcome"] for row in columns(tmp_path / "run" / "analysis.csv")] == ["failed"] * 2
    assert not (tmp_path / "run" / "analysis.png").exists()
    assert "no such file or folder" in refused(["pipeline", configured(tmp_path, "relax", "md", inputs="absent")], capsys)


# -- ranks and kills


def wait_until(process: subprocess.Popen[str], out: Path, there) -> None:
    """Until `there(status)` of the run in the folder; it has to come before the process ends."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (out / "ledger.sqlite").exists():
            try:
                if there(folder_status(out)):
                    return
            except InputError:  # it has just been made
                pass
        time.sleep(0.02)
    raise AssertionError("it never came")


def in_md(status) -> bool:
    """Whether a system has come into the second stage, and none is through."""
    return status.stages[0]["done"] > 0


def started(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_sigterm_over_two_ranks_and_kill_lose_nothing(tmp_path):
    inputs(tmp_path, 8)
    # long enough that what ends it always comes in between
    stages = {"relax": RELAX}, {"md": {**MD, "n_steps": 800}}, "analysis"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["pipeline", str(configured(tmp_path, *stages, out=str(whole)))]) == 0
    path = configured(tmp_path, *stages, out=str(parts), checkpoint_seconds=0.2)
    verb = ["-m", "carryall", "pipeline", str(path), "--resume"]

    over_ranks = started([str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *verb])
    wait_until(over_ranks, parts, in_md)
    assert folder_status(parts).state == "running"
    over_ranks.send_signal(signal.SIGTERM)
    _, told = over_ranks.communicate(timeout=60)
    assert over_ranks.returncode != 0
    assert told.count(f"carryall: interrupted, everything is saved in {parts}/: the same command with --resume goes on") == 1
    status = folder_status(parts)
    assert status.state == "stopped"
    assert status.inputs == 9

    n_done = status.finished + status.failed
    alone = started([sys.executable, *verb])
    wait_until(alone, parts, lambda one: one.finished + one.failed > n_done)
    alone.kill()
    alone.communicate(timeout=60)
    assert folder_status(parts).state == "stopped"
    assert main(["pipeline", str(path), "--resume"]) == 0
    assert folder_status(parts).state == "finished"
    for name in OUTPUT:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.dumps(folder_status(parts).facts)
