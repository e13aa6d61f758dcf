"""Extended XYZ: a strict reader and a writer, in full precision, that understand each other and ASE's `ase.io.extxyz`.

Columns of `Properties` that have a field of their own: species or Z, pos, forces (by label key), momenta (velocities times
mass, as ASE writes them), masses, charges or initial_charges, magmoms or initial_magmoms or, as vectors, spin (spins). Other
numeric columns become `atom_extras`; text columns become arrays of strings in `info`, and are columns again when written.
`move_mask` is kept as `atom_extras["move_mask"]`, (n_atoms, 3) bool, true where an atom may move. fparam and charge_spin of the
comment line become `system_extras`.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.elements import MASSES, N_ELEMENTS, atomic_number
from carryall.data.extra_inputs import take_spins, take_system_inputs
from carryall.data.extxyz_comment import RESERVED, format_comment, parse_comment
from carryall.data.fields import FIELDS
from carryall.data.labels import LabelKeys, take_labels
from carryall.errors import InputError

_PLAIN = "species:S:1:pos:R:3"
_NAMES = {"symbols": "species", "positions": "pos", "numbers": "Z", "mass": "masses", "charge": "charges"}
_CHARGES = ("charges", "initial_charges")
_SPINS = ("magmoms", "initial_magmoms")


@dataclass(frozen=True)
class Frame:
    """Text of one frame, not yet read."""

    number: int
    """Counted from 0."""
    line: int
    """Line of the atom count, counted from 1."""
    comment: str
    rows: list[str]


def read_extxyz(path: str | Path, index: int | slice | None = None, keys: LabelKeys | None = None) -> list[AtomicData]:
    """The frames of a file (.gz too), all of them or those of `index`; errors name file, frame and line."""
    path, keys = Path(path), keys or LabelKeys()
    frames = list(iter_frames(path))
    return [parse_frame(frame, path, keys) for frame in (frames if index is None else select_frames(frames, index, path))]


def iter_frames(path: str | Path) -> Iterator[Frame]:
    """The frames of a file (.gz too) as text, one after the other, for `parse_frame`; InputError for a file without any."""
    path, empty = Path(path), True
    with _open(path, "rt") as handle:
        for frame in frames_in(handle, path):
            empty = False
            yield frame
    if empty:
        raise InputError(f"{path}: the file holds no frame")


def select_frames(frames: Sequence[Any], index: int | slice, path: Path) -> Sequence[Any]:
    """Items of `index`, as a list; InputError names an index beyond the file."""
    if isinstance(index, slice):
        return frames[index]
    if not -len(frames) <= index < len(frames):
        raise InputError(f"{path}: there is no frame {index}, the file holds {len(frames)}")
    return [frames[index]]


def write_extxyz(path: str | Path, structures: Iterable[AtomicData], prefix: str = "") -> None:
    """Write frames (.gz too), numbers in full precision; `prefix`, such as "REF_", goes before the label keys.

    Where `info` has a plain label key already, the label is written with the prefix REF_, so that neither is lost.
    system_extras go to the comment line, rows of more than one axis are flattened, edge data has no place and is left out.
    """
    with _open(Path(path), "wt") as handle:
        for number, data in enumerate(structures):
            try:
                handle.write(format_frame(data, prefix))
            except InputError as error:
                raise InputError(f"{path}: structure {number}: {error}") from None


def parse_frame(frame: Frame, path: Path, keys: LabelKeys) -> AtomicData:
    """A structure from the text of a frame."""
    try:
        if not frame.rows:
            raise InputError("the frame has 0 atoms: remove it")
        info = parse_comment(frame.comment)
        columns, text = _columns(frame, str(info.pop("Properties", _PLAIN)))
        return _structure(info, columns, text, keys)
    except InputError as error:
        raise InputError(f"{path}: frame {frame.number} (line {frame.line}): {error}") from None


def _open(path: Path, mode: str) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, mode, encoding="utf-8")  # type: ignore[return-value]
    return path.open(mode, encoding="utf-8")


def frames_in(handle: Iterator[str], path: Path) -> Iterator[Frame]:
    """Frames of lines, one after the other; InputError with the line of what is none."""
    number, line = 0, 0
    for head in handle:
        line += 1
        if not head.strip():
            continue
        where = f"{path}: frame {number} (line {line})"
        try:
            n_atoms = int(head)
        except ValueError:
            raise InputError(f"{where}: expected the number of atoms, got {head.strip()[:40]!r}") from None
        if n_atoms < 0:
            raise InputError(f"{where}: the frame has {n_atoms} atoms: remove it")
        body = list(islice(handle, n_atoms + 1))
        if len(body) < n_atoms + 1:
            raise InputError(f"{where}: the file ends after {max(len(body) - 1, 0)} of {n_atoms} atoms: it is truncated")
        yield Frame(number, line, body[0], body[1:])
        number += 1
        line += n_atoms + 1


def _layout(properties: str) -> list[tuple[str, str, int]]:
    parts = properties.split(":")
    found = []
    for name, kind, count in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        if kind not in ("R", "I", "S", "L") or not count.isdigit() or int(count) < 1:
            raise InputError(f"Properties has {name}:{kind}:{count}: expected name:type:columns with type R, I, S or L")
        found.append((_NAMES.get(name, name), kind, int(count)))
    names = [name for name, _, _ in found]
    if len(parts) % 3 or len(set(names)) != len(names):
        raise InputError(f"Properties is {properties!r}: expected name:type:columns for each column, each name once")
    if ("pos", "R", 3) not in found or not {"species", "Z"} & set(names):
        raise InputError(f"Properties is {properties!r}: it must hold pos:R:3 and species:S:1 (or Z:I:1)")
    return found


def _columns(frame: Frame, properties: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Numeric and text columns by name."""
    layout = _layout(properties)
    width = sum(count for _, _, count in layout)
    rows = [row.split() for row in frame.rows]
    for i, row in enumerate(rows):
        if len(row) != width:
            hint = "" if "Properties" in frame.comment else "; a line with Properties= names more columns than plain XYZ has"
            raise InputError(f"line {frame.line + 2 + i} (atom {i}) has {len(row)} columns, expected {width}{hint}")
    table = list(zip(*rows, strict=True))
    numeric: dict[str, np.ndarray] = {}
    text: dict[str, np.ndarray] = {}
    start = 0
    for name, kind, count in layout:
        values = [_converted(kind, name, words, frame.line + 2) for words in table[start : start + count]]
        start += count
        array = values[0] if count == 1 else np.stack(values, axis=1)
        (text if kind == "S" else numeric)[name] = array
    return numeric, text


