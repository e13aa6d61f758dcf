"""Random structures for the tests of this room, and what equality of structures means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from carryall.data import AtomicData
from carryall.data.fields import FIELDS, OF_EXTRAS

DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
# One extra of every dtype and of several ranks, on every level.
EXTRAS = {
    "atom": {
        f"a_{i}": (dtype, shape)
        for i, (dtype, shape) in enumerate(zip(DTYPES, [(), (2,), (), (3,), (), (2, 2), ()], strict=True))
    },
    "system": {
        f"s_{i}": (dtype, shape)
        for i, (dtype, shape) in enumerate(zip(DTYPES, [(), (), (4,), (), (2, 3), (), (2,)], strict=True))
    },
    "edge": {
        f"e_{i}": (dtype, shape) for i, (dtype, shape) in enumerate(zip(DTYPES, [(3,), (), (), (), (2,), (), ()], strict=True))
    },
}
OPTIONAL = ("velocities", "masses", "charges", "spins", "forces", "energy", "stress")


def random_tensor(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that a wrong copy (zeros, the neighbour's row) would betray."""
    if dtype.is_floating_point:
        return torch.from_numpy(np.asarray(rng.normal(size=shape))).to(dtype)
    return torch.from_numpy(np.asarray(rng.integers(0, 2 if dtype == torch.bool else 200, size=shape))).to(dtype)


def random_structure(
    rng: np.random.Generator,
    n_atoms: int,
    n_edges: int = 0,
    *,
    optional: tuple[str, ...] = OPTIONAL,
    extras: bool = True,
    dtype: torch.dtype = torch.float64,
    cell: bool = True,
) -> AtomicData:
    """A structure with these optional fields, one extra of every dtype on each level, and info."""
    values: dict[str, Any] = {}
    for name in optional:
        field = FIELDS[name]
        shape = field.row_shapes[0] if field.level == "system" else (n_atoms, *field.row_shapes[0])
        values[name] = random_tensor(rng, dtype, shape)
    if "masses" in values:
        values["masses"] = values["masses"].abs() + 1
    if extras:
        rows: dict[str, tuple[int, ...]] = {"atom": (n_atoms,), "system": (), "edge": (n_edges,)}
        for level, table in EXTRAS.items():
            values[OF_EXTRAS[level]] = {k: random_tensor(rng, d, (*rows[level], *shape)) for k, (d, shape) in table.items()}
        values["edge_index"] = rng.integers(0, n_atoms, size=(n_edges, 2)) if n_atoms else np.zeros((0, 2), dtype=np.int64)
    return AtomicData(
        positions=random_tensor(rng, dtype, (n_atoms, 3)),
        atomic_numbers=rng.integers(1, 119, size=n_atoms),
        cell=random_tensor(rng, dtype, (3, 3)) if cell else None,
        pbc=rng.integers(0, 2, size=3).astype(bool) if cell else None,
        info={"name": f"s{rng.integers(10**9)}", "nested": {"k": [1, 2]}},
        **values,
    )


@st.composite
def structure_lists(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> list[AtomicData]:
    """Structures with the same keys, of ragged sizes, also without atoms, edges or cell."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.booleans()), min_size=min_size, max_size=max_size))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    optional = tuple(draw(st.sets(st.sampled_from(OPTIONAL))))
    return [
        random_structure(rng, n_atoms, n_edges if n_atoms else 0, optional=optional, dtype=dtype, cell=cell)
        for n_atoms, n_edges, cell in sizes
    ]


def assert_same(one: AtomicData, other: AtomicData, rtol: float = 0.0) -> None:
    """Every field, extra, dtype and info; exactly, unless a tolerance is given."""
    tables = [
        {**{name: getattr(data, name) for name in FIELDS}, **data.atom_extras, **data.system_extras, **data.edge_extras}
        for data in (one, other)
    ]
    for left, right in zip(OF_EXTRAS.values(), OF_EXTRAS.values(), strict=True):
        assert getattr(one, left).keys() == getattr(other, right).keys()
    for name, value in tables[0].items():
        found = tables[1][name]
        assert (value is None) == (found is None), name
        if value is not None:
            assert value.dtype == found.dtype, name
            assert value.shape == found.shape, name
            torch.testing.assert_close(
                found, value, rtol=rtol, atol=rtol, equal_nan=True, msg=lambda text, key=name: f"{key}: {text}"
            )
    assert_same_info(one.info, other.info)


def assert_same_info(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Same keys, types and values, arrays too."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(other[key], value)
        else:
            assert other[key] == value
            assert type(other[key]) is type(value)
