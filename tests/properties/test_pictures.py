"""Plots are PNG files, the report is one file that needs nothing else."""

import re
import sys

import numpy as np
import pytest

from carryall.cli.inputs import face_centered_cubic
from carryall.errors import InputError, MissingDependencyError
from carryall.models import EagerPotential, LennardJones
from carryall.properties import RadialDistribution, Speed, plots, predict
from carryall.properties.report import Picture, Section, Table, page, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def check(path):
    assert path.read_bytes().startswith(PNG)
    assert [one.name for one in path.parent.iterdir() if one.name.startswith(".")] == []


def test_learning_curve(tmp_path):
    header = "step,train_rmse_energy,train_rmse_forces,validation_rmse_energy,validation_rmse_forces"
    curve = tmp_path / "learning_curve.csv"
    curve.write_text(f"{header}\n1,meV/atom,meV/angstrom,meV/atom,meV/angstrom\n100,9,800,8,700\n200,3,300,nan,nan\n")
    check(plots.plot_learning_curve(curve, tmp_path / "curve.png"))
    curve.write_text(f"{header}\n1,1,1,1,1\n")
    with pytest.raises(InputError, match="no rows"):
        plots.plot_learning_curve(curve, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_parity(tmp_path):
    frame = face_centered_cubic("Ar", 5.26, 2, rattle=0.05)
    found = predict(EagerPotential(LennardJones.argon()), [frame])
    labelled = frame.replace(energy=float(found[0]["energy"]) + 0.1, forces=found[0]["forces"] * 1.1)
    check(plots.plot_parity([labelled], found, tmp_path / "parity.png"))
    with pytest.raises(InputError, match="no labels"):
        plots.plot_parity([frame], found, tmp_path / "none.png")


def test_runs(tmp_path):
    time = np.linspace(0, 0.5, 20)
    rng = np.random.default_rng(0)
    many = rng.standard_normal((20, 3))
    check(plots.plot_thermo(time, 300 + many, many, tmp_path / "nvt.png", target=300.0))
    check(plots.plot_energy_drift({"box": (time, 1e-3 * time, 8)}, tmp_path / "nve.png"))
    curves = np.abs(many) + 0.1
    curves[10:, 0] = np.nan
    check(plots.plot_relaxation(curves, [10, 19, 19], tmp_path / "relaxation.png", fmax=0.05))
    r = np.linspace(0.1, 5, 50)
    rdf = RadialDistribution(r, {("O", "O"): np.ones(50), ("O", "H"): np.zeros(50)}, 1)
    check(plots.plot_rdf(rdf, tmp_path / "rdf.png", reference=rdf, ceilings={("O", "H"): 2.5}))
    check(plots.plot_speed([Speed("eager", 100, 0.5), Speed(".pt2", 100, 0.01)], tmp_path / "speed.png"))


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'carryall[plot]'")):
        plots.plot_speed([Speed("eager", 100, 0.5)], tmp_path / "speed.png")


def test_plots_leave_no_global_state(tmp_path):
    plots.plot_speed([Speed("eager", 100, 0.5)], tmp_path / "speed.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_report_is_self_contained(tmp_path):
    picture = plots.plot_speed([Speed("eager", 100, 0.5)], tmp_path / "speed.png")
    sections = [
        Section("Errors <b>", "One.\n\nTwo & more.", Table(("a", "b"), [("x", "1 < 2")])),
        Section("Speed", pictures=[Picture(picture, 'A "caption".')]),
    ]
    path = write_report(tmp_path / "report.html", "Title <script>", "Lead.", sections)
    text = path.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "<script" not in text
    assert "1 &lt; 2" in text
    assert "<p>One.</p>\n<p>Two &amp; more.</p>" in text
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert attribute.startswith("data:")
    assert "http" not in page("t", "l", sections)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
