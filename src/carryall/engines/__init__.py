"""Potentials in other people's engines, and over ranks; an engine is imported when it is first asked for."""

from importlib import import_module
from types import ModuleType

_ENGINES = ("ase", "dask", "domain", "lammps")


def __getattr__(name: str) -> ModuleType:
    if name in _ENGINES:
        return import_module(f"carryall.engines.{name}")
    raise AttributeError(f"module 'carryall.engines' has no attribute {name!r}")
