"""Which atoms of a system are meant: by number, mask, element or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.elements import SYMBOLS
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import InputError, nearest

Mask: TypeAlias = Sequence[bool] | np.ndarray | Tensor
Where: TypeAlias = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class AtomSelection:
    """Exactly one of four ways to name atoms, the same for every system of a batch.

    indices: atoms of every system, counted within it, from 0 on; negative from its end. mask: one bool for each atom, of
    systems that all have that many atoms. elements: symbols or atomic numbers. where: a function of a batch that returns
    (n_atoms,) bool; for rules that go by position. owner: who asks, for messages.
    """

    owner: str
    indices: tuple[int, ...] | None = None
    mask: tuple[bool, ...] | None = None
    elements: tuple[int, ...] | None = None
    where: Where | None = None

    @classmethod
    def of(
        cls,
        owner: str,
        indices: Iterable[int] | None = None,
        mask: Mask | None = None,
        elements: Iterable[str | int] | None = None,
        where: Where | None = None,
    ) -> AtomSelection:
        """InputError unless exactly one is given, with usable values."""
        given = [
            name
            for name, value in (("indices", indices), ("mask", mask), ("elements", elements), ("where", where))
            if value is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InputError(f"{owner} needs one of indices, mask, elements and where to say which atoms, got {found}")
        return cls(
            owner,
            None if indices is None else _whole_numbers(owner, indices),
            None if mask is None else _truths(owner, mask),
            None if elements is None else tuple(_atomic_number(owner, one) for one in elements),
            where,
        )

    def __call__(self, batch: Batch) -> Tensor:
        """(n_atoms,) bool, true for the atoms that are meant; InputError names a system that does not fit."""
        if self.where is not None:
            return self._by_function(self.where, batch)
        if self.elements is not None:
            return torch.isin(batch.atomic_numbers, torch.tensor(self.elements, device=batch.device, dtype=torch.int64))
        counts = batch.atom_counts
        if self.mask is not None:
            for index, count in enumerate(counts):
                if count != len(self.mask):
                    raise InputError(
                        f"the mask of {self.owner} has {len(self.mask)} entries, but system {_name(batch, index)} has {count} "
                        "atoms: give systems of different sizes a move_mask each, or say which atoms by elements or where"
                    )
            return torch.tensor(self.mask * len(counts), dtype=torch.bool, device=batch.device)
        assert self.indices is not None
        found, start = torch.zeros(batch.n_atoms, dtype=torch.bool), 0
        for index, count in enumerate(counts):
            for one in self.indices:
                if not -count <= one < count:
                    raise InputError(f"{self.owner} names atom {one}, but system {_name(batch, index)} has {count} atoms")
                found[start + one % count] = True
            start += count
        return found.to(batch.device)

    def _by_function(self, where: Where, batch: Batch) -> Tensor:
        found = where(batch)
        if not isinstance(found, Tensor) or found.dtype != torch.bool or tuple(found.shape) != (batch.n_atoms,):
            shown = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else repr(found)
            raise InputError(f"the function of {self.owner} returned {shown}, expected ({batch.n_atoms},) of torch.bool")
        return found


def _name(batch: Batch, index: int) -> int:
    return int(batch.get(SYSTEM_ID)[index]) if SYSTEM_ID in batch else index


def _whole_numbers(owner: str, indices: Iterable[int]) -> tuple[int, ...]:
    array = np.asarray(list(indices))
    if array.size and array.dtype.kind not in "iu":
        hint = " (a list of true and false is a mask)" if array.dtype.kind == "b" else ""
        raise InputError(f"indices of {owner} must be whole numbers, got {array.tolist()}{hint}")
    return tuple(int(one) for one in array.reshape(-1))


def _truths(owner: str, mask: Mask) -> tuple[bool, ...]:
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim != 1 or array.dtype != bool:
        raise InputError(f"the mask of {owner} must be one bool for each atom, got an array {array.shape} of {array.dtype}")
    return tuple(bool(one) for one in array)


def _atomic_number(owner: str, element: str | int) -> int:
    if isinstance(element, str):
        if element not in SYMBOLS:
            raise InputError(f"{owner}: there is no element {element!r}{nearest(element, SYMBOLS)}")
        return SYMBOLS.index(element)
    if isinstance(element, bool) or not isinstance(element, (int, np.integer)) or not 0 < element < len(SYMBOLS):
        raise InputError(f"{owner}: elements are symbols or atomic numbers, got {element!r}")
    return int(element)
