"""Random numbers by machine code."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def normal_vectors(library: ctypes.CDLL, seed: int, stream: int, system_id: Tensor, atom: Tensor, step: Tensor) -> Tensor:
    """(n, 3) standard normals, float64, bit for bit those of `carryall.dynamics.noise`, whose counters (n,) int64 it takes."""
    system_id, atom, step = (value.to(torch.int64).contiguous() for value in (system_id, atom, step))
    n = len(atom)
    if len(system_id) != n or len(step) != n:
        raise ValueError(
            f"system_id, atom and step have {len(system_id)}, {n} and {len(step)} entries: expected as many of each"
        )
    out = torch.empty(n, 3, dtype=torch.float64)
    library.carryall_normal_vectors(seed, stream, n, system_id.data_ptr(), atom.data_ptr(), step.data_ptr(), out.data_ptr())
    return out
