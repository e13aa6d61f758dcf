"""The ghosts of a rank: images of atoms, its own and others', that lie around its brick; built by those who own the atoms.

Each rank looks which images of its atoms lie in the widened bricks of the ranks around it and tells these, so that no rank
needs to know more than its own atoms and everybody's brick.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carryall.engines.domain.bricks import Bricks, Frame
from carryall.exchange import ExchangePlan, Transport

ROUNDING = 1e-9
"""Fractions by which bricks are widened further."""


@dataclass(frozen=True, eq=False)
class Halo:
    """A rank's ghosts, those that are images of its own atoms first, then by owner; valid until atoms migrate."""

    plan: ExchangePlan
    ids: Tensor
    """(n_ghost,) int64, the atoms that they are images of."""
    types: Tensor
    """(n_ghost,) int64."""
    image: Tensor
    """(n_ghost, 3) int64, lattice vectors between a ghost and where its owner has the atom."""


@dataclass(frozen=True, eq=False)
class Owned:
    """What a rank's atoms tell: fractions in the cell (n, 3) and the lattice vectors taken off, types, ids (n,)."""

    fractions: Tensor
    whole: Tensor
    types: Tensor
    ids: Tensor


def build_halo(owned: Owned, bricks: Bricks, frame: Frame, reach: float, transport: Transport) -> Halo:
    """All images within `reach` (Å) of the brick, so of every atom in it. Collective."""
    margin = reach / frame.heights + ROUNDING
    low, high = bricks.bounds(frame.pbc)
    low, high = low - margin, high + margin
    none = torch.zeros(0, dtype=torch.int64)
    messages, sent = [none] * transport.size, [none] * transport.size
    own_row, own_image = none, torch.zeros(0, 3, dtype=torch.int64)
    for peer in near_ranks(owned.fractions, low, high, frame.pbc):
        row, shift = images_inside(owned.fractions, low[peer], high[peer], frame.pbc)
        image = shift - owned.whole[row]
        if peer == transport.rank:
            real = shift.any(1)
            own_row, own_image = row[real], image[real]
        elif len(row):
            sent[peer], place = torch.unique(row, return_inverse=True)
            head = torch.tensor([len(sent[peer])])
            rows = torch.cat([place[:, None], image], 1)
            messages[peer] = torch.cat([head, owned.ids[sent[peer]], owned.types[sent[peer]], rows.reshape(-1)])
    found = transport.all_to_all(messages)
    return _assembled(owned, own_row, own_image, sent, found)


def _assembled(owned: Owned, own_row: Tensor, own_image: Tensor, sent: list[Tensor], found: list[Tensor]) -> Halo:
    ids, types, images, foreign_row = [owned.ids[own_row]], [owned.types[own_row]], [own_image], []
    receives, begin = [], 0
    for peer, message in enumerate(found):
        if not len(message):
            continue
        count = int(message[0])
        rows = message[1 + 2 * count :].reshape(-1, 4)
        ids.append(message[1 : 1 + count][rows[:, 0]])
        types.append(message[1 + count : 1 + 2 * count][rows[:, 0]])
        images.append(rows[:, 1:])
        foreign_row.append(rows[:, 0] + begin)
        receives.append((peer, begin, begin + count))
        begin += count
    sends, end = [], 0
    for peer, row in enumerate(sent):
        if len(row):
            sends.append((peer, end, end + len(row)))
            end += len(row)
    n_ghost = sum(map(len, ids))
    plan = ExchangePlan(
        n_local=len(owned.ids),
        n_ghost=n_ghost,
        image_ghost=torch.arange(len(own_row)),
        image_row=own_row,
        foreign_ghost=torch.arange(len(own_row), n_ghost),
        foreign_row=torch.cat([own_row[:0], *foreign_row]),
        send_row=torch.cat(sent),
        sends=tuple(sends),
        receives=tuple(receives),
    )
    return Halo(plan, torch.cat(ids), torch.cat(types), torch.cat(images))


def near_ranks(fractions: Tensor, low: Tensor, high: Tensor, pbc: Tensor) -> list[int]:
    """Ranks whose widened bricks, low to high (size, 3), an image of one of the atoms may lie in."""
    if not len(fractions):
        return []
    least, most = fractions.amin(0), fractions.amax(0)
    periodic = (low - most).ceil() <= (high - least).floor()
    inside = torch.where(pbc, periodic, (least <= high) & (most >= low))
    found: list[int] = inside.all(1).nonzero().squeeze(1).tolist()
    return found


def images_inside(fractions: Tensor, low: Tensor, high: Tensor, pbc: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms (n, 3) and the shifts by which images of them lie between low and high (3,): (m,) and (m, 3) int64.

    Every image there is, several of one atom where the box is small; along open axes there is only the atom itself.
    """
    first = torch.where(pbc, (low - fractions).ceil(), 0.0).long()
    last = torch.where(pbc, (high - fractions).floor(), 0.0).long()
    inside = pbc | ((fractions >= low) & (fractions <= high))
    counts = torch.where(inside, (last - first + 1).clamp(min=0), 0)
    number = counts.prod(1)
    row = torch.repeat_interleave(number)
    place = torch.arange(len(row)) - (number.cumsum(0) - number)[row]
    own = counts[row]
    steps = torch.stack([place // (own[:, 1] * own[:, 2]), place // own[:, 2] % own[:, 1], place % own[:, 2]], 1)
    return row, first[row] + steps
