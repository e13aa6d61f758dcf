"""One rank's part of a system between two rebuilds, and how it is made: cuts, migration, halo, pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.sharing import ATOM_INDEX
from carryall.engines.domain.balance import balanced
from carryall.engines.domain.bricks import Bricks, Frame, Grid, check_grid, choose_grid
from carryall.engines.domain.group import RankGroup
from carryall.engines.domain.halo import Halo, Owned, build_halo
from carryall.engines.domain.migration import migrate
from carryall.engines.domain.pairs import PairList, search
from carryall.errors import InputError, nearest
from carryall.exchange import Exchange
from carryall.exchange.transport import agree
from carryall.graph.neighbor_search import type_indices

BALANCES = ("atoms", "time", "none")
TOLERANCE = 0.1
"""Part by which the most loaded rank may exceed the mean before cuts are moved."""


@dataclass(frozen=True, eq=False)
class Domain:
    """What a rank has of the others, and its pairs; right as long as no atom moved further than half the skin."""

    exchange: Exchange
    ids: Tensor
    """(n_points,) int64, the atoms of the whole system that own atoms and ghosts are."""
    types: Tensor
    """(n_points,) int64."""
    image: Tensor
    """(n_points, 3) float64, lattice vectors to be added to where owners have the atoms."""
    pairs: PairList
    positions: Tensor
    """(n_local, 3) Å at the time of the search."""
    box: Tensor
    """(3, 3) Å likewise."""

    @cached_property
    def inverse(self) -> Tensor:
        """Of the box."""
        return torch.linalg.inv(self.box)

    def displacements(self, positions: Tensor, box: Tensor) -> Tensor:
        """(n_local, 3) Å moved since the search, beyond what the cell moved."""
        before = self.positions if torch.equal(box, self.box) else self.positions @ (self.inverse @ box)
        return positions - before

    def allowance(self, box: Tensor, cutoff: float, skin: float) -> float:
        """Displacement, Å, up to which no pair within the cutoff can be missing.

        With F the deformation of the cell, pairs further apart than the reach R at the search are now further apart than
        R s_min(F) - 2 u, which has to be at least the cutoff.
        """
        if torch.equal(box, self.box):
            return 0.5 * skin
        smallest = float(torch.linalg.svdvals(self.inverse @ box)[-1])
        return 0.5 * ((cutoff + skin) * smallest - cutoff)

    def points(self, positions: Tensor, box: Tensor) -> Tensor:
        """(n_points, 3) Å: own atoms, moved into the brick by lattice vectors, and ghosts. Collective."""
        return placed(self.exchange, positions, self.image, box)


def placed(exchange: Exchange, positions: Tensor, image: Tensor, box: Tensor) -> Tensor:
    """(n_points, 3) Å of own atoms (n_local, 3) and of ghosts, each where its image is. Collective."""
    return torch.cat([positions, exchange.forward(positions)]) + image @ box


class Decomposition:
    """Cuts space between the ranks, and moves the cuts and the atoms when a domain is made anew.

    grid: bricks along each cell vector; None: the one with the smallest surface. balance: cuts are moved such that ranks have
    the same number of atoms ("atoms"), or take the same time ("time"), when the most loaded one has a tenth more than the
    mean; "none" keeps bricks of one size.
    """

    def __init__(
        self, group: RankGroup, cutoff: float, skin: float, type_map: tuple[str, ...], grid: Grid | None, balance: str
    ) -> None:
        if balance not in BALANCES:
            raise InputError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}{nearest(balance, BALANCES)}")
        if not skin >= 0:
            raise InputError(f"skin must not be negative, got {skin}")
        self.group, self.cutoff, self.skin, self.type_map = group, cutoff, skin, type_map
        self.grid = None if grid is None else check_grid(grid, group.size)
        self.balance = balance
        self.bricks: Bricks | None = None
        self.n_rebuilds = self.n_migrations = 0
        """Domains made, and atoms that left this rank, so far."""
        self.seconds = 0.0
        """That the model took since the last rebuild."""

    def rebuild(self, batch: Batch) -> Domain:
        """Atoms go to their owners, in place, and every rank gets its ghosts and pairs. Collective."""
        frame = Frame.of(batch.cell[0], batch.pbc[0])
        positions = batch.positions.detach().cpu().double()
        fractions, _ = frame.fractions(positions)
        self.bricks = self._cut(frame, fractions, positions, batch.get(ATOM_INDEX))
        self.n_migrations += migrate(batch, self.bricks.owner(fractions), self.group.transport)
        self.n_rebuilds += 1
        self.seconds = 0.0
        fractions, whole = frame.fractions(batch.positions)
        types, ids = type_indices(batch.atomic_numbers, self.type_map).cpu(), batch.get(ATOM_INDEX).cpu()
        halo = build_halo(
            Owned(fractions, whole, types, ids), self.bricks, frame, self.cutoff + self.skin, self.group.transport
        )
        return self._domain(batch, frame, halo, whole, types, ids)

    def _domain(self, batch: Batch, frame: Frame, halo: Halo, whole: Tensor, types: Tensor, ids: Tensor) -> Domain:
        device, positions, box = batch.device, batch.positions.detach().clone(), frame.box.to(batch.device)
        exchange = Exchange(halo.plan, self.group.transport)
        image = torch.cat([-whole, halo.image]).double().to(device)
        return Domain(
            exchange=exchange,
            ids=torch.cat([ids, halo.ids]),
            types=torch.cat([types, halo.types]).to(device),
            image=image,
            pairs=search(placed(exchange, positions, image, box), len(positions), self.cutoff + self.skin),
            positions=positions,
            box=box,
        )

    def _cut(self, frame: Frame, fractions: Tensor, positions: Tensor, ids: Tensor) -> Bricks:
        """The bricks for the atoms as they are; InputError on every rank for positions that are not finite."""
        bad = (~torch.isfinite(positions).all(1)).nonzero()
        count, inf = len(fractions), torch.full((3,), torch.inf, dtype=torch.float64)
        ends = (fractions.amin(0), -fractions.amax(0)) if count else (inf, inf)
        facts = torch.cat([torch.tensor([count, self.seconds, len(bad)], dtype=torch.float64), *ends])
        found = self.group.gathered(torch.where(facts.isnan(), torch.inf, facts).clamp(max=1e300))
        if float(found[:, 2].sum()):
            row = int(bad[0]) if len(bad) else 0
            text = f"position of atom {int(ids[row])} is {positions[row].tolist()}: expected finite numbers"
            agree(self.group.transport, text if len(bad) else None)
        low = torch.where(frame.pbc, 0.0, found[:, 3:6].amin(0))
        high = torch.where(frame.pbc, 1.0, (-found[:, 6:9]).amax(0)).maximum(low)
        if self.grid is None:
            self.grid = choose_grid(self.group.size, (high - low) * frame.heights, self.cutoff + self.skin)
        if self.balance == "none":
            return self.bricks if self.bricks is not None else Bricks.uniform(self.grid, low, high)
        by_time = self.balance == "time" and self.bricks is not None and bool((found[:, 1] > 0).all())
        load = found[:, 1] if by_time else found[:, 0]
        if self.bricks is not None and float(load.amax()) <= (1.0 + TOLERANCE) * float(load.mean()):
            return self.bricks
        each = (found[:, 1] / found[:, 0].clamp(min=1.0)).sqrt() if by_time else torch.ones_like(load)
        weights = torch.full((count,), float(each[self.group.rank] / each.mean()), dtype=torch.float64)
        return balanced(self.grid, fractions, weights, low, high, self.group.total)
