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
from carryall.models.pair import LennardJones
from carryall.models.pair_table import PairTable
from carryall.models.sutton_chen import SuttonChen
from carryall.models.zbl import ZBL

READERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "standard": dpa1_from_source,
    "zbl": lambda source: bridged_from_source(source, model_from_source),
    "linear": lambda source: linear_from_source(source, model_from_source),
    "linear_ener": lambda source: linear_from_source(source, model_from_source),
    "pairtab": PairTable.from_dict,
    "ziegler_biersack_littmark": ZBL.from_dict,
    "lennard_jones": LennardJones.from_dict,
    "sutton_chen": SuttonChen.from_dict,
}


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
    if isinstance(model, LennardJones | SuttonChen | PairTable | ZBL):
        return model.to_dict()
    raise InputError(f"a model of class {type(model).__name__} has no source form: add it to carryall/models/registry.py")
