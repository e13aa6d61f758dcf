"""DeePMD npy folders: a system is type.raw, type_map.raw, an optional empty nopbc, and set.NNN/*.npy.

Arrays have one row a frame: coord (3 n_atoms), box (9), energy, force (3 n_atoms), virial (9, eV, = -volume * stress), and in
the mixed-type form real_atom_types (n_atoms), where -1 is a virtual atom. spin (3 n_atoms) becomes `spins`; aparam, atom_ener,
fparam, charge_spin and force_mag (3 n_atoms, as atom_extras["magnetic_forces"]) are kept as extras. All but atom_ener are
written, too; other arrays are left aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from carryall.data.atomic_data import AtomicData, formula
from carryall.data.elements import atomic_number, symbol_of
from carryall.data.extra_inputs import OF_SYSTEM, structure_inputs
from carryall.errors import InputError

_PER_ATOM = ("aparam", "atom_ener")
_MAGNETIC = "magnetic_forces"


def is_system(path: Path) -> bool:
    """Whether a folder is a DeePMD system."""
    return (path / "type.raw").is_file()


def read_deepmd(path: str | Path) -> list[AtomicData]:
    """Frames of a system folder, or of all system folders below it, in the order of their names; float64."""
    path = Path(path)
    systems = [path] if is_system(path) else sorted(found.parent for found in path.rglob("type.raw"))
    if not systems:
        raise InputError(f"{path}: no DeePMD system here or below: a system folder holds type.raw and set.000/coord.npy")
    return [data for system in systems for data in _read_system(system)]


def write_deepmd(
    path: str | Path, structures: Sequence[AtomicData], mixed_type: bool = False, dtype: str = "float64", set_size: int = 5000
) -> None:
    """Write structures as a new system folder, or one folder for each kind of structure (`000.O64H128`, ...) when they differ.

    Structures of one folder share atoms in the same order (with `mixed_type` only their number), periodicity and the labels
    they have. The format holds positions, energy, forces, fparam, aparam, charge_spin, spins that are vectors, their forces
    (atom_extras["magnetic_forces"]) and, of periodic structures, cell and stress (as virial); nothing else is written.
    """
    path = Path(path)
    groups: dict[tuple[object, ...], list[AtomicData]] = {}
    for number, data in enumerate(structures):
        _check_writable(number, data)
        atoms = (data.n_atoms,) if mixed_type else tuple(data.atomic_numbers.tolist())
        labels: tuple[object, ...] = (data.energy is not None, data.forces is not None)
        labels += (data.stress is not None and bool(data.pbc.any()),)
        labels += tuple((name, len(row)) for name, row in _extra_arrays(data).items())
        groups.setdefault((atoms, bool(data.pbc.any()), labels), []).append(data)
    numbers = sorted({number for data in structures for number in data.atomic_numbers.tolist()})
    for count, members in enumerate(groups.values()):
        name = f"{members[0].n_atoms}_atoms" if mixed_type else formula(members[0])
        folder = path if len(groups) == 1 else path / f"{count:03d}.{name}"
        _write_system(folder, members, numbers, mixed_type, np.dtype(dtype), set_size)


def _read_system(system: Path) -> list[AtomicData]:
    types = _words(system / "type.raw")
    try:
        atom_types = np.array([int(word) for word in types], dtype=np.int64)
    except ValueError:
        raise InputError(f"{system / 'type.raw'}: expected one integer an atom") from None
    if not (system / "type_map.raw").is_file():
        raise InputError(f"{system}: type_map.raw is missing: it names the element of each type, one a line")
    symbols = _words(system / "type_map.raw")
    sets = sorted(folder for folder in system.glob("set.*") if folder.is_dir())
    if not sets:
        raise InputError(f"{system}: no set.* folder: frames are in set.000/coord.npy")
    periodic = not (system / "nopbc").exists()
    return [data for folder in sets for data in _read_set(folder, atom_types, symbols, periodic)]


def _read_set(folder: Path, atom_types: np.ndarray, symbols: list[str], periodic: bool) -> list[AtomicData]:
    n_atoms = len(atom_types)
    coord = _load(folder / "coord.npy", None, 3 * n_atoms)
    if coord is None:
        raise InputError(f"{folder / 'coord.npy'} is missing")
    n_frames = len(coord)
    box = _load(folder / "box.npy", n_frames, 9) if periodic else None
    if periodic and box is None:
        raise InputError(f"{folder / 'box.npy'} is missing: a system without cell has an empty file nopbc beside type.raw")
    energy = _load(folder / "energy.npy", n_frames, 1)
    force = _load(folder / "force.npy", n_frames, 3 * n_atoms)
    virial = _load(folder / "virial.npy", n_frames, 9)
    per_atom = {name: _load(folder / f"{name}.npy", n_frames, None) for name in _PER_ATOM}
    per_atom[_MAGNETIC] = _load(folder / "force_mag.npy", n_frames, 3 * n_atoms)
    of_system = {name: _load(folder / f"{name}.npy", n_frames, None) for name in OF_SYSTEM}
    spin = _load(folder / "spin.npy", n_frames, 3 * n_atoms)
    real = _load(folder / "real_atom_types.npy", n_frames, n_atoms)
    frame_types = np.repeat(atom_types[None], n_frames, axis=0) if real is None else real.astype(np.int64)
    found = []
    for i in range(n_frames):
        keep = frame_types[i] >= 0
        cell = None if box is None else box[i].reshape(3, 3)
        try:
            volume = 0.0 if cell is None else abs(np.linalg.det(cell))
            if cell is not None and volume == 0:
                raise InputError(f"box is {cell.tolist()}, which has no volume: a system without cell has an empty file nopbc")
            found.append(
                AtomicData(
                    coord[i].reshape(-1, 3)[keep],
                    _atomic_numbers(frame_types[i][keep], symbols),
                    cell=cell,
                    pbc=[periodic] * 3,
                    energy=None if energy is None else energy[i],
                    forces=None if force is None else force[i].reshape(-1, 3)[keep],
                    stress=None if virial is None or not volume else -virial[i].reshape(3, 3) / volume,
                    info={} if virial is None or volume else {"virial": virial[i].reshape(3, 3)},
                    atom_extras={k: v[i].reshape(n_atoms, -1)[keep] for k, v in per_atom.items() if v is not None},
                    system_extras={k: v[i] for k, v in of_system.items() if v is not None},
                    spins=None if spin is None else spin[i].reshape(-1, 3)[keep],
                )
            )
        except InputError as error:
            raise InputError(f"{folder}: frame {i}: {error}") from None
    return found


def _atomic_numbers(types: np.ndarray, symbols: list[str]) -> np.ndarray:
    if types.size and types.max() >= len(symbols):
        raise InputError(f"type {types.max()} has no name: type_map.raw names {len(symbols)} types, {', '.join(symbols)}")
    table = {kind: atomic_number(symbols[kind]) for kind in np.unique(types).tolist()}
    return np.array([table[kind] for kind in types.tolist()], dtype=np.int64)


def _load(path: Path, n_frames: int | None, width: int | None) -> np.ndarray | None:
    """(n_frames, width) float64, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        array = np.load(path, allow_pickle=False)
        array = array.reshape(len(array), -1).astype(np.float64)
    except (ValueError, EOFError, TypeError) as error:
        raise InputError(f"{path}: not an array of numbers, one row a frame: {error}") from None
    if n_frames is not None and len(array) != n_frames:
        raise InputError(f"{path} has {len(array)} frames, coord.npy has {n_frames}")
    if width is not None and array.shape[1] != width:
        raise InputError(f"{path} has {array.shape[1]} values a frame, expected {width}")
    return array


