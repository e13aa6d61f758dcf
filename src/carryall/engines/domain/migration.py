"""Atoms that change their owner, with every key that the batch has of them; and all atoms on rank 0, for files."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.fields import LEVELS
from carryall.data.levels import Columns
from carryall.data.sharing import ATOM_INDEX, hold_atoms
from carryall.errors import InputError
from carryall.exchange import Transport


def packed(rows: Mapping[str, Tensor]) -> Tensor:
    """(n, width) int64 that hold rows (n, ...) of keys of any real dtype, losslessly, in the order of their names."""
    columns = []
    for name in sorted(rows):
        flat = rows[name].detach().cpu()
        flat = flat.reshape(len(flat), _width(flat))
        columns.append(flat.double().view(torch.int64) if flat.is_floating_point() else flat.long())
    return torch.cat(columns, 1)


def unpacked(table: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`, with the dtypes, trailing shapes and device of `like`."""
    found, begin = {}, 0
    for name in sorted(like):
        old, width = like[name], _width(like[name])
        part = table[:, begin : begin + width].contiguous()
        part = part.view(torch.float64) if old.is_floating_point() else part
        found[name] = part.to(old.dtype).reshape(len(table), *old.shape[1:]).to(old.device)
        begin += width
    return found


def _width(rows: Tensor) -> int:
    return math.prod(rows.shape[1:])


def migrate(batch: Batch, owner: Tensor, transport: Transport) -> int:
    """Bring every atom to the rank `owner` (n_atoms,) says, in place; returns how many left this rank. Collective.

    Atoms of a rank are in the order of their index, so that nothing depends on the ways that they came.
    """
    rows = {key: batch.get(key) for key in batch.keys("atom")}
    leaving = owner != transport.rank
    table = packed({key: value[leaving.to(value.device)] for key, value in rows.items()})
    target = owner[leaving]
    messages = [table[target == peer].reshape(-1) for peer in range(transport.size)]
    width = table.shape[1]
    arrived = torch.cat([one.reshape(-1, width) for one in transport.all_to_all(messages)])
    if not len(arrived) and not len(target):
        return 0
    new = unpacked(arrived, rows)
    joined = {key: torch.cat([value[~leaving.to(value.device)], new[key]]) for key, value in rows.items()}
    order = joined[ATOM_INDEX].argsort()
    hold_atoms(batch, {key: value[order] for key, value in joined.items()})
    return len(target)


def part_of(whole: Batch, transport: Transport) -> Batch:
    """An equal share of the atoms of a batch of one system, any of them: the first rebuild brings them to their owners.

    Every rank has to give the same whole. Its key `atom_index` names atoms for good.
    """
    if whole.n_systems != 1:
        raise InputError(
            f"ranks share the atoms of one system, {whole.n_systems} were given: run many systems without ranks, in one batch"
        )
    n_atoms, rank, size = whole.n_atoms, transport.rank, transport.size
    rows = slice(n_atoms * rank // size, n_atoms * (rank + 1) // size)
    part = whole.clone()
    part.set(ATOM_INDEX, torch.arange(n_atoms, device=whole.device), level="atom")
    hold_atoms(part, {key: part.get(key)[rows].clone() for key in part.keys("atom")})
    return part


def gathered(part: Batch, n_atoms: int, transport: Transport) -> Batch | None:
    """The whole batch on rank 0, in the order it had at the start; None elsewhere. Collective; for files, not for steps."""
    rows = {key: part.get(key) for key in part.keys("atom")}
    table = packed(rows)
    none = torch.zeros(0, dtype=torch.int64)
    found = transport.all_to_all([table.reshape(-1), *[none] * (transport.size - 1)])
    if transport.rank:
        return None
    joined = unpacked(torch.cat([one.reshape(-1, table.shape[1]) for one in found]), rows)
    index = joined.pop(ATOM_INDEX)
    if not torch.equal(index.sort().values.cpu(), torch.arange(n_atoms)):
        raise RuntimeError(f"atoms were lost or doubled: {len(index)} came together, expected {n_atoms}")
    order = index.argsort()
    values = {level: {key: part.get(key) for key in part.keys(level)} for level in LEVELS}
    values["atom"] = {key: value[order] for key, value in joined.items()}
    counts = torch.tensor([n_atoms]).numpy()
    return Batch(Columns(counts, counts * 0, values, [dict(one) for one in part.info]))
