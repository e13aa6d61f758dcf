"""The code of docs/hooks.md runs as it stands, from top to bottom, and the page names every hook."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from carryall.dynamics import constraints, hooks

PAGE = Path(__file__).parents[2] / "docs" / "hooks.md"


def test_the_page_runs(capsys, tmp_path, monkeypatch):
    pytest.importorskip("spglib")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert len(blocks) == 7
    assert "[194]" in capsys.readouterr().out
    assert (names["spread"].largest > 0).all()
    assert names["one"].positions.shape == (6, 4, 3)
    assert names["relaxed"].outcome.tolist() == [1, 1, 1]
    # the restrained atom is at its place: nothing else holds the crystal
    torch.testing.assert_close(names["relaxed"].positions[[0, 4, 8]], names["place"].expand(3, 3), atol=2e-2, rtol=0)


def test_the_page_names_every_hook_and_constraint():
    text = PAGE.read_text(encoding="utf-8")
    known = [one.__name__ for room in (hooks, constraints) for one in vars(room).values() if inspect.isclass(one)]
    no_hook = ("Hook", "HookStageEnum", "Constraint", "Trajectory", "SystemTrajectory")
    missing = [name for name in known if f"`{name}" not in text and name not in no_hook]
    assert missing == []
