"""Ionic systems, models of them, and a plain Ewald sum to compare with: written out with complex numbers, nothing shared."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from carryall.data import AtomicData
from carryall.graph import NeighborGraph, graph_from_structures
from carryall.models.ewald import Ewald
from carryall.models.ewald_charges import LearnedEwald

IONS = ("Na", "Cl")
NUMBERS = (11, 17)
CUTOFF = 4.0
FCC = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])


def rock_salt(a: float = 5.64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, types and cell of eight ions."""
    return np.concatenate([FCC, FCC + np.array([0.5, 0, 0])]) * a, np.repeat([0, 1], 4), np.eye(3) * a


def ionic(seed: int, a: float = 5.64, tilt: float = 0.5, jitter: float = 0.2) -> AtomicData:
    """Rock salt out of order, in a triclinic cell."""
    rng = np.random.default_rng(seed)
    positions, types, cell = rock_salt(a)
    box = cell + tilt * rng.normal(size=(3, 3))
    moved = positions @ np.linalg.inv(cell) @ box + jitter * rng.normal(size=positions.shape)
    return data_of(moved, types, box)


def data_of(positions: np.ndarray, types: np.ndarray, cell: np.ndarray) -> AtomicData:
    return AtomicData(
        torch.from_numpy(positions),
        torch.tensor(NUMBERS)[torch.from_numpy(types)],
        torch.from_numpy(cell),
        torch.ones(3, dtype=torch.bool),
    )


def strained(data: AtomicData, strain: np.ndarray) -> AtomicData:
    turn = torch.from_numpy(np.eye(3) + strain).T
    assert data.cell is not None
    return data.replace(positions=data.positions @ turn, cell=data.cell @ turn)


def graph_of(*systems: AtomicData, cutoff: float = CUTOFF) -> NeighborGraph:
    return graph_from_structures(systems, cutoff, IONS)


def fixed(accuracy: float = 1e-4, charges: tuple[float, float] = (1.0, -0.8), cutoff: float = CUTOFF) -> Ewald:
    """In a cell that is charged, where the two are not opposite."""
    return Ewald(IONS, charges, cutoff, accuracy)


def learned(layers: int = 2, accuracy: float = 1e-4) -> LearnedEwald:
    """Charges that differ from atom to atom by some tenths."""
    model = LearnedEwald(IONS, CUTOFF, (1.0, -1.0), accuracy=accuracy, layers=layers)
    with torch.no_grad():
        model.readout *= 3
    return model


def plain_ewald(data: AtomicData, charges: np.ndarray, splitting: float, coulomb: float) -> dict[str, np.ndarray]:
    """Energies, forces, virial and atomic virials (half of a pair's to each end), by the textbook; cutoffs beyond 1e-16."""
    assert data.cell is not None
    x, cell, q = data.positions.numpy(), data.cell.numpy(), charges
    n, volume = len(x), abs(np.linalg.det(cell))
    energy, forces, virial = np.zeros(n), np.zeros((n, 3)), np.zeros((n, 3, 3))
    reach = np.ceil(6.5 / splitting * np.linalg.norm(np.linalg.inv(cell), axis=0) + 1).astype(int)
    for shift in itertools.product(*(range(-m, m + 1) for m in reach)):
        d = x[None] + np.array(shift) @ cell - x[:, None]
        r = np.linalg.norm(d, axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            qq = np.where(r > 1e-9, np.outer(q, q), 0.0)
            erfc = np.vectorize(math.erfc)(splitting * r)
            pair = np.where(qq == 0, 0.0, qq * erfc / r)
            gauss = 2 * splitting / math.sqrt(math.pi) * np.exp(-((splitting * r) ** 2))
            slope = np.where(qq == 0, 0.0, -qq * (erfc / r + gauss) / r)  # dE/dr of a pair
            pull = np.where((qq == 0)[..., None], 0.0, slope[..., None] * d / r[..., None])  # force on i
        energy += 0.5 * pair.sum(1)
        forces += pull.sum(1)
        virial -= 0.5 * np.einsum("ija,ijb->iab", pull, d)
    b = 2 * math.pi * np.linalg.inv(cell)  # columns
    k_max = 13 * splitting
    most = np.ceil(k_max / (2 * math.pi) * np.linalg.norm(cell, axis=1)).astype(int)
    h = np.array([t for t in itertools.product(*(range(-m, m + 1) for m in most)) if any(t)])
    k = h @ b.T
    k = k[(k**2).sum(1) <= k_max**2]
    k2 = (k**2).sum(1)
    wave = np.exp(1j * x @ k.T)
    s = q @ wave
    w = 2 * math.pi / volume * np.exp(-k2 / (4 * splitting**2)) / k2
    share = q[:, None] * np.real(wave.conj() * s) * w
    energy += share.sum(1)
    forces += 2 * np.einsum("ik,kc->ic", -q[:, None] * np.imag(wave.conj() * s) * w, k)
    virial += share.sum(1)[:, None, None] * np.eye(3)
    virial -= np.einsum("ik,k,ka,kb->iab", share, 2 * (1 / k2 + 1 / (4 * splitting**2)), k, k)
    background = -math.pi / (2 * volume * splitting**2) * q.sum() * q
    energy += background - splitting / math.sqrt(math.pi) * q**2
    virial += background[:, None, None] * np.eye(3)
    total = virial.sum(0)
    found = {"atomic_energy": energy, "forces": forces, "virial": total, "atomic_virial": virial}
    return {"energy": energy.sum() * coulomb, **{name: value * coulomb for name, value in found.items()}}
