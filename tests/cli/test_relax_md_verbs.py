"""Relaxation and MD from the command line: the words of Python, files read as they are needed, ramps, several batches."""

import numpy as np
import pytest
from command_line import argon, columns, dimer, refused, write

from carryall.cli.inputs import FrameStream
from carryall.cli.main import main
from carryall.cli.md import schedule
from carryall.data import read_structures
from carryall.dynamics import Ramp
from carryall.dynamics.ledger import LedgerResults
from carryall.errors import InputError


def test_frames_are_read_one_by_one_and_a_bad_one_costs_itself_only(tmp_path):
    good = write(tmp_path / "good.extxyz", [argon(1, seed=0), argon(1, seed=1)])
    bad = tmp_path / "bad.xyz"
    bad.write_text(dimer() + dimer().replace("0 0 0\n", "0 zero 0\n", 1) + dimer() + "5\nends here\n")
    stream = FrameStream([good, bad, tmp_path / "absent.cif"])
    assert len(stream) == 4
    found = list(stream)
    assert [(one.source.rsplit("/", 1)[-1], one.frame, one.data is not None) for one in found] == [
        ("good.extxyz", 0, True),
        ("good.extxyz", 1, True),
        ("bad.xyz", 0, True),
        ("bad.xyz", 1, False),
        ("bad.xyz", 2, True),
        ("bad.xyz", None, False),
        ("absent.cif", None, False),
    ]
    assert "pos is 'zero'" in found[3].reason
    assert "truncated" in found[5].reason
    assert "no such file" in found[6].reason
    (tmp_path / "good.extxyz").unlink()
    assert next(iter(FrameStream([bad, good]))).frame == 0  # the second file has not been looked for


def test_relax_resumes_a_run_and_refuses_to_mix_two(tmp_path, capsys):
    source = write(tmp_path / "a.extxyz", [argon(1, seed=seed) for seed in range(4)])
    out = tmp_path / "out"
    flags = ["relax", str(source), "--model", "lj-argon", "-o", str(out), "--optimizer", "lbfgs", "--cell-filter", "frechet"]
    assert main([*flags, "--pressure", "0.1", "--fmax", "0.01"]) == 0
    assert "converged" in capsys.readouterr().out
    assert "go on with --resume, or write elsewhere with -o" in refused([*flags, "--fmax", "0.01"], capsys)
    assert "optimizer_settings.pressure = 0.1" in refused([*flags, "--fmax", "0.01", "--resume"], capsys)
    first = (out / "relaxed.extxyz").read_bytes()
    (out / "relaxed.extxyz").unlink()
    assert main([*flags, "--pressure", "0.1", "--fmax", "0.01", "--resume"]) == 0
    assert (out / "relaxed.extxyz").read_bytes() == first
    results = LedgerResults(out)
    assert [one.outcome for one in results] == ["converged"] * 4
    # along x, y, z: minus the pressure, in GPa
    np.testing.assert_allclose(-results[0].structure.stress.diagonal() * 160.21766208, 0.1, atol=0.02)
    write(source, [argon(1, seed=seed) for seed in (0, 9, 2, 3)])
    line = refused([*flags, "--pressure", "0.1", "--fmax", "0.01", "--resume"], capsys)
    assert f"input 1 ({source}, frame 1) is not the structure that this run had there before" in line


def test_relax_words_are_checked(tmp_path, capsys):
    source = write(tmp_path / "a.extxyz", [argon(1)])
    flags = ["relax", source, "--model", "lj-argon", "-o", tmp_path / "out"]
    assert "pressure has no effect at fixed cell" in refused([*flags, "--pressure", "1"], capsys)
    assert main([str(one) for one in [*flags, "--optimizer", "fires"]]) == 2
    assert "gradient_descent" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    mask = ["--cell-filter", "unit_cell", "--cell-mask", "True", "False", "False", "False", "False", "False"]
    assert (
        main([str(one) for one in [*flags, *mask, "--constraints", "fix_center_of_mass", "--max-steps", "3", "--fmax", "1e-4"]])
        == 0
    )
    before, after = read_structures(source)[0].cell, read_structures(tmp_path / "out" / "relaxed.extxyz")[0].cell
    assert not np.allclose(before[0, 0], after[0, 0], atol=1e-6)
    np.testing.assert_array_equal(before[1:], after[1:])


def test_many_failures_are_told_briefly(tmp_path, capsys):
    copper = tmp_path / "copper.xyz"
    copper.write_text(dimer() + 30 * dimer("Cu") + dimer())
    assert main(["relax", str(copper), "--model", "lj-argon", "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert told.count("carryall: set aside: ") == 20
    assert "more are set aside" in told
    rows = columns(tmp_path / "out" / "results.csv")
    assert [row["outcome"] for row in rows] == ["converged"] + ["failed"] * 30 + ["converged"]
    assert rows[5]["frame"] == "5"


@pytest.mark.parametrize(
    ("text", "steps", "values"),
    [("300", (0,), (300.0,)), ("300:600", (0, 100), (300.0, 600.0)), ("1:2:1", (0, 50, 100), (1.0, 2.0, 1.0))],
)
def test_schedules(text, steps, values):
    found = schedule("temperature", text, 100)
    if len(steps) == 1:
        assert found == values[0]
    else:
        assert isinstance(found, Ramp)
        assert (tuple(found.steps), tuple(found.values)) == (steps, values)
    assert schedule("temperature", text, 0) == values[0]


def test_a_schedule_that_is_none(tmp_path, capsys):
    with pytest.raises(InputError, match="numbers with colons between them as in 300:600, got '300-600'"):
        schedule("temperature", "300-600", 10)
    assert "got 'hot'" in refused(["md", "--model", "lj-argon", "--temperature", "hot", "-o", tmp_path / "md"], capsys)


def test_md_at_constant_pressure_with_a_ramp_in_two_batches(tmp_path):
    start = write(tmp_path / "start.extxyz", [argon(2, seed=0), argon(2, seed=1)])
    out = tmp_path / "md"
    flags = ["--ensemble", "npt", "--temperature", "20:40", "--pressure", "0.05", "--timestep", "2", "--n-steps", "10"]
    intervals = ["--log-interval", "5", "--trajectory-interval", "5", "--max-atoms-per-batch", "32"]
    assert main(["md", str(start), "--model", "lj-argon", "-o", str(out), *flags, *intervals]) == 0
    for batch in (0, 1):
        assert [row["step"] for row in columns(out / f"log-{batch}.csv")] == ["0", "5", "10"]
        assert {row["system_id"] for row in columns(out / f"log-{batch}.csv")} == {str(batch)}
        assert (out / f"thermo-{batch}.png").exists()
        assert len(read_structures(out / f"trajectory-{batch}.extxyz")) == 3
    final = read_structures(out / "final.extxyz")
    assert [one.n_atoms for one in final] == [32, 32]
    assert not np.array_equal(final[0].cell, read_structures(start)[0].cell)
    assert main(["md", str(start), "--model", "lj-argon", "-o", str(out), *flags, *intervals]) == 2
    assert main(["md", str(start), "--model", "lj-argon", "-o", str(out), *flags, *intervals, "--resume"]) == 0
