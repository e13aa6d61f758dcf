"""The demo from end to end, with a model and runs too small to be of use, on a machine without a compiler."""

import re

from command_line import SMALL_MODEL, columns, is_png

from carryall.cli import demo_config
from carryall.cli.main import main


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(demo_config, "MODEL", SMALL_MODEL)
    out = tmp_path / "demo"
    flags = [
        "--n-steps",
        "2",
        "--nvt-steps",
        "3",
        "--nve-steps",
        "4",
        "--ase-steps",
        "2",
        "--relax-steps",
        "2",
        "--n-systems",
        "2",
    ]
    assert main(["demo", "--out", str(out), *flags]) == 0
    captured = capsys.readouterr()
    assert "apt install g++" in captured.err
    assert "report.html" in captured.out
    assert not (out / "model.pt2").exists()
    text = (out / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 7
    assert text.count("GFN1-xTB") > 7
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert all(is_png(path) for path in (out / "pictures").iterdir())
    assert {row["quantity"] for row in columns(out / "errors.csv")} == {"energy", "forces", "stress"}
    assert len(columns(out / "relax" / "results.csv")) == 2
    assert list(out.rglob(".*")) == []
