"""One model call for a system that ranks share: exchanges only, until some atom has moved too far for the lists."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.extra_inputs import extra_inputs
from carryall.data.sharing import ATOM_INDEX
from carryall.dynamics.forces import ForceEvaluator
from carryall.dynamics.status import PREVIOUS_ENERGY
from carryall.dynamics.thermo import mobile
from carryall.engines.domain.decomposition import Decomposition, Domain
from carryall.engines.domain.group import RankGroup
from carryall.engines.domain.pairs import Edges
from carryall.engines.rank_part import evaluate_part, part_graph
from carryall.errors import InputError
from carryall.exchange.transport import agree
from carryall.graph.neighbor_graph import COINCIDENT, NeighborGraph
from carryall.graph.neighbor_search import coincident, complete_cell
from carryall.graph.potential import Potential

MARGIN = 1.05
"""Of the displacement foreseen for the next step, before a rebuild is asked for."""
ENERGY, VIRIAL, MOVED, SOON, STOP, BAD, WIDTH = 0, slice(1, 10), 10, 11, 12, 13, 14
"""Places in the one row of numbers that ranks add up after each call."""


class DomainEvaluator(ForceEvaluator):
    """Energy, forces and virial of a system whose atoms are spread over ranks; for the positions of any step.

    Lists and halo are good until an atom has moved by half the skin. Ranks do not ask each other before a call: each foresees
    its own next step, and the sum that brings the energies together also says whether anybody wants new lists for the next
    call, and whether somebody's were too old for this one, which then is repeated. So agreeing costs no message of its own.

    max_force: eV/Å, beyond which the run ends. wish: asked after each call whether to stop; `stopping` is true on all ranks
    after the same call when one of them wanted to. step: the number of the step, for messages.
    """

    def __init__(
        self,
        model: Potential,
        needs: Collection[str],
        owner: str,
        decomposition: Decomposition,
        *,
        max_force: float = float("inf"),
        wish: Callable[[], bool] = lambda: False,
        step: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(model, needs, owner, decomposition.skin)
        self.decomposition, self.max_force, self.wish, self.step = decomposition, max_force, wish, step
        self.domain: Domain | None = None
        self.stopping = False
        self.n_repeated = 0
        """Calls that had to be made twice."""
        self._soon = False
        self._moved: Tensor | None = None
        self._whole: Batch | None = None

    @property
    def group(self) -> RankGroup:
        """The ranks that share the system."""
        return self.decomposition.group

    def is_current(self, batch: Batch) -> bool:
        """Whether energy and forces of the batch belong to its positions and cells: the same answer on every rank."""
        if batch is self._whole:
            return True
        # tensors without rows cannot be told apart by their memory
        if self._current is not None and not batch.n_atoms and batch.positions is not self._current.tensors[0]:
            return False
        return super().is_current(batch)

    def vouch_for(self, whole: Batch | None) -> None:
        """Take a gathered batch as what the parts are: its forces are current."""
        self._whole = whole

    def evaluate(self, batch: Batch, running: Tensor | None) -> dict[int, str]:
        """Write energy, forces, virial and stress into the batch, whose atoms may be others afterwards. Collective.

        InputError on every rank, with rank, step and atom, for what is not finite, atoms that coincide, too large forces.
        """
        if running is not None and not bool(running.any()):
            self._write_missing(batch)
            self.mark_current(batch)
            return {}
        if self.domain is None or self._soon:
            self._rebuild(batch)
        output = self._call(batch)
        if output is None:
            self.n_repeated += 1
            self._rebuild(batch)
            output = self._call(batch)
            assert output is not None
        self._check(output)
        self._write_output(batch, output)
        self.mark_current(batch)
        return {}

    def evaluate_atoms(self, batch: Batch) -> dict[str, Tensor]:
        """All outputs for the positions of the batch, the energies of its atoms too; after `evaluate`, with its lists."""
        assert self.domain is not None
        graph, _ = self._graph(batch, self.domain)
        return evaluate_part(self.model, graph, atomic_virial=True)

    def _rebuild(self, batch: Batch) -> None:
        self.domain = self.decomposition.rebuild(batch)
        self._soon, self._moved = False, None

    def _call(self, batch: Batch) -> dict[str, Tensor] | None:
        """The whole system's energy and virial and this rank's forces; None when some rank's lists were too old."""
        assert self.domain is not None
        box = _box(batch)
        moved, soon = self._motion(self.domain, batch.positions.detach(), box)
        graph, edges = self._graph(batch, self.domain)
        began = time.process_time()
        out = {key: value.detach() for key, value in evaluate_part(self.model, graph).items()}
        self.decomposition.seconds += time.process_time() - began
        problem = self._problem(batch, out, graph, edges)
        flags = torch.tensor([moved, soon, self.wish(), problem is not None], dtype=torch.float64)
        row = torch.cat([out["energy"].cpu(), out["virial"].reshape(9).cpu(), flags])
        total = self.group.total(row)
        self._soon, self.stopping = bool(total[SOON] > 0), self.stopping or bool(total[STOP] > 0)
        if total[MOVED] > 0:
            return None
        if total[BAD] > 0:
            agree(self.group.transport, None if problem is None else f"step {self.step()}: {problem}")
        whole = {"energy": total[:1].to(batch.device), "virial": total[VIRIAL].reshape(1, 3, 3).to(batch.device)}
        return {**out, **whole}

    def _graph(self, batch: Batch, domain: Domain) -> tuple[NeighborGraph, Edges]:
        points = domain.points(batch.positions.detach(), _box(batch))
        edges = domain.pairs.edges(points, self.model.spec.cutoff)
        graph = part_graph(
            points,
            domain.types,
            batch.cell[0].detach(),
            edges.center,
            edges.neighbor,
            edges.ptr,
            domain.exchange,
            batch.pbc[0],
        )
        if not self.model.spec.extra_inputs:
            return graph, edges
        extra: dict[str, Any] = extra_inputs(batch)
        if "aparam" in extra:
            extra["aparam"] = torch.cat([extra["aparam"], domain.exchange.forward(extra["aparam"])])
        return graph.replace(**{name: value for name, value in extra.items() if name in self.model.spec.extra_inputs}), edges

    def _motion(self, domain: Domain, positions: Tensor, box: Tensor) -> tuple[bool, bool]:
        """Whether an atom has moved too far for the lists, and whether one will have after the next step."""
        allowed = domain.allowance(box, self.model.spec.cutoff, self.decomposition.skin)
        moved = domain.displacements(positions, box)
        before, self._moved = self._moved, moved
        ahead = moved if before is None else 2.0 * moved - before
        if not len(moved):
            return allowed < 0.0, False
        now, then = torch.stack([moved.square().sum(1), ahead.square().sum(1)]).amax(1).sqrt().tolist()
        # written such that what is not a number is too far
        return not now <= allowed, not MARGIN * then <= allowed

    def _problem(self, batch: Batch, out: dict[str, Tensor], graph: NeighborGraph, edges: Edges) -> str | None:
        """What makes going on senseless on this rank, in words."""
        if edges.closest < COINCIDENT**2:
            return self._coincidence(graph, edges)
        size = float(out["forces"].square().sum(1).amax()) if batch.n_atoms else 0.0
        if size <= self.max_force**2 and math.isfinite(size + float(out["energy"][0])):
            return None
        for name, key in (("force", "forces"), ("energy", "atomic_energy")):
            bad = (~torch.isfinite(out[key].reshape(batch.n_atoms, -1)).all(1)).nonzero()
            if len(bad):
                row = int(bad[0])
                return f"{name} of atom {int(batch.get(ATOM_INDEX)[row])} is {out[key][row].tolist()}, not finite"
        if not size <= self.max_force**2:
            row = int(out["forces"].square().sum(1).argmax())
            return (
                f"the force on atom {int(batch.get(ATOM_INDEX)[row])} is {size**0.5:.3g} eV/Å, above the limit of "
                f"{self.max_force:g} eV/Å"
            )
        return f"the energy is {float(out['energy'][0])}, not finite"

    def _coincidence(self, graph: NeighborGraph, edges: Edges) -> str:
        assert self.domain is not None
        center = edges.closest_center
        own = edges.neighbor[int(edges.ptr[center]) : int(edges.ptr[center + 1])]
        away = (graph.positions[own] - graph.positions[center]).square().sum(1)
        neighbor = int(own[int(away.argmin())])
        return str(coincident(int(self.domain.ids[center]), int(self.domain.ids[neighbor]), edges.closest**0.5))

    def _write_output(self, batch: Batch, output: dict[str, Tensor]) -> None:
        if PREVIOUS_ENERGY in batch and "energy" in batch:
            batch.set(PREVIOUS_ENERGY, batch.energy.double())
        batch.set("energy", output["energy"], level="system")
        batch.set("virial", output["virial"], level="system")
        batch.set("forces", output["forces"], level="atom")
        free = mobile(batch)
        if free is not None:
            batch.forces = torch.where(free, batch.forces, 0.0)
        self.write_stress(batch)


def _box(batch: Batch) -> Tensor:
    """(3, 3) Å with vectors that open axes lack."""
    cell = batch.cell[0].detach()
    if bool(batch.pbc.all()):
        return cell
    return torch.from_numpy(complete_cell(cell.cpu().numpy(), batch.pbc[0].cpu().numpy())).to(cell.device)


def check_potential(potential: Potential) -> None:
    """InputError for a potential that ranks cannot share."""
    if potential.spec.spin:
        raise InputError("the potential takes spins, whose derivatives are not brought back from ghosts: run without ranks")
