"""Is a potential right on several ranks? A structure split over threads of this process against the same structure whole.

For whoever writes a model that passes messages: nothing but torch is needed, and what goes wrong is told as it would show on
a cluster (a hang, a wrong number), in seconds and by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from carryall.data.atomic_data import AtomicData
from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, plan_from_ids, sum_to_owners
from carryall.exchange.threads import ThreadTransport, run_ranks
from carryall.graph.neighbor_graph import NeighborGraph, pointer
from carryall.graph.neighbor_search import graph_from_structures
from carryall.graph.potential import Potential

COMPARED = ("energy", "atomic_energy", "forces", "virial", "atomic_virial")
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
STEP = 1e-3  # Å, of the difference quotient that forces are compared with
SLOPE_TOLERANCE = 1e-5
"""eV/Å: what a difference quotient of this step is worth for energies that are twice differentiable."""


@dataclass(frozen=True)
class Share:
    """One rank's part of a graph; ids are rows of the whole."""

    graph: NeighborGraph
    local_ids: Tensor
    """(n_local,) int64."""
    ghost_ids: Tensor
    """(n_ghost,) int64."""

    def on(self, transport: Transport, exchange: type[Exchange] = Exchange) -> NeighborGraph:
        """The graph with its exchange; collective."""
        plan = plan_from_ids(self.local_ids, self.ghost_ids, transport)
        return self.graph.replace(exchange=exchange(plan, transport))


def split_graph(graph: NeighborGraph, rank_of: Sequence[int], rank: int, spare: Sequence[int] = ()) -> Share:
    """The part of `rank`, which owns the atoms where `rank_of` (n_atoms,) says so, in descending order.

    Neighbours that it does not own, and images, become ghosts. `spare` atoms are ghosts that no edge needs.
    """
    device = graph.device
    mine = (torch.tensor(rank_of, device=device) == rank).nonzero().squeeze(1).flip(0)
    place = torch.full((graph.n_atoms,), -1, device=device)
    place[mine] = torch.arange(len(mine), device=device)
    keep = (place[graph.edge_center] >= 0).nonzero().squeeze(1)
    keep = keep[place[graph.edge_center[keep]].argsort(stable=True)]
    center, shift, atom = place[graph.edge_center[keep]], graph.edge_shift[keep].long(), graph.edge_neighbor[keep]
    away = shift.any(1) | (place[atom] < 0)
    # moved by nothing, since a lattice vector may be missing
    extra = torch.tensor([[atom, 0, 0, 0] for atom in spare], dtype=torch.int64, device=device).reshape(-1, 4)
    images = torch.cat([torch.cat([atom[:, None], shift], 1)[away], extra])
    ghosts, which = torch.unique(images, dim=0, return_inverse=True)
    neighbor = place[atom]
    neighbor[away] = len(mine) + which[: int(away.sum())]
    source = torch.cat([mine, ghosts[:, 0]])
    offset = torch.einsum("gi,gij->gj", ghosts[:, 1:].to(graph.positions), graph.cell[graph.system[ghosts[:, 0]]])
    of_atoms = {name: getattr(graph, name) for name in ("aparam", "spin")}
    part = graph.replace(
        positions=graph.positions[source] + torch.cat([offset.new_zeros(len(mine), 3), offset]),
        atom_types=graph.atom_types[source],
        system=graph.system[source],
        edge_center=center,
        edge_neighbor=neighbor,
        edge_shift=torch.zeros_like(graph.edge_shift[keep]),
        edge_mask=graph.edge_mask[keep],
        ptr=pointer(center, len(mine)),
        local=None,
        rank=None,
        ghost_owner=None,
        **{name: None if value is None else value[source] for name, value in of_atoms.items()},
    )
    return Share(part, mine.cpu(), ghosts[:, 0].contiguous().cpu())


class RecordedExchange(Exchange):
    """Notes what is exchanged: the op, the dtype and the trailing shape."""

    def __init__(self, plan: Any, transport: Any) -> None:
        super().__init__(plan, transport)
        self.calls: list[str] = []

    def forward(self, rows: Tensor) -> Tensor:
        """As `Exchange.forward`."""
        self.calls.append(f"forward {rows.dtype} {list(rows.shape[1:])}")
        return super().forward(rows)

    def reverse(self, rows: Tensor) -> Tensor:
        """As `Exchange.reverse`."""
        self.calls.append(f"reverse {rows.dtype} {list(rows.shape[1:])}")
        return super().reverse(rows)

    def all_reduce(self, values: Tensor) -> Tensor:
        """As `Exchange.all_reduce`."""
        self.calls.append(f"all_reduce {values.dtype} {list(values.shape)}")
        return super().all_reduce(values)


