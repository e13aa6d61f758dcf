"""Random numbers of a batch, per atom and per system, from the counter-based generator.

They depend on (seed, stream, system id, step) and the place in the system only, bit for bit, whatever else is in the batch.
Each function takes a fixed number of draws of the generator, so that nothing has to be remembered but the step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import ATOM_INDEX
from carryall.dynamics.noise import MASK, Stream, log, normal_vectors, normals, philox
from carryall.dynamics.status import SYSTEM_ID, atom_rows

NOISE_STEP = "noise_step"
"""(n_systems,) int64: how many random kicks a system has had, in whatever dynamics; never set back, so noise never repeats."""
FIRST_TRIAL = 1 << 16
"""Draws from here on belong to `normal_and_chi_squared`, those before to `normal_rows`: one stream can serve both."""
TRIALS = 8
"""Each is accepted with a probability of at least 0.95; all fail once in 10**10 numbers, which then is the mode."""


def ensure_noise_step(batch: Batch) -> None:
    """Start the count of random kicks where there is none."""
    if NOISE_STEP not in batch:
        batch.set(NOISE_STEP, torch.zeros(batch.n_systems, dtype=torch.int64, device=batch.device), level="system")


def count_kick(batch: Batch, mask: Tensor | None) -> None:
    """One random kick more for the systems of the mask."""
    batch.set(NOISE_STEP, batch.get(NOISE_STEP) + (1 if mask is None else mask.long()))


def system_noise(batch: Batch, seed: int, stream: Stream, step: Tensor) -> Tensor:
    """(n_atoms, 3) standard normals of a batch; step (n_systems,) int64."""
    if ATOM_INDEX in batch:
        index = batch.get(ATOM_INDEX)
    else:
        index = torch.arange(batch.n_atoms, device=batch.device) - atom_rows(batch.ptr[:-1], batch)
    return normal_vectors(seed, stream, atom_rows(batch.get(SYSTEM_ID), batch), index, atom_rows(step, batch))


def normal_rows(seed: int, stream: Stream, system_id: Tensor, step: Tensor, count: int) -> Tensor:
    """(n_systems, count) independent standard normals, float64; system_id and step (n_systems,) int64."""
    blocks = -(-count // 3)
    draw = torch.arange(blocks, device=step.device).repeat(len(step))
    rows = normal_vectors(seed, stream, system_id.repeat_interleave(blocks), draw, step.repeat_interleave(blocks))
    return rows.reshape(len(step), 3 * blocks)[:, :count].contiguous()


def normal_and_chi_squared(
    seed: int, stream: Stream, system_id: Tensor, step: Tensor, degrees: Tensor
) -> tuple[Tensor, Tensor]:
    """(n_systems,) standard normals, and (n_systems,) sums of the squares of `degrees` other ones, float64.

    degrees: (n_systems,) float64 whole numbers of at least 0. The sum of two squares or more is twice a gamma variate of shape
    degrees / 2, by the rejection of Marsaglia and Tsang, ACM Trans. Math. Softw. 26, 363 (2000): `TRIALS` are always drawn.
    """
    words = _trial_words(seed, stream, system_id, step)
    xp: Any = np if isinstance(words, np.ndarray) else torch
    count = xp.asarray(degrees.numpy() if xp is np else degrees, dtype=xp.float64)
    # The first two words make two normals, the third is the uniform number that decides.
    first, _, second, _ = (row.reshape(TRIALS, -1) for row in normals(words))
    u = (xp.asarray(words[2], dtype=xp.float64) + 0.5) * 2.0**-32
    d = 0.5 * xp.where(count < 2.0, 2.0, count) - 1.0 / 3.0
    root = 1.0 + first / xp.sqrt(9.0 * d)
    inside = root > 0.0
    v = xp.where(inside, root * root * root, 1.0)
    log_u, log_v = log(xp.concatenate([u, v.reshape(-1)])).reshape(2, TRIALS, -1)
    accepted = inside & (log_u < 0.5 * first * first + d * (1.0 - v + log_v))
    chosen = xp.ones_like(d)
    for trial in range(TRIALS - 1, -1, -1):
        chosen = xp.where(accepted[trial], v[trial], chosen)
    single = xp.where(count >= 1.0, first[0] * first[0], 0.0)
    total = xp.where(count >= 2.0, 2.0 * d * chosen, single)
    return torch.as_tensor(second[0]), torch.as_tensor(total)


def _trial_words(seed: int, stream: Stream, system_id: Tensor, step: Tensor) -> Any:
    """(4, TRIALS * n_systems) words, numpy's on the CPU: the same integers, with cheaper calls."""
    trial = torch.arange(FIRST_TRIAL, FIRST_TRIAL + TRIALS, device=step.device)[:, None]
    high = ((step >> 32) & 0xFFFFFF) | (int(stream) << 24)
    parts = torch.broadcast_tensors(trial, (step & MASK)[None], high[None], (system_id & MASK)[None])
    counter = torch.stack(parts).reshape(4, -1)
    return philox(counter.numpy() if counter.device.type == "cpu" else counter, (seed & MASK, seed >> 32))
