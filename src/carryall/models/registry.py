"""Models by the `type` of their source dict: a new kind is added here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from carryall.errors import InputError, nearest
from carryall.models.bridging import Bridged, bridged_from_source, bridged_to_source
from carryall.models.combination import LinearEnergyModel, linear_from_source, linear_to_source
from carryall.models.dpa1.model import DPA1
from carryall.models.dpa1.source import from_source as dpa1_from_source
from carryall.models.dpa1.source import to_source as dpa1_to_source
from carryall.models.ewald import Ewald
from carryall.models.ewald_charges import LearnedEwald
from carryall.models.pair import LennardJones
from carryall.models.pair_table import PairTable
from carryall.models.spin import SpinModel, spin_from_source, spin_to_source
from carryall.models.sutton_chen import SuttonChen
from carryall.models.zbl import ZBL

READERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "standard": dpa1_from_source,
    "zbl": lambda source: bridged_from_source(source, model_from_source),
    "linear": lambda source: linear_from_source(source, model_from_source),
    "linear_ener": lambda source: linear_from_source(source, model_from_source),
    "spin_ener": lambda source: spin_from_source(source, model_from_source),
    "pairtab": PairTable.from_dict,
    "ziegler_biersack_littmark": ZBL.from_dict,
    "lennard_jones": LennardJones.from_dict,
    "sutton_chen": SuttonChen.from_dict,
    "ewald": Ewald.from_dict,
    "ewald_learned": LearnedEwald.from_dict,
}

_REGISTERED: dict[str, type[nn.Module]] = {}


def register(kind: str, model: type[nn.Module]) -> None:
    """Make a model class of one's own known by the `type` of its source dict.

    It has `to_dict`, whose dict has that `type`, and a classmethod `from_dict`. A file of it runs without; only what starts
    from the source in it (`rebuild`, another `dtype`) needs the class to be registered.
    """
    if kind in READERS and kind not in _REGISTERED:
        raise InputError(f"model type {kind!r} is taken: choose another")
    READERS[kind] = model.from_dict  # type: ignore[attr-defined]
    _REGISTERED[kind] = model


def model_from_source(source: dict[str, Any]) -> nn.Module:
    """The model of a source dict (its `model` part, with a `type`)."""
    kind = source.get("type")
    if kind not in READERS:
        raise InputError(f"unknown model type {kind!r}{nearest(str(kind), READERS)}: known are {', '.join(READERS)}")
    try:
        return READERS[kind](source)
    except KeyError as missing:
        raise InputError(
            f"the model dict of type {kind!r} has no field {missing}: it is damaged or of an unsupported version"
        ) from None


def model_to_source(model: nn.Module) -> dict[str, Any]:
    """The source dict of a model; arrays are numpy arrays."""
    if isinstance(model, DPA1):
        return dpa1_to_source(model)
    if isinstance(model, Bridged):
        return bridged_to_source(model, model_to_source)
    if isinstance(model, LinearEnergyModel):
        return linear_to_source(model, model_to_source)
    if isinstance(model, SpinModel):
        return spin_to_source(model, model_to_source)
    if isinstance(model, LennardJones | SuttonChen | PairTable | ZBL | Ewald | LearnedEwald):
        return model.to_dict()
    if type(model) in _REGISTERED.values():
        return model.to_dict()  # type: ignore[operator]
    raise InputError(
        f"a model of class {type(model).__name__} has no source form: give it to_dict and from_dict, then "
        "carryall.models.registry.register(kind, class)"
    )
