"""What an integrator or optimizer is: two halves of a step, per-system state, a criterion; the loop is in `engine.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, Unpack, cast

import torch
from torch import Tensor

from carryall.data.batch import Batch
from carryall.data.units import fs
from carryall.dynamics.convergence import ConvergenceHook, Criteria
from carryall.dynamics.engine import Engine
from carryall.dynamics.hooks.base import name_of
from carryall.dynamics.status import atom_rows, keep_frozen
from carryall.dynamics.thermo import degrees_of_freedom, kinetic_energy, refresh_fmax
from carryall.errors import nearest
from carryall.graph.potential import Potential

if TYPE_CHECKING:
    from carryall.dynamics.constraints import Constraint
    from carryall.dynamics.fused import FusedStage
    from carryall.dynamics.samplers import SizeAwareSampler
    from carryall.dynamics.sinks import DataSink


class EngineOptions(TypedDict, total=False):
    """What every engine takes."""

    hooks: Iterable[Any]
    """See `Hook`."""
    n_steps: int | None
    """Default of `run`; in flight and in a fused stage, the steps after which a system leaves."""
    skin: float
    """Å, of the neighbour list; default 0.5."""
    exit_status: int
    """From this status on a system is done; default 1."""
    sampler: SizeAwareSampler | None
    """Where systems come from in flight."""
    sinks: Sequence[DataSink]
    """Where finished systems go in flight, the first one with room."""
    refill_frequency: int
    """Steps between looks for finished systems in flight; default 5."""
    init_fn: Callable[[Batch], None] | None
    """Called in flight with each batch of new systems, to give what the sampler does not, such as velocities."""


class DynamicsOptions(EngineOptions, total=False):
    """What every dynamics takes beside its own settings."""

    convergence_hook: ConvergenceHook | Criteria
    """When a system is done."""
    constraints: Sequence[Constraint]
    """What forces, virials and velocities have to obey."""


class BaseDynamics(Engine):
    """pre_update -> compute -> post_update -> convergence, with hooks between.

    A subclass gives `pre_update(batch, mask)` and `post_update(batch, mask)`, which change the systems where `mask`
    (n_systems,) bool is true (None for all) and leave the others bit for bit, and `state_defaults(batch)`: its per-system
    state, kept under keys of the batch, so that it follows systems through selection, removal and reordering.

    A system that has converged is frozen where it converged while the others go on; one without finite energy and forces, or
    without a neighbour graph, is set aside with its reason. A dynamics that has not stepped yet starts its own state afresh,
    and takes over systems that an earlier one has converged; systems that failed stay aside.
    """

    __needs_keys__: ClassVar[frozenset[str]] = frozenset({"energy", "forces"})
    """Outputs that the model must have."""
    __provides_keys__: ClassVar[frozenset[str]] = frozenset({"positions"})
    """Keys that a step changes."""
    prefix: str = "dynamics"
    """Before the names of the state's keys."""
    removed_degrees: int = 0
    """Degrees of freedom that the dynamics does not heat: 3 where the centre of mass keeps its velocity."""
    has_time: bool = False
    """Whether the state's `dt` is physical time."""
    atom_state: ClassVar[frozenset[str]] = frozenset()
    """Names in the state that have one row per atom."""

    def __init__(self, model: Potential, **options: Unpack[DynamicsOptions]) -> None:
        """model: any `Potential`."""
        for name in options:
            if name not in DynamicsOptions.__annotations__:
                hint = nearest(name, DynamicsOptions.__annotations__)
                raise TypeError(f"{type(self).__name__} has no argument {name!r}{hint}")
        criteria = options.get("convergence_hook")
        if criteria is not None and not isinstance(criteria, ConvergenceHook):
            criteria = ConvergenceHook(criteria)
        self.convergence_hook: ConvergenceHook | None = criteria
        self.constraints = tuple(options.get("constraints", ()))
        self._bookkeeping: dict[str, Callable[[Batch], Tensor]] = {}
        # n_steps decides whether a hook can wait for ON_CONVERGE
        self.n_steps = options.get("n_steps")
        own = DynamicsOptions.__annotations__.keys() - EngineOptions.__annotations__.keys()
        rest = {name: value for name, value in options.items() if name not in own}
        super().__init__(model, self.__needs_keys__, **cast(EngineOptions, rest))

    # -- what a subclass gives

    def pre_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """First half of a step, before the forces are evaluated."""

    def post_update(self, batch: Batch, mask: Tensor | None = None) -> None:
        """Second half of a step, after the forces are evaluated."""

    def state_defaults(self, batch: Batch) -> dict[str, Tensor]:
        """State that a system starts with, by name: one row per system, or per atom for names in `atom_state`."""
        return {}

    def prepare(self, batch: Batch) -> None:
        """Add keys that the batch lacks."""
        for key, init_fn in self._bookkeeping.items():
            if key not in batch:
                batch.set(key, init_fn(batch), level="system")

    def unfit(self, batch: Batch) -> dict[int, str]:
        """Systems that this dynamics cannot work on, with the reason."""
        return {}

    def unfit_systems(self, batch: Batch) -> dict[int, str]:
        """Systems that this dynamics or one of its constraints cannot work on, with the reason."""
        found: dict[int, str] = {}
        for one in (*self.constraints, self):
            if hasattr(one, "unfit"):
                found |= one.unfit(batch)
        return found

    def after_forces(self, batch: Batch, mask: Tensor | None) -> None:
        """Called with the systems (None: all) whose forces were evaluated, constraints applied, before hooks see them."""
        refresh_fmax(batch, mask)

    def conserved_energy(self, batch: Batch) -> Tensor:
        """(n_systems,) eV, what the exact dynamics conserves: kinetic and potential energy unless it says otherwise."""
        return batch.energy.double() + kinetic_energy(batch) if "velocities" in batch else batch.energy.double()

    # -- the one part of its own engine

    @property
    def parts(self) -> tuple[BaseDynamics, ...]:
        """Itself."""
        return (self,)

    def part_masks(self, status: Tensor) -> list[Tensor]:
        """All systems that are not done."""
        return [status < self.exit_status]

    @property
    def needs_previous_energy(self) -> bool:
        """Whether a criterion compares with the evaluation before."""
        return self.convergence_hook is not None and self.convergence_hook.needs_previous_energy

    def __add__(self, other: BaseDynamics | FusedStage) -> FusedStage:
        """`a + b`: both on one batch with one model call a step; see `FusedStage`."""
        from carryall.dynamics.fused import fuse

        return fuse(self, other)

    # -- state

    def register_bookkeeping_key(self, key: str, init_fn: Callable[[Batch], Tensor]) -> None:
        """A system-level key that every batch of this dynamics gets: `init_fn(batch)` gives its first values."""
        self._bookkeeping[key] = init_fn
        self._batch = None

    def init_state(self, batch: Batch, fresh: bool) -> None:
        """Set the state's keys: all of them when `fresh`, else those that the batch lacks."""
        for name, value in self._all_defaults(batch).items():
            if fresh or self.key(name) not in batch:
                batch.set(self.key(name), value, level="atom" if name in self.atom_state else "system")

    def enter(self, batch: Batch, mask: Tensor) -> None:
        """Give systems (n_systems,) bool that come from another part the state of a start."""
        for name, value in self._all_defaults(batch).items():
            rows = atom_rows(mask, batch) if name in self.atom_state else mask
            batch.set(self.key(name), keep_frozen(rows, value, batch.get(self.key(name))))

    def _all_defaults(self, batch: Batch) -> dict[str, Tensor]:
        counter = torch.zeros(batch.n_systems, dtype=torch.int64, device=batch.device)
        return {"steps": counter, **self.state_defaults(batch)}

    def key(self, name: str) -> str:
        """Key of the batch that holds a part of the state, such as `fire_dt`."""
        return f"{self.prefix}_{name}"

    def steps(self, batch: Batch) -> Tensor:
        """(n_systems,) int64 steps that each system has taken in this dynamics."""
        return batch.get(self.key("steps"))

    def count(self, batch: Batch, mask: Tensor | None) -> None:
        """One step more for the systems of the mask."""
        key = self.key("steps")
        batch.set(key, batch.get(key) + (1 if mask is None else mask))

    def time(self, batch: Batch) -> Tensor:
        """(n_systems,) fs that each system has moved in this dynamics; NaN where steps are not time."""
        steps = self.steps(batch).double()
        return steps * batch.get(self.key("dt")) / fs if self.has_time else torch.full_like(steps, torch.nan)

    # -- constraints

    def finish_forces(self, batch: Batch, mask: Tensor | None) -> None:
        """Hooks that change forces, then the constraints, on forces and virial of the systems that were evaluated."""
        self.hooks.on_forces(batch, self, mask)
        if self.constraints:
            forces, virial = batch.forces, batch.virial if "virial" in batch else None
            for constraint in self.constraints:
                forces = constraint.forces(batch, forces)
                virial = None if virial is None else constraint.virial(batch, virial)
            batch.forces = keep_frozen(None if mask is None else atom_rows(mask, batch), forces, batch.forces)
            if virial is not None:
                batch.virial = keep_frozen(mask, virial, batch.virial)
                self.host.evaluator.write_stress(batch)
        self.after_forces(batch, mask)

    def constrained(self, batch: Batch, velocities: Tensor) -> Tensor:
        """(n_atoms, 3) velocities that obey the constraints."""
        for constraint in self.constraints:
            velocities = constraint.velocities(batch, velocities)
        return velocities

    def degrees_of_freedom(self, batch: Batch) -> Tensor:
        """(n_systems,) float64: 3 N less fixed atoms, what is not heated, and what constraints take; at least 1."""
        return degrees_of_freedom(batch, self.removed_degrees, self.constraints)

    # -- words

    def __repr__(self) -> str:
        facts = [type(self.model).__name__, f"step_count={self.step_count}"]
        facts += [f"n_steps={self.n_steps}"] if self.n_steps is not None else []
        facts += [f"{name}={value}" for name, value in self.describe().items()]
        facts += [repr(self.convergence_hook)] if self.convergence_hook is not None else []
        facts += [f"hooks=[{', '.join(name_of(hook) for hook in self.hooks)}]"] if len(self.hooks) else []
        return f"{type(self).__name__}({', '.join(facts)})"