def _converted(kind: str, name: str, words: tuple[str, ...], first_line: int) -> np.ndarray:
    converters: dict[str, Any] = {"R": float, "I": int, "S": str, "L": _boolean}
    convert = converters[kind]
    dtype = {"R": np.float64, "I": np.int64, "S": np.str_, "L": np.bool_}[kind]
    try:
        return np.array(list(map(convert, words)), dtype=dtype)
    except (ValueError, OverflowError):
        atom = next(i for i, word in enumerate(words) if not _converts(convert, word))
        wanted = {"R": "a number", "I": "an integer", "L": "T or F"}[kind]
        raise InputError(f"line {first_line + atom} (atom {atom}): {name} is {words[atom]!r}, expected {wanted}") from None


def _converts(convert: Any, word: str) -> bool:
    try:
        np.array(convert(word), dtype=np.int64 if convert is int else None)
    except (ValueError, OverflowError):
        return False
    return True


def _boolean(word: str) -> bool:
    if word in ("T", "True", "true", "TRUE", "1"):
        return True
    if word in ("F", "False", "false", "FALSE", "0"):
        return False
    raise ValueError(word)


def _structure(
    info: dict[str, Any], columns: dict[str, np.ndarray], text: dict[str, np.ndarray], keys: LabelKeys
) -> AtomicData:
    cell, pbc = info.pop("Lattice", None), info.pop("pbc", None)
    if cell is not None and not cell.any():
        cell, pbc = None, np.zeros(3, dtype=bool) if pbc is None else pbc
    values: dict[str, Any] = {"cell": None if cell is None else cell.astype(np.float64), "pbc": pbc}
    values["positions"] = columns.pop("pos")
    values["atomic_numbers"] = _numbers(columns, text)
    values.update(take_labels(info, columns, values["cell"], keys))
    if "masses" in columns:
        values["masses"] = columns.pop("masses")
    if "momenta" in columns:
        masses = values.get("masses", MASSES[values["atomic_numbers"].clip(0, N_ELEMENTS)])
        values["velocities"] = columns.pop("momenta") / masses[:, None]
    for field, names in (("charges", _CHARGES), ("spins", _SPINS)):
        present = [name for name in names if name in columns]
        if present:
            values[field] = columns.pop(present[0])
    if (vectors := take_spins(columns)) is not None:
        values["spins"] = vectors
    if "move_mask" in columns:
        mask = columns["move_mask"].astype(bool)
        columns["move_mask"] = np.repeat(mask[:, None], 3, axis=1) if mask.ndim == 1 else mask
    # A column named like a field of its own, say a second set of forces, is kept under another name.
    extras = {f"{name}_column" if name in FIELDS else name: column for name, column in columns.items()}
    text = {f"{name}_column" if name in info else name: column for name, column in text.items()}
    system_extras = take_system_inputs(info)
    return AtomicData(**values, info={**info, **text}, atom_extras=extras, system_extras=system_extras)


