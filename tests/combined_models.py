"""Small pair tables and combinations of models that several tests share."""

from __future__ import annotations

import numpy as np

from carryall.models.bridging import Bridged
from carryall.models.combination import LinearEnergyModel
from carryall.models.pair_table import PairTable
from carryall.models.spline_table import tabulate
from carryall.models.zbl import ZBL
from structures import CUTOFF, small_dpa1, small_lj


def small_table(type_map: tuple[str, ...] = ("O", "H"), cutoff: float = CUTOFF, scale: float = 5.0) -> PairTable:
    """Repulsion of two types that ends smoothly at the cutoff; the pairs differ by what the types are, not by their order."""
    r = 0.02 * np.arange(1, round(cutoff / 0.02) + 1)
    strength = {("H", "H"): 0.4, ("H", "O"): 0.6, ("O", "O"): 1.0}
    pairs = [tuple(sorted((a, b))) for index, a in enumerate(type_map) for b in type_map[index:]]
    columns = [scale * strength[pair] * np.exp(-r / 1.5) * (1 - r / cutoff) ** 3 for pair in pairs]  # type: ignore[index]
    rows = np.stack([r, *columns], axis=1)
    return PairTable(type_map, tabulate(rows, cutoff), cutoff)


def small_bridged() -> Bridged:
    """DPA-1 without attention and a table; atoms of the shared structures have neighbours where the two are mixed."""
    return Bridged(small_dpa1(attn_layer=0), small_table(), sw_rmin=1.6, sw_rmax=3.0)


def small_sum() -> LinearEnergyModel:
    """Models with cutoffs and type maps of their own."""
    models = [small_dpa1(attn_layer=0), small_table(("H", "O"), 3.0), small_lj()]
    return LinearEnergyModel(models, ("O", "H"), weights=(0.7, -0.4, 1.2))


def small_zbl() -> ZBL:
    """Heavy atoms, which repel at the distances of the shared structures."""
    return ZBL(("Cu", "Au"), 1.5, CUTOFF)
