"""What every test shares: one thread, and the one model that is compiled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from carryall.models import DPA1
from carryall.package.pack import pack
from structures import small_dpa1

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dpa1() -> DPA1:
    """A small DPA-1 in float64; do not change it."""
    return small_dpa1()


@pytest.fixture(scope="session")
def dpa1_pte(dpa1: DPA1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a portable program."""
    return pack(dpa1, tmp_path_factory.mktemp("packed") / "dpa1.pte")


@pytest.fixture(scope="session")
def dpa1_pt2(dpa1: DPA1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model compiled, once for the whole suite: mark the tests that use it with `compile`."""
    # workers of one run share the folder above their own
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.getbasetemp()
    path = shared / "compiled" / "dpa1.pt2"
    with FileLock(shared / "compiled.lock"):
        if path.exists():
            return path
        torch.set_num_threads(2)  # which must not be baked into the file
        try:
            return pack(dpa1, path)
        finally:
            torch.set_num_threads(1)
