"""The code of docs/domain.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from carryall.data import AtomicData
from carryall.models import EagerPotential
from structures import fcc, small_alloy

PAGE = Path(__file__).parents[2] / "docs" / "domain.md"


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, PAGE.name, "exec"), names)
    positions, cell = fcc((2, 2, 2))
    speed = names["scaling_run"](AtomicData(positions, [29] * len(positions), cell), EagerPotential(small_alloy()), 3)
    assert speed > 0
    assert "1 ranks: " in capsys.readouterr().out


def test_the_page_names_all_that_runs() -> None:
    from carryall.engines.domain.system import SUPPORTED

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SUPPORTED)