@dataclass(frozen=True)
class ParallelCase:
    """One way to spread the atoms, and how far results are from those of the whole structure."""

    name: str
    owned: tuple[int, ...]
    """Atoms of each rank."""
    ghosts: tuple[int, ...]
    deviations: dict[str, float]
    """Largest difference of each property, relative to its largest value where that is above 1 (eV, Å); or nothing."""
    exchanges: tuple[str, ...] = ()
    """What the first rank exchanged during the call, in order."""
    n_messages: int = 0
    """Sent during the call and the sum of forces, by all ranks."""
    n_bytes: int = 0
    problem: str | None = None

    def ok(self, tolerance: float) -> bool:
        """Whether nothing went wrong and nothing deviates by more."""
        return self.problem is None and all(value <= tolerance for value in self.deviations.values())


@dataclass(frozen=True)
class ParallelReport:
    """What `check_parallel` found; prints as a table."""

    cases: tuple[ParallelCase, ...]
    tolerance: float
    slope_error: float | None
    """|dE/dx + force| along one direction, of the whole structure, relative as deviations are; None in float32."""

    @property
    def ok(self) -> bool:
        """Whether every spread gives what the whole structure gives, and forces are the energy's slope."""
        return all(case.ok(self.tolerance) for case in self.cases) and (self.slope_error or 0.0) <= SLOPE_TOLERANCE

    def __str__(self) -> str:
        shown = ("energy", "forces", "virial")
        heads = ["spread", "atoms / ghosts of ranks", "exchanges", "messages", "kB", *shown, ""]
        rows = [heads]
        for case in self.cases:
            sizes = " ".join(f"{a}/{b}" for a, b in zip(case.owned, case.ghosts, strict=True))
            numbers = [f"{case.deviations[name]:.1e}" if case.deviations else "-" for name in shown]
            sent = [str(len(case.exchanges)), str(case.n_messages), f"{case.n_bytes / 1000:.1f}"]
            rows.append([case.name, sizes, *sent, *numbers, "ok" if case.ok(self.tolerance) else "WRONG"])
        widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{case.name}: {case.problem}" for case in self.cases if case.problem]
        if self.slope_error is not None and self.slope_error > SLOPE_TOLERANCE:
            lines.append(
                f"forces are not the energy's slope (off by {self.slope_error:.1e}): positions have to enter through the edge "
                "vectors that the model is given, and nothing of the energy may be detached"
            )
        lines.append(f"{'all equal' if self.ok else 'NOT EQUAL'} to the whole structure; tolerance {self.tolerance:.0e}")
        return "\n".join(lines)


def check_parallel(
    potential: Potential | Sequence[Potential],
    structure: Any,
    n_ranks: Sequence[int] = (1, 2, 3, 4),
    tolerance: float | None = None,
) -> ParallelReport:
    """Whether a potential gives on several ranks what it gives on one: a report, `.ok` and a table.

    `structure` (AtomicData or ase.Atoms) is spread over each number of ranks in slabs, at random, and with a first rank that
    has only ghosts; ranks are threads. A compiled file serves one call at a time: give as many, loaded one by one, as the
    largest number of ranks. The default tolerance is 1e-10 (float64) or 1e-4. What goes wrong on a rank is in the report;
    InputError for what is no Potential.
    """
    potentials = list(potential) if isinstance(potential, Sequence) else [potential] * max(n_ranks)
    if isinstance(potentials[0], nn.Module):
        raise InputError("check_parallel takes a Potential, this is a model: give carryall.models.EagerPotential(model)")
    if len(potentials) < max(n_ranks):
        raise InputError(f"{len(potentials)} potentials for {max(n_ranks)} ranks: give one for each")
    spec = potentials[0].spec
    data = structure if isinstance(structure, AtomicData) else AtomicData.from_ase(structure)
    graph = graph_from_structures([data], spec.cutoff, spec.type_map)
    whole = potentials[0](graph, atomic_virial=True)
    cases = []
    for size in n_ranks:
        for name, rank_of in _spreads(graph, size).items():
            spare = range(min(graph.n_atoms, 3)) if "no atoms" in name else ()
            shares = [split_graph(graph, rank_of, rank, spare if rank == 0 else ()) for rank in range(size)]
            cases.append(_case(f"{size}, {name}", potentials, shares, whole))
    slope = _slope_error(potentials[0], graph, whole) if spec.dtype == "float64" else None
    return ParallelReport(tuple(cases), TOLERANCES[spec.dtype] if tolerance is None else tolerance, slope)


