"""Build and run spin models over DPA-1 with deepmd-kit 3.2.0 itself; needs its environment, not carryall's.

`build` makes a model dict, with types and exclusions for virtual atoms as deepmd-kit's own `get_spin_model` gives them.
`evaluate` runs it by both of its routes: `whole` (training, `.pth`: neighbours are searched among all atoms, virtual ones too)
and `lower` (packed programs, LAMMPS: virtual neighbours are those of the neighbours on a list, here one at the cutoff).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import deepmd_reference
import numpy as np
import torch
from deepmd.pt.model.model.spin_model import SpinEnergyModel
from deepmd.pt.utils.nlist import extend_input_and_build_neighbor_list
from deepmd.pt_expt.model.spin_ener_model import SpinEnergyModel as LowerModel
from deepmd.utils.spin import Spin
from deepmd_reference import System

QUANTITIES = (*deepmd_reference.QUANTITIES, "force_mag")
ROUTES = ("whole", "lower")
ENV_PROTECTION = 0.01  # deepmd-kit's own, where a spin model names none


def build(
    settings: dict[str, Any], systems: dict[str, System], spins: dict[str, np.ndarray], seed: int = 1, exact: bool = False
) -> dict[str, Any]:
    """The serialised model of `settings` (those of DPA-1 for the real types, and `spin`: use_spin and virtual_scale)."""
    spin = Spin(settings["spin"]["use_spin"], settings["spin"]["virtual_scale"])
    type_map = list(settings["type_map"])
    pairs = spin.get_pair_exclude_types(settings["model"].get("pair_exclude_types"))
    inner = copy.deepcopy(settings)
    inner["type_map"] = [*type_map, *(f"{symbol}_spin" for symbol in type_map)]
    inner["descriptor"] = {
        "env_protection": ENV_PROTECTION,
        **settings["descriptor"],
        "exclude_types": [tuple(p) for p in pairs],
    }
    atoms = spin.get_atom_exclude_types(settings["model"].get("atom_exclude_types"))
    inner["model"] = {"pair_exclude_types": [tuple(pair) for pair in pairs], "atom_exclude_types": sorted(atoms)}
    packed = {name: with_virtual_atoms(systems[name], spins[name], spin) for name in settings["statistics"]}
    backbone = deepmd_reference.build(inner, packed, seed, exact)
    return {"type": "spin_ener", "backbone_model": backbone, "spin": spin.serialize()}


def with_virtual_atoms(system: System, spins: np.ndarray, spin: Spin) -> System:
    """The system with a virtual atom for each, as deepmd-kit takes its statistics."""
    x, types, box = system
    virtual = x + spins * spin.get_virtual_scale_mask()[types][:, None]
    return np.concatenate([x, virtual]), np.concatenate([types, types + spin.get_ntypes_real()]), box


def evaluate(
    source: dict[str, Any],
    systems: dict[str, System],
    spins: dict[str, np.ndarray],
    inputs: dict[str, dict[str, np.ndarray]],
    routes: Sequence[str] = ROUTES,
) -> dict[str, np.ndarray]:
    """`<system>/<route>/<quantity>` of every system, in float64."""
    found: dict[str, np.ndarray] = {}
    for route in routes:
        model_class, run = {"whole": (SpinEnergyModel, run_whole), "lower": (LowerModel, run_lower)}[route]
        model = model_class.deserialize(copy.deepcopy(source)).to("cpu").eval()
        for name, system in systems.items():
            values = run(model, system, spins[name], inputs.get(name, {}))
            for key in QUANTITIES:
                array = np.asarray(values[key].detach().numpy(), dtype=np.float64)[0]
                found[f"{name}/{route}/{key}"] = array.reshape(len(array), -1) if array.ndim == 3 else array
    return found


def run_whole(model: Any, system: System, spins: np.ndarray, extra: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """deepmd.pt, as it is called in training."""
    x, types, cell, more = deepmd_reference._tensors(system, extra)
    return model.forward(x.requires_grad_(), types, torch.tensor(spins[None]), cell, do_atomic_virial=True, **more)


def run_lower(model: Any, system: System, spins: np.ndarray, extra: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """deepmd.pt_expt on a list of the neighbours of real atoms; ghosts' values folded on their owners."""
    x, types, cell, more = deepmd_reference._tensors(system, extra)
    sel = [model.backbone_model.get_nnei()]
    extended, atype, mapping, nlist = extend_input_and_build_neighbor_list(
        x, types, model.get_rcut(), sel, mixed_types=True, box=cell
    )
    owners = mapping[..., None].expand(-1, -1, 3)
    moments = torch.gather(torch.tensor(spins[None]), 1, owners)
    out = model.forward_lower(extended.requires_grad_(), atype, moments, nlist, mapping=mapping, do_atomic_virial=True, **more)

    def folded(value: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, x.shape[1], *value.shape[2:], dtype=value.dtype).index_add(1, mapping[0], value.detach())

    extended_names = {"force": "extended_force", "force_mag": "extended_force_mag", "atom_virial": "extended_virial"}
    plain = {name: out[name] for name in ("energy", "virial", "atom_energy")}
    return {**plain, **{name: folded(out[key]) for name, key in extended_names.items()}}
