"""carryall: one potential, one file, every engine.

The public names, in the order of the road: define, train, pack, run. Each is imported on first use, so that
`import carryall` needs neither torch nor ASE.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.6.0"

if TYPE_CHECKING:
    from carryall import data as data
    from carryall import dynamics as dynamics
    from carryall import engines as engines
    from carryall import exchange as exchange
    from carryall import graph as graph
    from carryall import models as models
    from carryall.data import AtomicData as AtomicData
    from carryall.data import Batch as Batch
    from carryall.data import read_structures as read_structures
    from carryall.data import write_structures as write_structures
    from carryall.dynamics import md as md
    from carryall.dynamics import relax as relax
    from carryall.errors import CarryallError as CarryallError
    from carryall.errors import InputError as InputError
    from carryall.errors import MissingDependencyError as MissingDependencyError
    from carryall.exchange import all_reduce as all_reduce
    from carryall.exchange import communicate as communicate
    from carryall.graph import NeighborGraph as NeighborGraph
    from carryall.graph import Potential as Potential
    from carryall.graph import PotentialSpec as PotentialSpec
    from carryall.package.inspect import inspect as inspect
    from carryall.package.open import load as load
    from carryall.package.pack import pack as pack
    from carryall.package.rebuild import rebuild as rebuild
    from carryall.package.serialization import deserialize_to_file as deserialize_to_file
    from carryall.package.serialization import serialize_from_file as serialize_from_file
    from carryall.package.verify import verify as verify
    from carryall.properties.evaluate import evaluate as evaluate
    from carryall.training import TrainConfig as TrainConfig
    from carryall.training import train as train

_ROOMS = ("data", "graph", "exchange", "models", "training", "package", "dynamics", "engines", "properties")
_NAMES = {
    "AtomicData": "carryall.data",
    "Batch": "carryall.data",
    "read_structures": "carryall.data",
    "write_structures": "carryall.data",
    "NeighborGraph": "carryall.graph",
    "Potential": "carryall.graph",
    "PotentialSpec": "carryall.graph",
    "communicate": "carryall.exchange",
    "all_reduce": "carryall.exchange",
    "TrainConfig": "carryall.training",
    "train": "carryall.training",
    "pack": "carryall.package.pack",
    "load": "carryall.package.open",
    "inspect": "carryall.package.inspect",
    "rebuild": "carryall.package.rebuild",
    "serialize_from_file": "carryall.package.serialization",
    "deserialize_to_file": "carryall.package.serialization",
    "evaluate": "carryall.properties.evaluate",
    "verify": "carryall.package.verify",
    "relax": "carryall.dynamics",
    "md": "carryall.dynamics",
    "CarryallError": "carryall.errors",
    "InputError": "carryall.errors",
    "MissingDependencyError": "carryall.errors",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"carryall.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'carryall' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_ROOMS, *_NAMES, "__version__"])
