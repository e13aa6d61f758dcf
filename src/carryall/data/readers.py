"""Structures from files and into files, whatever the format: by suffix, or by what a folder holds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from carryall.data.atomic_data import AtomicData
from carryall.data.deepmd_npy import read_deepmd, write_deepmd
from carryall.data.extxyz import read_extxyz, select_frames, write_extxyz
from carryall.data.labels import LabelKeys
from carryall.errors import InputError, nearest

DEEPMD = "deepmd/npy"
EXTXYZ_SUFFIXES = (".extxyz", ".xyz", ".extxyz.gz", ".xyz.gz")


def read_structures(
    path: str | Path,
    index: int | slice | None = None,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    format: str | None = None,
) -> list[AtomicData]:
    """Structures of a file or folder: extended XYZ (.extxyz, .xyz, .gz), DeePMD npy folders, everything else through ASE.

    index: all structures (None), one (an int, negative from the end; still a list), or a slice.
    energy_key, forces_key, stress_key: names of the labels in files that name them; by default the first that is present of
    REF_, dft_, DFT_ and no prefix before energy; forces, force; stress, virials, virial. A stress key with "virial" in its name
    is a virial, -volume * stress. A DeePMD folder has fixed names.
    format: a format of ASE, to read a file by it whatever its suffix.
    """
    path = Path(path)
    keys = LabelKeys(energy_key, forces_key, stress_key)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder{_similar(path)}")
    if format is not None or not (path.is_dir() or is_extxyz(path)):
        from carryall.data.ase import read_ase

        return read_ase(path, index, keys, format)
    if path.is_dir():
        found = read_deepmd(path)
        return found if index is None else list(select_frames(found, index, path))
    try:
        return read_extxyz(path, index, keys)
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise InputError(f"{path}: cannot be read as extended XYZ: {error}") from None


def write_structures(
    path: str | Path, structures: Sequence[AtomicData], *, prefix: str = "", format: str | None = None
) -> None:
    """Write structures by suffix: extended XYZ (.extxyz, .xyz, .gz), a DeePMD npy folder (no suffix, or format "deepmd/npy"),
    everything else through ASE.

    The file appears under its name only when complete. `prefix` goes before label keys of extended XYZ, e.g. "REF_".
    """
    path, structures = Path(path), list(structures)
    if not structures:
        raise InputError(f"{path}: no structures to write")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder: make it first")
    # Formats go by parts of the name, so the whole name stays.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    if format == DEEPMD or (format is None and not path.suffix and not path.name.endswith("CAR")):
        _write_folder(path, temporary, structures)
        return
    try:
        if format is None and is_extxyz(path):
            write_extxyz(temporary, structures, prefix)
        else:
            from carryall.data.ase import write_ase

            write_ase(temporary, structures, format)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_folder(path: Path, temporary: Path, structures: list[AtomicData]) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder: a DeePMD folder is written anew")
    try:
        write_deepmd(temporary, structures)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_extxyz(path: Path) -> bool:
    """Whether the name is one of extended XYZ, plain or compressed."""
    return path.name.lower().endswith(EXTXYZ_SUFFIXES)


def _similar(path: Path) -> str:
    try:
        return nearest(path.name, [one.name for one in path.parent.iterdir()])
    except OSError:
        return ""