def _spreads(graph: NeighborGraph, size: int) -> dict[str, list[int]]:
    """Who owns which atom, by the name of the spread."""
    n = graph.n_atoms
    order = graph.positions[:, 0].argsort(stable=True).argsort()

    def slabs(ranks: int) -> Tensor:
        return order * ranks // max(n, 1)

    if size == 1:
        return {"all": [0] * n}
    generator = torch.Generator().manual_seed(size)
    return {
        "slabs": slabs(size).tolist(),
        "at random": torch.randint(size, (n,), generator=generator).tolist(),
        "first has no atoms": (1 + slabs(size - 1)).tolist(),
    }


@dataclass(frozen=True)
class _Part:
    out: dict[str, Tensor]
    calls: tuple[str, ...]
    messages: list[tuple[int, int]]


def _case(name: str, potentials: list[Potential], shares: list[Share], whole: dict[str, Tensor]) -> ParallelCase:
    owned = tuple(share.graph.n_local for share in shares)
    ghosts = tuple(len(share.ghost_ids) for share in shares)

    def rank(transport: ThreadTransport) -> _Part:
        graph = shares[transport.rank].on(transport, RecordedExchange)
        transport.messages.clear()
        out = dict(potentials[transport.rank](graph, atomic_virial=True))
        calls = tuple(graph.exchange.calls)
        for key in ("forces", "atomic_virial"):
            out[key] = sum_to_owners(out[key], graph)
        return _Part(out, calls, transport.messages)

    try:
        parts = run_ranks(len(shares), rank)
    except Exception as error:
        return ParallelCase(name, owned, ghosts, {}, problem=f"{type(error).__name__}: {error}")
    sizes = [size for part in parts for _, size in part.messages]
    problem, deviations = _other_calls([part.calls for part in parts]), {}
    try:
        deviations = _deviations(shares, [part.out for part in parts], whole)
    except RuntimeError as error:
        problem = f"results have other shapes: {error}"
    return ParallelCase(name, owned, ghosts, deviations, parts[0].calls, len(sizes), sum(sizes), problem)


def _deviations(shares: list[Share], parts: list[dict[str, Tensor]], whole: dict[str, Tensor]) -> dict[str, float]:
    out = {}
    for key in COMPARED:
        expected = whole[key]
        if key in ("energy", "virial"):
            found = sum((part[key] for part in parts[1:]), parts[0][key])
        else:
            found = torch.full_like(expected, torch.nan)
            for share, part in zip(shares, parts, strict=True):
                found[share.local_ids] = part[key]
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        difference = float((found - expected).abs().max()) / scale if expected.numel() else 0.0
        out[key] = difference if difference == difference else float("inf")
    return out


def _other_calls(calls: list[tuple[str, ...]]) -> str | None:
    """What two ranks do differently, if anything: it only happened to come through."""
    for rank, mine in enumerate(calls[1:], 1):
        if mine != calls[0]:
            at = next((k for k, pair in enumerate(zip(calls[0], mine, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(calls[0]), len(mine)) if at is None else at
            first, other = (list_[at] if at < len(list_) else "nothing" for list_ in (calls[0], mine))
            return f"exchange {at + 1} is {first} on rank 0 but {other} on rank {rank}: all ranks have to make the same"
    return None


def _slope_error(potential: Potential, graph: NeighborGraph, whole: dict[str, Tensor]) -> float:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(graph.positions.shape, generator=generator, dtype=torch.float64).to(graph.positions)
    direction /= direction.norm()
    energies = [
        float(potential(graph.replace(positions=graph.positions + k * STEP * direction))["energy"].sum())
        for k in (-2, -1, 1, 2)
    ]
    slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * STEP)
    return abs(slope + float((whole["forces"] * direction).sum())) / max(1.0, float(whole["forces"].abs().max()))