def _numbers(columns: dict[str, np.ndarray], text: dict[str, np.ndarray]) -> np.ndarray:
    if "species" not in text:
        if "Z" not in columns:
            raise InputError("Properties must give species as S or Z as I")
        return columns.pop("Z")
    columns.pop("Z", None)
    species = text.pop("species").tolist()
    table: dict[str, int] = {}
    for atom, symbol in enumerate(species):
        if symbol not in table:
            try:
                table[symbol] = int(symbol) if symbol.isdigit() else atomic_number(symbol)
            except InputError as error:
                raise InputError(f"atom {atom}: {error}") from None
    return np.array([table[symbol] for symbol in species])


def format_frame(data: AtomicData, prefix: str = "") -> str:
    """The text of one frame."""
    if data.n_atoms == 0:
        raise InputError("the structure has no atoms")
    if clash := sorted(data.info.keys() & data.system_extras.keys()):
        raise InputError(f"{clash[0]!r} is in info and in system_extras: rename one")
    info = dict(data.info)
    info.update({name: _array(value) for name, value in data.system_extras.items()})
    text = {name: value for name, value in info.items() if isinstance(value, np.ndarray) and value.dtype.kind == "U"}
    text = {name: value for name, value in text.items() if value.ndim in (1, 2) and len(value) == data.n_atoms}
    if clash := [name for name in RESERVED if name in info]:
        raise InputError(f"info has {clash[0]!r}, a key of the format itself: rename it")
    if not prefix and ({"energy", "stress"} & info.keys()):
        prefix = "REF_"
    columns = {"species": np.array(data.symbols), "pos": _array(data.positions), **_atom_columns(data, prefix), **text}
    head: dict[str, Any] = {} if data.cell is None else {"Lattice": _array(data.cell)}
    head["Properties"] = ":".join(_property(name, column) for name, column in columns.items())
    if data.energy is not None:
        head[f"{prefix}energy"] = float(data.energy)
    if data.stress is not None:
        # The plain key is written column by column (the format's rule), a prefixed one row by row.
        head[f"{prefix}stress"] = _array(data.stress).reshape(9) if prefix else _array(data.stress)
    pbc = " ".join("T" if on else "F" for on in data.pbc.tolist())
    rest = format_comment({name: value for name, value in info.items() if name not in text})
    line = f'{format_comment(head)} pbc="{pbc}" {rest}'.rstrip()
    rows = zip(*(words for column in columns.values() for words in _words(column)), strict=True)
    return f"{data.n_atoms}\n{line}\n" + "".join(" ".join(row) + "\n" for row in rows)


def _atom_columns(data: AtomicData, prefix: str) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    if data.forces is not None:
        columns[f"{prefix}forces"] = _array(data.forces)
    if data.velocities is not None:
        masses = MASSES[_array(data.atomic_numbers)] if data.masses is None else _array(data.masses)
        columns["momenta"] = _array(data.velocities) * masses[:, None]
    for name, value in (("masses", data.masses), ("initial_charges", data.charges), ("initial_magmoms", data.spins)):
        if value is not None:
            columns[name] = _array(value)
    for name, value in data.atom_extras.items():
        array = _array(value)
        if any(mark in name for mark in ": ") or name in columns or name in ("species", "pos", "Z"):
            raise InputError(f"atom_extras[{name!r}] cannot be a column of that name: rename it")
        if name == "move_mask" and array.ndim == 2 and (array == array[:, :1]).all():
            array = array[:, 0]
        columns[name] = array if array.ndim == 1 else array.reshape(len(array), -1)
    return columns


def _property(name: str, column: np.ndarray) -> str:
    kind = {"f": "R", "i": "I", "u": "I", "b": "L", "U": "S"}[column.dtype.kind]
    return f"{name}:{kind}:{1 if column.ndim == 1 else column.shape[1]}"


def _words(column: np.ndarray) -> Iterator[list[str]]:
    """Texts of a column, one list for each of its sub-columns."""
    for values in [column] if column.ndim == 1 else column.T:
        if column.dtype.kind == "U":
            yield _checked_words(values.tolist())
        elif column.dtype.kind == "b":
            yield ["T" if value else "F" for value in values.tolist()]
        else:
            yield list(map(repr, values.tolist()))


def _checked_words(words: list[str]) -> list[str]:
    for word in words:
        if len(word.split()) != 1:
            raise InputError(f"{word!r} cannot be a word of a text column: it must be one word")
    return words


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
