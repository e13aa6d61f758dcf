"""Ten thousand damaged files: none is taken for whole, and none does more than raise an InputError."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

N_FILES = 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_ten_thousand_damaged_files(lj_pte: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz_packed.py")), str(lj_pte), str(tmp_path), "0", str(N_FILES)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    seen = json.loads(found.stdout)
    assert sum(seen.values()) == N_FILES
    # each kind of damage was refused, and what cannot be noticed, such as another number in a program, was run;
    # a training configuration may be anything
    kinds = {key.partition(":")[0] for key in seen} - {"model_def_script.json"}
    assert len(kinds) == 10
    assert {kind for kind in kinds if seen.get(f"{kind}: refused", 0)} == kinds
    assert seen["program: loads"] > 50
    assert seen["flips: refused"] > 0.9 * (seen["flips: refused"] + seen.get("flips: harmless", 0))
