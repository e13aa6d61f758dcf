"""A system spread over ranks, for the dynamics of `carryall.dynamics`: at the start, and whole again for files."""

from __future__ import annotations

from collections.abc import Callable

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.data.sharing import share
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.constraints import FixAtoms, FixCenterOfMass
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.optimizers.cell_filters import CellFilter
from carryall.engines.domain.bricks import Grid
from carryall.engines.domain.decomposition import Decomposition
from carryall.engines.domain.evaluator import DomainEvaluator, check_potential
from carryall.engines.domain.group import RankGroup
from carryall.engines.domain.migration import gathered, part_of
from carryall.errors import InputError
from carryall.exchange import Transport

SUPPORTED = (
    "NVE",
    "NVTLangevin",
    "NVTNoseHoover",
    "NVTVelocityRescaling",
    "NPH",
    "NPT",
    "NPTStochasticCellRescaling",
    "FIRE",
)
"""Dynamics whose sums over atoms go over ranks."""


def spread(
    structure: AtomicData | Batch,
    dynamics: BaseDynamics,
    transport: Transport,
    *,
    grid: Grid | None = None,
    balance: str = "atoms",
    max_force: float = float("inf"),
    wish: Callable[[], bool] = lambda: False,
) -> Batch:
    """This rank's part of one system, which `dynamics.run(part, n_steps)` moves, on all ranks together. Collective.

    Every rank gives the same structure, or batch of one system, and makes the same dynamics; skin and cutoff are the dynamics'.
    Between steps the part holds other atoms: their `atom_index` names them. Hooks see the part; sums over the system's atoms
    (kinetic energy, temperature, pressure, largest force) go over all ranks, so that a hook which takes them has to run on all.

    grid, balance: see `Decomposition`. max_force: eV/Å, beyond which the run ends with an InputError on every rank, as it does
    for what is not finite. wish: see `DomainEvaluator`. InputError names a dynamics, constraint or potential that ranks cannot
    share.
    """
    _check_dynamics(dynamics)
    check_potential(dynamics.model)
    whole = moving_batch([structure], [0]) if isinstance(structure, AtomicData) else structure
    if whole.n_atoms == 0:
        raise InputError("the structure has no atoms")
    for constraint in dynamics.constraints:
        if isinstance(constraint, FixAtoms):
            # written into the key move_mask here, since the part's atoms have other places
            constraint.check(whole)
    dynamics.constraints = tuple(one for one in dynamics.constraints if not isinstance(one, FixAtoms))
    part = part_of(whole, transport)
    group = RankGroup(transport, whole.n_atoms)
    share(part, group)
    spec = dynamics.model.spec
    decomposition = Decomposition(group, spec.cutoff, dynamics.skin, spec.type_map, grid, balance)
    needs = type(dynamics).__needs_keys__
    dynamics.evaluator = DomainEvaluator(
        dynamics.model,
        needs,
        type(dynamics).__name__,
        decomposition,
        max_force=max_force,
        wish=wish,
        step=lambda: dynamics.step_count,
    )
    return part


def gather(part: Batch, dynamics: BaseDynamics) -> Batch | None:
    """The whole system, atoms in their first order, on rank 0; None on the others. Collective."""
    evaluator = evaluator_of(dynamics)
    return gathered(part, evaluator.group.n_atoms, evaluator.group.transport)


def evaluator_of(dynamics: BaseDynamics) -> DomainEvaluator:
    """The evaluator that `spread` gave a dynamics."""
    if not isinstance(dynamics.evaluator, DomainEvaluator):
        raise InputError(
            f"{type(dynamics).__name__} has no system spread over ranks: call carryall.engines.domain.spread first"
        )
    return dynamics.evaluator


def _check_dynamics(dynamics: BaseDynamics) -> None:
    name = type(dynamics).__name__
    if name not in SUPPORTED:
        raise InputError(f"{name} cannot be run over ranks: use one of {', '.join(SUPPORTED)}, or run without ranks")
    if isinstance(getattr(dynamics, "cell", None), CellFilter):
        raise InputError(f"{name} with a cell filter cannot be run over ranks: keep the cell fixed, or run without ranks")
    if dynamics.inflight_mode:
        raise InputError(f"{name} has a sampler: ranks share one system, which stays")
    if dynamics.hooks.shape_forces:
        raise InputError(f"{name} has a hook that changes forces, which knows atoms by their place: run without ranks")
    for constraint in dynamics.constraints:
        if not isinstance(constraint, (FixAtoms, FixCenterOfMass)):
            raise InputError(
                f"{type(constraint).__name__} cannot be kept over ranks: FixAtoms and FixCenterOfMass can; run without ranks"
            )
