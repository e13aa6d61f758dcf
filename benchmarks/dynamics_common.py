"""What the engines of benchmarks/dynamics.py share: the structures, the clock and how they are asked. Needs numpy alone.

An engine is a script that reads requests, one JSON object a line, from standard input, and answers each with one line:

    {"do": "time", "path": "case.npz", "kind": "nve", "option": {"skin": 1.0}, "steps": 100, "budget": 5.0}

Every simulation is made anew from the file, so that every engine and every repeat does the same steps.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

EPSILON, SIGMA, CUTOFF = 0.0104, 3.4, 8.5  # eV, Å, Å; argon, cut off without shift
MASS = 39.948  # amu
LATTICE = 5.26  # Å
KELVIN = 8.617330337217213e-05  # eV
TIMESTEP = 2.0  # fs
TEMPERATURE = 40.0  # K
FMAX = 1e-3  # eV/Å
MOST_STEPS = 1500  # of a relaxation
ATOMS_IN_FLIGHT = 3000
WARM_UP = 8
REFILL = 5  # steps between looks for finished relaxations
SMALL_CRYSTALS = ((2, 2, 2), (2, 2, 3), (2, 2, 4))  # 32, 48, 64 atoms
Array = np.ndarray[Any, np.dtype[Any]]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Structures:
    """Periodic argon: `ptr` (n + 1,) says where structures begin in positions and velocities; cell (n, 3, 3), rows are vectors.

    Å, and Å sqrt(eV / amu) for velocities, as in ASE.
    """

    positions: Array
    velocities: Array
    cell: Array
    ptr: Array

    def __len__(self) -> int:
        return len(self.cell)

    @classmethod
    def joined(cls, parts: Sequence[Structures]) -> Structures:
        """One after the other."""
        sizes = np.concatenate([np.diff(part.ptr) for part in parts])
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("positions", "velocities", "cell")
        }
        return cls(**columns, ptr=np.concatenate([[0], np.cumsum(sizes)]))

    @classmethod
    def read(cls, path: str | Path) -> Structures:
        """What `write` wrote."""
        with np.load(path) as stored:
            return cls(*(stored[name] for name in ("positions", "velocities", "cell", "ptr")))

    def write(self, path: str | Path) -> None:
        """An .npz file."""
        np.savez(path, **vars(self))

    def one(self, index: int) -> Structures:
        """A structure alone."""
        rows = slice(self.ptr[index], self.ptr[index + 1])
        cell = self.cell[index : index + 1]
        return Structures(self.positions[rows], self.velocities[rows], cell, np.array([0, len(self.positions[rows])]))


def crystal(
    repeat: tuple[int, int, int], seed: int, rattle: float = 0.1, strain: float = 0.0, vacancies: int = 0, kelvin: float = 0.0
) -> Structures:
    """fcc argon with every atom displaced by `rattle` Å in each direction, and thermal velocities without drift."""
    rng = np.random.default_rng(seed)
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    places = np.stack(np.meshgrid(*(np.arange(n) for n in repeat), indexing="ij"), -1).reshape(-1, 1, 3)
    positions = (places + basis).reshape(-1, 3) * LATTICE * (1 + strain)
    positions = positions + rng.normal(0, rattle, positions.shape)
    velocities = rng.normal(size=positions.shape) * np.sqrt(KELVIN * kelvin / MASS)
    velocities -= velocities.mean(0)
    keep = np.setdiff1d(np.arange(len(positions)), rng.choice(len(positions), vacancies, replace=False))
    cell = np.diag(repeat)[None] * LATTICE * (1 + strain)
    return Structures(positions[keep], velocities[keep], cell, np.array([0, len(keep)]))


def boxes(n: int) -> Structures:
    """Boxes of 32, 48 and 64 atoms in turn, at the temperature of the runs."""
    return Structures.joined([crystal(SMALL_CRYSTALS[i % 3], seed=i, kelvin=TEMPERATURE) for i in range(n)])


def varied(n: int) -> Structures:
    """Structures to relax: 8 to 64 atoms, little and much displaced, strained, some with vacancies."""
    rng = np.random.default_rng(42)
    repeats = ((1, 1, 2), (1, 2, 2), (1, 2, 3), *SMALL_CRYSTALS)
    made = []
    for seed in range(n):
        repeat = repeats[rng.integers(len(repeats))]
        rattle, strain = rng.uniform(0.1, 0.35), rng.uniform(-0.02, 0.04)
        vacancies = int(rng.integers(0, max(1, 4 * int(np.prod(repeat)) // 8)))
        made.append(crystal(repeat, seed, rattle, strain, vacancies))
    return Structures.joined(made)


@dataclass(frozen=True)
class Simulation:
    """A simulation that is ready to step; its forces are evaluated."""

    run: Callable[[int], Any]
    """Takes a number of steps."""
    energies: Callable[[], Sequence[float]]
    """Potential energies, eV, of `systems`."""
    systems: Sequence[int] | None = None
    """Structures that it simulates; None for all."""
    part: float = 1.0
    """Part of all atoms that it simulates."""
    close: Callable[[], Any] = lambda: None


@dataclass
class Relaxed:
    """Relaxed structures: lists by structure, None for those that are not there."""

    positions: list[Any]
    energies: list[float]
    batch_steps: int | None = None
    """Steps times systems in the batch, finished ones that wait included."""
    own_steps: int | None = None
    """Steps that systems took."""
    part: float = 1.0
    note: str = ""

    @classmethod
    def empty(cls, n: int) -> Relaxed:
        """Nothing finished yet."""
        return cls([None] * n, [float("nan")] * n)


@dataclass
class Clock:
    """CPU seconds and wall seconds of this process."""

    cpu: float = field(default_factory=time.process_time)
    wall: float = field(default_factory=time.perf_counter)

    def passed(self) -> tuple[float, float]:
        """Since the clock was made."""
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


Methods = Iterable[tuple[type, str]]
"""Classes and the names of their methods."""


class CallClock:
    """CPU seconds inside the named methods; a method that calls another of them is counted once."""

    def __init__(self, methods: Methods) -> None:
        self.seconds, self._depth = 0.0, 0
        self._methods = [(owner, name, vars(owner).get(name, self), getattr(owner, name)) for owner, name in methods]

    def __enter__(self) -> CallClock:
        for owner, name, _, method in self._methods:
            setattr(owner, name, self._timed(method))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, own, _ in self._methods:
            delattr(owner, name) if own is self else setattr(owner, name, own)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._depth:
                return method(*arguments, **options)
            self._depth += 1
            began = time.process_time()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.process_time() - began
                self._depth -= 1

        return call


class NotHereError(Exception):
    """An engine has no algorithm of this kind."""


Start = Callable[[Structures, str, Answer], Simulation]
Relax = Callable[[Structures, Answer], Relaxed]


def steps_of(simulation: Simulation, steps: int, budget: float) -> Answer:
    """CPU and wall seconds a step of the whole batch. The first step, with what it compiles, is not counted.

    `steps` are fewer when they would take longer than `budget` CPU seconds, by the second step.
    """
    simulation.run(1)
    clock = Clock()
    simulation.run(1)
    once = max(clock.passed()[0], 1e-6)
    n = max(2, min(steps, int(budget / once)))
    clock = Clock()
    simulation.run(n)
    cpu, wall = clock.passed()
    return {"seconds": cpu / n / simulation.part, "wall": wall / n / simulation.part, "steps": n}


def inside_of(make: Callable[[], Simulation], methods: Methods, steps: int) -> Answer:
    """CPU seconds a step, and those of them inside the methods."""
    with CallClock(methods) as inside:  # from before the simulation is made: it may keep a method
        simulation = make()
        simulation.run(2)
        inside.seconds = 0.0
        clock = Clock()
        simulation.run(steps)
        cpu, _ = clock.passed()
    return {"seconds": cpu / steps, "inside": inside.seconds / steps}


def relaxed_of(relax: Relax, structures: Structures, option: Answer, out: str) -> Answer:
    """Time and counts of a relaxation of all, after a few for what is compiled; the structures go into the file `out`."""
    relax(Structures.joined([structures.one(index) for index in range(min(WARM_UP, len(structures)))]), option)
    clock = Clock()
    found = relax(structures, option)
    cpu, wall = clock.passed()
    there = [index for index, positions in enumerate(found.positions) if positions is not None]
    rows = np.concatenate([np.reshape(found.positions[index], (-1, 3)) for index in there]) if there else np.zeros((0, 3))
    np.savez(out, index=there, positions=rows, energies=np.array([found.energies[index] for index in there]))
    facts = {"batch_steps": found.batch_steps, "own_steps": found.own_steps, "part": found.part, "note": found.note}
    return {"cpu": cpu / found.part, "wall": wall / found.part, "returned": len(there), **facts}


def serve(
    start: Start,
    versions: Callable[[], dict[str, str]],
    relax: Relax | None = None,
    model: Methods = (),
    **more: Callable[..., Answer],
) -> None:
    """Answer the requests on standard input until it ends. What libraries print goes to standard error.

    model: the methods that evaluate the potential.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(do: str, path: str = "", kind: str = "nve", option: Answer | None = None, **rest: Any) -> Answer:
        if do == "versions":
            return {"python": platform.python_version(), **versions()}
        structures, option = Structures.read(path), option or {}
        if do == "relax" and relax is not None:
            return relaxed_of(relax, structures, option, **rest)
        if do in more:
            return more[do](structures, **rest)
        if do == "inside":
            return inside_of(lambda: start(structures, kind, option), model, **rest)
        simulation = start(structures, kind, option)
        try:
            if do == "time":
                return steps_of(simulation, **rest)
            if do == "energies":
                simulation.run(rest["steps"])
                systems = simulation.systems if simulation.systems is not None else range(len(structures))
                return {"systems": list(systems), "energies": [float(energy) for energy in simulation.energies()]}
        finally:
            simulation.close()
        raise ValueError(f"this engine cannot {do!r}")

    for line in sys.stdin:
        try:
            found = answer(**json.loads(line))
        except Exception as error:  # one engine that fails at one case leaves the others and the other cases
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(found), file=answers, flush=True)
