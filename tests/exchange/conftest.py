"""The one compiled model that passes messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from carryall import pack
from message_passing import Tangled


@pytest.fixture(scope="session")
def tangled_pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It holds every kind of exchange; mark the tests that use it with `compile`."""
    # workers of one run share the folder above their own
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.getbasetemp()
    path = shared / "compiled" / "tangled.pt2"
    with FileLock(shared / "tangled.lock"):
        return path if path.exists() else pack(Tangled(), path, check=False)
