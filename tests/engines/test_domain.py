"""Bricks, halos and migration: every edge is on one rank, every ghost lies in a halo, no atom is lost; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carryall.data import AtomicData, Batch
from carryall.data.sharing import ATOM_INDEX, share, system_sizes
from carryall.dynamics import (
    FIRE,
    NPH,
    NPT,
    NVE,
    FixAtoms,
    FixCenterOfMass,
    NPTStochasticCellRescaling,
    NVTLangevin,
    initialize_velocities,
)
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.thermo import kinetic_energy, max_force, pressure, temperature
from carryall.engines import domain
from carryall.engines.domain.balance import balanced
from carryall.engines.domain.bricks import Bricks, Frame, choose_grid
from carryall.engines.domain.decomposition import Decomposition
from carryall.engines.domain.evaluator import DomainEvaluator
from carryall.engines.domain.group import RankGroup
from carryall.engines.domain.migration import gathered, migrate, part_of
from carryall.engines.domain.system import evaluator_of
from carryall.errors import InputError
from carryall.exchange import SerialTransport, Transport
from carryall.graph import graph_from_structures
from carryall.models import EagerPotential
from message_passing import small_message_passing
from ranks import run_ranks
from structures import edge_set, fcc, small_alloy

POTENTIAL = EagerPotential(small_alloy())
GRIDS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 1, 2)], 3: [(3, 1, 1), (1, 3, 1)], 4: [(2, 2, 1), (1, 2, 2), (4, 1, 1)]}


@st.composite
def boxes(draw: Any) -> tuple[AtomicData, int, tuple[int, int, int], str, float]:
    """A structure in any cell, periodic along any axes, with ranks, their grid, how they are cut, and a reach."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pbc = draw(st.tuples(*[st.booleans()] * 3))
    cell = np.diag(rng.uniform(2.0, 8.0, 3)) + rng.uniform(-0.8, 0.8, (3, 3))
    for axis in range(3):
        if not pbc[axis] and draw(st.booleans()):
            cell[axis] = 0.0
    n_atoms = draw(st.integers(1, 12))
    positions = rng.uniform(-1.5, 2.5, (n_atoms, 3)) @ Frame.of(torch.from_numpy(cell), torch.tensor(pbc)).box.numpy()
    size = draw(st.integers(1, 4))
    data = AtomicData(positions, rng.choice([29, 79], n_atoms), cell if cell.any() else None, pbc)
    return data, size, draw(st.sampled_from(GRIDS[size])), draw(st.sampled_from(["atoms", "none"])), draw(st.floats(1.5, 5.0))


@given(boxes())
@settings(max_examples=80, deadline=None)
def test_every_edge_is_on_one_rank_and_every_ghost_in_a_halo(box: tuple[AtomicData, int, Any, str, float]) -> None:
    data, size, grid, balance, cutoff = box
    whole = moving_batch([data], [0])

    def rank(transport: Transport) -> tuple[list[tuple[int, ...]], list[int]]:
        part = part_of(whole, transport)
        group = RankGroup(transport, data.n_atoms)
        share(part, group)
        made = Decomposition(group, cutoff, 0.2, ("Cu", "Au"), grid, balance)
        found = made.rebuild(part)
        points = found.points(part.positions, found.box)
        ids, n_local = found.ids.tolist(), part.n_atoms
        assert made.bricks is not None
        _check_ghosts(made.bricks, found.box, data.pbc, points, n_local, transport.rank, cutoff + 0.2)
        edges = found.pairs.edges(points, cutoff)
        shift = (found.image[edges.neighbor] - found.image[edges.center]).long().tolist()
        named = zip(edges.center.tolist(), edges.neighbor.tolist(), shift, strict=True)
        return [(ids[c], ids[n], *s) for c, n, s in named], ids[:n_local]

    found = run_ranks(size, rank)
    edges = [edge for part, _ in found for edge in part]
    assert len(edges) == len(set(edges)), "an edge is there twice"
    assert sorted(atom for _, own in found for atom in own) == list(range(data.n_atoms))
    try:
        graph = graph_from_structures([data], cutoff, ("Cu", "Au"))
    except InputError:  # coincident atoms
        return
    assert set(edges) == edge_set(graph)


