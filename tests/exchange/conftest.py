"""The one model that passes messages, packed once."""

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
    return packed(".pt2", tmp_path_factory)


@pytest.fixture(scope="session")
def tangled_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a portable program."""
    return packed(".pte", tmp_path_factory)


def packed(suffix: str, factory: pytest.TempPathFactory) -> Path:
    # workers of one run share the folder above their own
    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    path = shared / "compiled" / f"tangled{suffix}"
    with FileLock(shared / f"tangled{suffix}.lock"):
        return path if path.exists() else pack(Tangled(), path, check=False)
