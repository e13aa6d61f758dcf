"""Potentials and structures that a verb is given, and the ones that come with the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.data import AtomicData
    from carryall.dynamics.structures import Sourced
    from carryall.graph import Potential

UNREADABLE = (InputError, OSError, UnicodeDecodeError, EOFError)
ARGON_LATTICE, COPPER_LATTICE = 5.26, 3.61  # Å, fcc, near 0 K


def notify(message: str) -> None:
    """One line beside the results."""
    print(f"carryall: {message}", file=sys.stderr)


def load_potential(model: str, device: str = "cpu", rebuild: bool = False) -> Potential:
    """A file or a built-in name; what takes long, or runs otherwise than asked, is said."""
    from carryall.package.open import load

    return load(model, device, rebuild=rebuild, notify=notify)


def read_files(paths: Sequence[Path]) -> list[AtomicData]:
    """Structures of all files, checked; errors name the file."""
    from carryall.data import check_structures, read_structures

    found: list[AtomicData] = []
    for path in paths:
        structures = read_structures(path)
        try:
            check_structures(structures)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        found += structures
    return found


@dataclass(frozen=True)
class FrameStream:
    """Every frame of every file, read when it is asked for; what cannot be read comes with the reason."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[Sourced]:
        for path in self.paths:
            yield from _frames_of(path)

    def __len__(self) -> int:
        """How many, by a look at the lines; a file of another format than extended XYZ counts as one."""
        return sum(map(_count, self.paths))


def _frames_of(path: Path) -> Iterator[Sourced]:
    from carryall.data.extxyz import iter_frames, parse_frame
    from carryall.data.labels import LabelKeys
    from carryall.data.readers import is_extxyz, read_structures
    from carryall.dynamics.structures import Sourced

    try:
        if not (path.is_file() and is_extxyz(path)):
            for number, data in enumerate(read_structures(path)):
                yield Sourced(data, str(path), number)
            return
        for frame in iter_frames(path):
            try:
                yield Sourced(parse_frame(frame, path, LabelKeys()), str(path), frame.number)
            except InputError as error:
                yield Sourced(None, str(path), frame.number, _one_line(error, path))
    except UNREADABLE as error:
        yield Sourced(None, str(path), None, _one_line(error, path))


def _count(path: Path) -> int:
    from carryall.data.extxyz import iter_frames
    from carryall.data.readers import is_extxyz

    try:
        return sum(1 for _ in iter_frames(path)) if path.is_file() and is_extxyz(path) else 1
    except UNREADABLE:
        return 1


def _one_line(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{path}: cannot be read: {text}"


def made_constraints(names: Sequence[str], relaxing: bool) -> list[Any]:
    """Constraints by their names on the command line."""
    from carryall.dynamics.constraints import FixCenterOfMass, FixSymmetry

    return [FixSymmetry() if name == "fix_symmetry" else FixCenterOfMass(unit_masses=relaxing) for name in names]


def check_against(potential: Potential, structures: Sequence[AtomicData], what: str) -> None:
    """InputError when the potential cannot be evaluated on a structure: unknown element, coincident atoms, flat cell."""
    for index, one in enumerate(structures):
        if problem := problem_of(potential, one):
            raise InputError(f"{what}: structure {index}: {problem}")


def problem_of(potential: Potential, structure: AtomicData) -> str | None:
    """Why the potential cannot be evaluated on a structure; None when it can."""
    from carryall.data import check_structures
    from carryall.graph.neighbor_search import graph_from_structures

    try:
        check_structures([structure])
        graph_from_structures([structure], potential.spec.cutoff, potential.spec.type_map)
    except InputError as error:
        return str(error).removeprefix("structure 0: ").removeprefix("system 0: ")
    return None


def built_in_start(model: str) -> list[AtomicData]:
    """A structure for a built-in potential to start from; InputError for any other potential."""
    if model == "water":
        ambient = {"temperature": 330, "density": 1.0}
        return [one for one in water_frames("test") if ambient.items() <= one.info.items()][:1]
    if model == "lj-argon":
        return [face_centered_cubic("Ar", ARGON_LATTICE, 4, rattle=0.05)]
    if model == "sutton-chen":
        return [face_centered_cubic("Cu", COPPER_LATTICE, 4, rattle=0.02)]
    raise InputError(
        f"no start structure: give a file, as in carryall md start.extxyz --model {model} "
        "(only lj-argon, sutton-chen and water bring their own)"
    )


def water_frames(name: str) -> list[AtomicData]:
    """Frames of the built-in water data: "train", "validation" or "test"."""
    from carryall.data import read_structures
    from carryall.package.open import shipped

    return read_structures(shipped(f"water/{name}.extxyz.gz"))


def face_centered_cubic(symbol: str, lattice: float, repeats: int, rattle: float = 0.0, seed: int = 0) -> AtomicData:
    """repeats^3 cubic cells of four atoms, edge `lattice` (Å), off their sites by `rattle` (Å, standard deviation)."""
    import numpy as np

    from carryall.data import AtomicData, atomic_number

    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    corners = np.stack(np.meshgrid(*[np.arange(repeats)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    sites = ((corners + basis) * lattice).reshape(-1, 3)
    moved = sites + rattle * np.random.default_rng(seed).standard_normal(sites.shape)
    return AtomicData(moved, [atomic_number(symbol)] * len(sites), np.eye(3) * lattice * repeats)
