"""Loss and errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.training.config import LearningRateConfig, LossConfig
from carryall.training.samples import Sample


def learning_rate(config: LearningRateConfig, step: int, n_steps: int) -> float:
    """Rate at `step` of `n_steps`: linear warm-up, then exponential decay from `start` to `stop`."""
    if step < config.warmup_steps:
        return config.start * (step + 1) / config.warmup_steps
    span = max(1, n_steps - 1 - config.warmup_steps)
    return config.start * (config.stop / config.start) ** min(1.0, (step - config.warmup_steps) / span)


@dataclass(frozen=True)
class Errors:
    """Sums of squares, so that batches add up."""

    energy: float = 0.0
    """Sum over structures of (error / atoms)^2, (eV/atom)^2."""
    n_energy: int = 0
    forces: float = 0.0
    """Sum over components, (eV/Å)^2."""
    n_forces: int = 0
    virial: float = 0.0
    """Sum over components of (error / atoms)^2, (eV/atom)^2."""
    n_virial: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def rmse_energy(self) -> float:
        """meV/atom; NaN without labels."""
        return 1e3 * (self.energy / self.n_energy) ** 0.5 if self.n_energy else float("nan")

    @property
    def rmse_forces(self) -> float:
        """meV/Å; NaN without labels."""
        return 1e3 * (self.forces / self.n_forces) ** 0.5 if self.n_forces else float("nan")

    @property
    def rmse_virial(self) -> float:
        """meV/atom; NaN without labels."""
        return 1e3 * (self.virial / self.n_virial) ** 0.5 if self.n_virial else float("nan")


def loss_and_errors(config: LossConfig, out: dict[str, Tensor], sample: Sample, rate_fraction: float) -> tuple[Tensor, Errors]:
    """DeePMD's loss at a learning rate that is `rate_fraction` of its start, and the batch's errors.

    pref_e * mean(dE^2 / n_atoms) + pref_f * mean(dF^2) + pref_v * mean(dV^2 / n_atoms); without a label: left out.
    """

    def pref(start: float, limit: float) -> float:
        return limit * (1 - rate_fraction) + start * rate_fraction

    d_energy = out["energy"] - sample.energy
    d_forces = (out["forces"] - sample.forces)[sample.has_forces]
    d_virial = (out["virial"] - sample.virial)[sample.has_virial]
    atoms_virial = sample.n_atoms[sample.has_virial][:, None, None]
    loss = pref(config.start_pref_e, config.limit_pref_e) * (d_energy**2 / sample.n_atoms).mean()
    if d_forces.numel():
        loss = loss + pref(config.start_pref_f, config.limit_pref_f) * d_forces.square().mean()
    if d_virial.numel() and (config.start_pref_v or config.limit_pref_v):
        loss = loss + pref(config.start_pref_v, config.limit_pref_v) * (d_virial**2 / atoms_virial).mean()
    with torch.no_grad():
        errors = Errors(
            energy=float((d_energy / sample.n_atoms).square().sum()),
            n_energy=d_energy.numel(),
            forces=float(d_forces.square().sum()),
            n_forces=d_forces.numel(),
            virial=float((d_virial / atoms_virial).square().sum()),
            n_virial=d_virial.numel(),
        )
    return loss, errors
