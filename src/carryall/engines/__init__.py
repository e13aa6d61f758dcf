"""Potentials in other people's engines; an engine is imported when it is first asked for."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "ase":
        return import_module("carryall.engines.ase")
    raise AttributeError(f"module 'carryall.engines' has no attribute {name!r}")
