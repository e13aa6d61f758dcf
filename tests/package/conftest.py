"""What the tests of the packed file share."""

from __future__ import annotations

from pathlib import Path

import pytest

from carryall.models.pair import LennardJones
from carryall.package.export import export_model


@pytest.fixture(scope="session")
def lj_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed file, to be damaged; copy it before that."""
    return export_model(LennardJones.argon(), tmp_path_factory.mktemp("lj") / "lj.pte", check=False)
