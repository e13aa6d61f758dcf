"""Who needs which rows of whom: a plan is made once for a set of atoms and serves every exchange until the atoms change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.exchange.transport import Transport, agree

Ranges = tuple[tuple[int, int, int], ...]
"""(peer, first row, row after the last) of a buffer, peers ascending; ranges of no rows are left out."""


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """One rank's part of an exchange. A row that several ghosts need is sent once; images of own atoms are not sent."""

    n_local: int
    n_ghost: int
    image_ghost: Tensor
    """(n_images,) int64, ghosts whose owner is on this rank."""
    image_row: Tensor
    """(n_images,) int64, the local atoms that they are images of."""
    foreign_ghost: Tensor
    """(n_foreign,) int64, ghosts whose owner is on another rank."""
    foreign_row: Tensor
    """(n_foreign,) int64, the row of the receive buffer that each gets."""
    send_row: Tensor
    """(n_sent,) int64, local atoms in the order of the send buffer."""
    sends: Ranges
    receives: Ranges

    @cached_property
    def source(self) -> Tensor:
        """(n_ghost,) int64, where each ghost's owner is: own atoms first, the rows of the receive buffer behind them."""
        source = torch.empty(self.n_ghost, dtype=torch.int64, device=self.send_row.device)
        source[self.image_ghost] = self.image_row
        source[self.foreign_ghost] = self.foreign_row + self.n_local
        return source

    @property
    def n_received(self) -> int:
        """Rows of the receive buffer."""
        return self.receives[-1][2] if self.receives else 0

    def to(self, device: torch.device) -> ExchangePlan:
        """The plan with its indices on another device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return ExchangePlan(**{**values, **moved})

    def misfit(self, n_local: int, n_ghost: int) -> str | None:
        """Why it does not serve a graph of these sizes; None when it does."""
        if (n_local, n_ghost) == (self.n_local, self.n_ghost):
            return None
        return (
            f"the exchange plan is for {self.n_local} local and {self.n_ghost} ghost atoms, but the graph has {n_local} and "
            f"{n_ghost}: it belongs to another graph; make one with plan_from_ids"
        )


def plan_from_owners(n_local: int, ghost_owner: Tensor) -> ExchangePlan:
    """The plan of one process: ghosts are images of its own atoms, ghost_owner (n_ghost,)."""
    bad = ((ghost_owner < 0) | (ghost_owner >= n_local)).nonzero()
    if len(bad):
        ghost = int(bad[0])
        raise InputError(f"ghost_owner[{ghost}] is {int(ghost_owner[ghost])}, expected 0 to {n_local - 1}")
    none, n_ghost = ghost_owner.new_zeros(0), len(ghost_owner)
    every = torch.arange(n_ghost, device=ghost_owner.device)
    return ExchangePlan(n_local, n_ghost, every, ghost_owner, none, none, none, (), ())


def plan_from_ids(local_ids: Tensor, ghost_ids: Tensor, transport: Transport) -> ExchangePlan:
    """The plan from global ids alone: (n_local,) of owned atoms and (n_ghost,) of ghosts, int64, not negative; collective.

    Each id is owned by one rank; ghosts of the same id may be on any rank, several times, and on its owner's. Who owns an id is
    found at rank id % size, so no rank needs to know all. InputError on every rank for an id that two own, or nobody.
    """
    agree(transport, _bad_ids("local_ids", local_ids) or _bad_ids("ghost_ids", ghost_ids) or _twice(local_ids))
    row, own = _find(local_ids, ghost_ids)
    image, foreign = own.nonzero().squeeze(1), (~own).nonzero().squeeze(1)
    needed, which = torch.unique(ghost_ids[foreign], return_inverse=True)
    owner, owner_row = _look_up(local_ids, needed, transport)
    lost = (owner < 0).nonzero()
    agree(transport, f"atom id {int(needed[lost[0, 0]])} is a ghost here but no rank owns it" if len(lost) else None)
    by_owner = owner.argsort(stable=True)
    place = torch.empty_like(by_owner)
    place[by_owner] = torch.arange(len(needed))
    counts = torch.bincount(owner, minlength=transport.size).tolist()
    asked = transport.all_to_all(list(owner_row[by_owner].split(counts)))
    return ExchangePlan(
        n_local=len(local_ids),
        n_ghost=len(ghost_ids),
        image_ghost=image,
        image_row=row[image],
        foreign_ghost=foreign,
        foreign_row=place[which],
        send_row=torch.cat(asked),
        sends=_ranges([len(rows) for rows in asked]),
        receives=_ranges(counts),
    )


def _bad_ids(name: str, ids: Tensor) -> str | None:
    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device.type != "cpu":
        return f"{name} has shape {tuple(ids.shape)}, dtype {ids.dtype} and is on {ids.device}: expected (n,) int64 on cpu"
    negative = (ids < 0).nonzero()
    return f"{name}[{int(negative[0])}] is {int(ids[negative[0, 0]])}: ids are not negative" if len(negative) else None


def _twice(ids: Tensor) -> str | None:
    ordered = ids.sort().values
    same = (ordered[1:] == ordered[:-1]).nonzero()
    return f"atom id {int(ordered[same[0, 0]])} is owned twice" if len(same) else None


def _find(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each wanted id, and whether it is there at all; rows of others mean nothing."""
    if not len(ids):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    order = ids.argsort()
    ordered = ids[order]
    place = torch.searchsorted(ordered, wanted).clamp_max(len(ids) - 1)
    return order[place], ordered[place] == wanted


def _look_up(local_ids: Tensor, needed: Tensor, transport: Transport) -> tuple[Tensor, Tensor]:
    """Rank that owns each needed id, -1 where nobody does, and its row there."""
    size = transport.size
    published = transport.all_to_all(_by_home(local_ids, size))
    # the owner's own row number, since an id alone does not tell it
    rows = transport.all_to_all([(local_ids % size == home).nonzero().squeeze(1) for home in range(size)])
    known, known_row = torch.cat(published), torch.cat(rows)
    known_rank = torch.cat([torch.full_like(ids, rank) for rank, ids in enumerate(published)])
    agree(transport, _twice(known))
    questions = transport.all_to_all(_by_home(needed, size))
    answers = []
    for asked in questions:
        place, found = _find(known, asked)
        where = torch.stack([known_rank[place], known_row[place]], 1) if len(known) else asked.new_zeros(len(asked), 2)
        answers.append(torch.where(found[:, None], where, -1).reshape(-1))
    replies = torch.cat([reply.reshape(-1, 2) for reply in transport.all_to_all(answers)])
    found_for = torch.empty_like(replies)
    found_for[(needed % size).argsort(stable=True)] = replies
    return found_for[:, 0].contiguous(), found_for[:, 1].contiguous()


def _by_home(ids: Tensor, size: int) -> list[Tensor]:
    return [ids[ids % size == home] for home in range(size)]


def _ranges(counts: Sequence[int]) -> Ranges:
    out, begin = [], 0
    for peer, count in enumerate(counts):
        if count:
            out.append((peer, begin, begin + count))
        begin += count
    return tuple(out)