def _check_ghosts(
    bricks: Bricks, box: torch.Tensor, pbc: torch.Tensor, points: torch.Tensor, n_local: int, rank: int, reach: float
) -> None:
    low, high = (corner[rank] for corner in bricks.bounds(pbc))
    fractions = points @ torch.linalg.inv(box)
    own, margin = fractions[:n_local], reach * torch.linalg.inv(box).norm(dim=0) + 1e-8
    assert bool(((own >= low - 1e-9) & (own <= high + 1e-9)).all())
    assert bool(((fractions >= low - margin) & (fractions <= high + margin)).all())
    distinct = torch.unique((fractions * 1e6).round(), dim=0)
    assert len(distinct) == len(points) or len(torch.unique(own, dim=0)) < n_local


@given(st.integers(1, 4), st.integers(0, 25), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_nothing_of_an_atom_is_lost_on_its_way(size: int, n_atoms: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = AtomicData(rng.normal(size=(n_atoms, 3)), rng.choice([29, 79], n_atoms))
    whole = moving_batch([data], [0])
    whole.set("flag", torch.from_numpy(rng.random((n_atoms, 3)) > 0.5), level="atom")
    whole.set("narrow", torch.from_numpy(rng.normal(size=(n_atoms, 2, 2)).astype(np.float32)), level="atom")
    whole.set("count", torch.from_numpy(rng.integers(-5, 5, n_atoms).astype(np.int32)), level="atom")
    owners = torch.from_numpy(rng.integers(0, size, (3, n_atoms)))

    def rank(transport: Transport) -> Batch | None:
        part = part_of(whole, transport)
        for owner in owners:
            left = migrate(part, owner[part.get(ATOM_INDEX)], transport)
            assert left <= n_atoms
            assert part.get(ATOM_INDEX).tolist() == (owner == transport.rank).nonzero().squeeze(1).tolist()
        return gathered(part, n_atoms, transport)

    found = run_ranks(size, rank)
    assert found[1:] == [None] * (size - 1)
    assert found[0] is not None
    assert set(found[0].keys()) == set(whole.keys())
    for key in whole.keys():  # noqa: SIM118
        assert found[0].get(key).dtype == whole.get(key).dtype
        assert torch.equal(found[0].get(key), whole.get(key)), key


@given(st.integers(1, 4), st.sampled_from(["line", "plane", "box"]), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_cuts_share_the_load(parts: int, shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = {"line": (parts, 1, 1), "plane": (1, parts, 2), "box": (2, parts, 2)}[shape]
    fractions = torch.from_numpy(rng.beta(*rng.uniform(0.4, 3.0, 2), (5000, 3)))
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, 5000))
    ends = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    bricks = balanced(grid, fractions, weights, *ends, lambda values: values)
    load = torch.zeros(bricks.size, dtype=torch.float64).index_add(0, bricks.owner(fractions), weights)
    assert float(load.max() / load.mean()) < 1.06
    low, high = bricks.bounds(torch.ones(3, dtype=torch.bool))
    assert float((high - low).prod(1).sum()) == pytest.approx(1.0)
    inside = (fractions >= low[bricks.owner(fractions)]) & (fractions <= high[bricks.owner(fractions)])
    assert bool(inside.all())


def test_the_grid_has_the_smallest_surface() -> None:
    def grid(size: int, *lengths: float) -> tuple[int, int, int]:
        return choose_grid(size, torch.tensor(lengths, dtype=torch.float64), 3.0)

    assert grid(4, 100.0, 10.0, 10.0) == (4, 1, 1)
    assert grid(16, 60.0, 60.0, 5.0) == (4, 4, 1)
    assert grid(64, 100.0, 100.0, 100.0) == (4, 4, 4)
    assert grid(6, 200.0, 100.0, 200.0) == (3, 1, 2)
    assert grid(7, 5.0, 5.0, 50.0) == (1, 1, 7)


def crystal(jitter: float = 0.03) -> Batch:
    positions, cell = fcc((2, 2, 3), a=3.6, jitter=jitter)
    batch = moving_batch([AtomicData(positions, [29, 79] * (len(positions) // 2), cell)], [0])
    return initialize_velocities(batch, 300.0, seed=3)


def test_sums_over_atoms_go_over_ranks() -> None:
    whole = crystal()
    NVE(POTENTIAL).start(whole)

    def rank(transport: Transport) -> list[float]:
        dynamics = NVE(POTENTIAL)
        part = domain.spread(crystal(), dynamics, transport)
        dynamics.start(part)
        assert system_sizes(part).tolist() == [48]
        assert part.n_atoms < 48 or transport.size == 1
        found = (kinetic_energy(part), temperature(part, 3), pressure(part), max_force(part), part.energy)
        return [float(one[0]) for one in found]

    expected = [kinetic_energy(whole), temperature(whole, 3), pressure(whole), max_force(whole), whole.energy]
    for found in run_ranks(3, rank):
        assert found == pytest.approx([float(one[0]) for one in expected], rel=1e-12)


@pytest.mark.parametrize("kind", ["fixed", "center", "nph", "npt", "rescaling", "fire"])
def test_held_atoms_changing_cells_and_relaxation(kind: str) -> None:
    def make() -> Any:
        if kind == "fixed":
            return NVTLangevin(POTENTIAL, 600.0, 2.0, 5.0, seed=2, constraints=[FixAtoms(indices=[0, 5, 17])])
        if kind == "center":
            return NVTLangevin(POTENTIAL, 600.0, 2.0, 5.0, seed=2, constraints=[FixCenterOfMass()])
        if kind == "nph":
            return NPH(POTENTIAL, -5.0, 2.0, barostat_tau=200.0, mode="triclinic")
        if kind == "npt":
            return NPT(POTENTIAL, 600.0, -5.0, 2.0, tau=20.0, barostat_tau=200.0, mode="anisotropic")
        if kind == "rescaling":
            return NPTStochasticCellRescaling(POTENTIAL, 600.0, -5.0, 2.0, 20.0, 100.0, compressibility=0.02, seed=4)
        return FIRE(POTENTIAL, convergence_hook=0.01)

    steps = 200 if kind == "fire" else 40
    expected, reference = crystal(0.1), make()
    cell = expected.cell.clone()
    reference.run(expected, steps)
    if kind in ("nph", "npt", "rescaling"):
        assert float((expected.cell - cell).abs().max()) > 0.1

    def rank(transport: Transport) -> tuple[Batch | None, int]:
        dynamics = make()
        part = domain.spread(crystal(0.1), dynamics, transport)
        dynamics.run(part, steps)
        return domain.gather(part, dynamics), dynamics.step_count

    for size in (1, 3):
        found, count = run_ranks(size, rank)[0]
        assert found is not None
        assert count == reference.step_count
        assert float((found.positions - expected.positions).abs().max()) < 1e-10
        assert float((found.cell - expected.cell).abs().max()) < 1e-10


def test_cuts_follow_the_atoms_and_lists_are_never_too_old() -> None:
    """Atoms all in one half, then a jump without warning: the call is repeated with new lists."""
    positions, cell = fcc((4, 2, 2), a=3.6, jitter=0.02)
    data = AtomicData(positions, [29] * len(positions), cell * np.array([[2.0], [1.0], [1.0]]))

    def rank(transport: Transport) -> tuple[int, int, int, torch.Tensor]:
        dynamics = NVE(POTENTIAL)
        part = domain.spread(data, dynamics, transport, grid=(2, 1, 1))
        dynamics.start(part)
        count = part.n_atoms
        if transport.rank == 0:
            part.positions = part.positions + torch.tensor([0.0, 0.0, 0.9])
        dynamics.evaluator.forget()
        dynamics.prime(part)
        evaluator = evaluator_of(dynamics)
        whole = domain.gather(part, dynamics)
        return (
            count,
            evaluator.n_repeated,
            evaluator.decomposition.n_rebuilds,
            torch.zeros(0) if whole is None else whole.forces,
        )

    found = run_ranks(2, rank)
    assert [one[0] for one in found] == pytest.approx([32, 32], abs=4)
    assert [one[1:3] for one in found] == [(1, 2), (1, 2)]
    whole = moving_batch([data], [0])
    left = domain_order(data, cell)
    whole.positions = torch.where(left[:, None], whole.positions + torch.tensor([0.0, 0.0, 0.9]), whole.positions)
    NVE(POTENTIAL).start(whole)
    assert float((found[0][3] - whole.forces).abs().max()) < 1e-10 * float(whole.forces.abs().max())


def domain_order(data: AtomicData, cell: np.ndarray) -> torch.Tensor:
    """(n,) bool: atoms that rank 0 of two along the first vector had."""

    def rank(transport: Transport) -> list[int]:
        dynamics = NVE(POTENTIAL)
        part = domain.spread(data, dynamics, transport, grid=(2, 1, 1))
        dynamics.start(part)
        return part.get(ATOM_INDEX).tolist()

    mine = torch.zeros(data.n_atoms, dtype=torch.bool)
    mine[run_ranks(2, rank)[0]] = True
    return mine


def test_what_is_not_finite_or_too_large_is_named() -> None:
    def spoil(change: Any, limit: float = 1e9) -> list[str]:
        def rank(transport: Transport) -> str:
            dynamics = NVE(EagerPotential(small_message_passing()))
            part = domain.spread(crystal(), dynamics, transport, grid=(2, 1, 1), max_force=limit)

            def steps() -> None:
                dynamics.run(part, 1)
                if transport.rank == 1:
                    change(part)
                dynamics.run(part, 2)

            with pytest.raises(InputError) as caught:
                steps()
            return str(caught.value)

        return run_ranks(2, rank)

    def lost(part: Batch) -> None:
        part.velocities = part.velocities + torch.inf

    def close(part: Batch) -> None:
        rows = part.positions.clone()
        rows[0] = rows[1]
        part.positions = rows
        part.velocities = torch.zeros_like(rows)

    found = spoil(lost)
    assert found[0] == found[1]
    assert found[0].startswith("rank 1: position of atom ")
    assert "expected finite numbers" in found[0]
    found = spoil(close)
    assert found[0] == found[1]
    assert "rank 1: step 1: atoms " in found[0]
    assert " coincide (distance " in found[0]
    assert "above the limit of 1e-08 eV/Å" in spoil(lambda part: None, 1e-8)[0]


def test_refusals() -> None:
    serial = SerialTransport()
    with pytest.raises(InputError, match="NVE has no system spread over ranks"):
        evaluator_of(NVE(POTENTIAL))
    two = Batch.from_data_list([AtomicData(np.zeros((1, 3)), [29])] * 2)
    with pytest.raises(InputError, match="ranks share the atoms of one system, 2 were given"):
        domain.spread(two, NVE(POTENTIAL), serial)
    with pytest.raises(InputError, match=r"FusedStage cannot be run over ranks: use one of NVE, "):
        domain.spread(crystal(), NVE(POTENTIAL, n_steps=1) + NVE(POTENTIAL, n_steps=1), serial)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="grid must be three positive whole numbers whose product is the 1 ranks"):
        domain.spread(crystal(), NVE(POTENTIAL), serial, grid=(2, 1, 1))
    with pytest.raises(InputError, match="balance must be one of atoms, time, none, got 'tim', perhaps you meant 'time'"):
        domain.spread(crystal(), NVE(POTENTIAL), serial, balance="tim")


def test_balance_by_time_moves_cuts_towards_the_slow_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(transport: Transport) -> list[int]:
        dynamics = NVE(POTENTIAL)
        part = domain.spread(crystal(), dynamics, transport, grid=(2, 1, 1), balance="time")
        dynamics.start(part)
        counts, evaluator = [part.n_atoms], evaluator_of(dynamics)
        assert isinstance(evaluator, DomainEvaluator)
        for _ in range(3):
            evaluator.decomposition.seconds = part.n_atoms * (3.0 if transport.rank == 0 else 1.0)
            evaluator.domain = None
            evaluator.forget()
            dynamics.prime(part)
            counts.append(part.n_atoms)
        return counts

    slow, fast = run_ranks(2, rank)
    assert slow[0] == pytest.approx(24, abs=4)
    assert slow[-1] < slow[0]
    assert slow[-1] + fast[-1] == 48
