"""The code of docs/optimizers.md runs as it stands, from top to bottom."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
        if "pressure=0.5" in block:
            assert torch.allclose(names["batch"].stress[0], -0.5 / 160.21766208 * torch.eye(3).double(), atol=3e-5)
        if "pressures" in block:
            volumes = names["batch"].volume.tolist()
            assert volumes == sorted(volumes, reverse=True)
    assert len(blocks) == 5
    assert "tensor" in capsys.readouterr().out
    assert names["batch"].outcome.tolist() == [0]
    assert names["slab"].cell[2, 2] == names["batch"].cell[0, 2, 2]