def _words(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def _check_writable(number: int, data: AtomicData) -> None:
    if data.n_atoms == 0:
        raise InputError(f"structure {number} has no atoms")
    if data.pbc.any() and not data.pbc.all():
        raise InputError(f"structure {number} is periodic along some axes only, which DeePMD's format cannot say: use .extxyz")
    if data.pbc.any() and data.volume == 0:
        raise InputError(f"structure {number} is periodic but its cell has no volume")


def _write_system(
    folder: Path, members: list[AtomicData], numbers: list[int], mixed_type: bool, dtype: np.dtype, set_size: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index = {number: kind for kind, number in enumerate(numbers)}
    first = members[0]
    types = [0] * first.n_atoms if mixed_type else [index[number] for number in first.atomic_numbers.tolist()]
    (folder / "type.raw").write_text("".join(f"{kind}\n" for kind in types), encoding="utf-8")
    (folder / "type_map.raw").write_text("".join(f"{symbol_of(number)}\n" for number in numbers), encoding="utf-8")
    if not first.pbc.any():
        (folder / "nopbc").touch()
    for start in range(0, len(members), set_size):
        part = members[start : start + set_size]
        target = folder / f"set.{start // set_size:03d}"
        target.mkdir()
        for name, array in _arrays(part).items():
            np.save(target / f"{name}.npy", array.astype(dtype))
        if mixed_type:
            real = [[index[number] for number in data.atomic_numbers.tolist()] for data in part]
            np.save(target / "real_atom_types.npy", np.array(real, dtype=np.int32))


def _arrays(part: list[AtomicData]) -> dict[str, np.ndarray]:
    first = part[0]
    arrays = {"coord": np.stack([_array(data.positions).reshape(-1) for data in part])}
    if first.pbc.any():
        arrays["box"] = np.stack([_array(data.cell).reshape(9) for data in part])
    if first.energy is not None:
        arrays["energy"] = np.stack([_array(data.energy) for data in part])
    if first.forces is not None:
        arrays["force"] = np.stack([_array(data.forces).reshape(-1) for data in part])
    if first.stress is not None and first.pbc.any():
        arrays["virial"] = np.stack([-data.volume * _array(data.stress).reshape(9) for data in part])
    for name in _extra_arrays(first):
        arrays[name] = np.stack([_extra_arrays(data)[name] for data in part])
    return arrays


def _extra_arrays(data: AtomicData) -> dict[str, np.ndarray]:
    """fparam, aparam, spin, charge_spin and force_mag, one row each, as far as the structure has them."""
    found = {name: _array(value).reshape(-1) for name, value in structure_inputs(data).items()}
    labels = data.atom_extras.get(_MAGNETIC)
    return found if labels is None else {**found, "force_mag": _array(labels).reshape(-1)}


def _array(value: Tensor | None) -> np.ndarray:
    assert value is not None
    return value.detach().cpu().numpy()
