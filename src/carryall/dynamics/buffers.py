"""How much a buffer of systems holds: what stages that hand systems on to each other agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from carryall.errors import InputError, nearest


@dataclass(frozen=True)
class BufferConfig:
    """Room of a buffer for systems in transit. Two are equal when their numbers are.

    >>> BufferConfig.of({"num_systems": 64, "num_nodes": 4096, "num_edges": 0}).num_nodes
    4096
    """

    num_systems: int
    """Systems."""
    num_nodes: int
    """Atoms, all systems together."""
    num_edges: int
    """Edges, all systems together; 0 where systems carry none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{field.name} of BufferConfig must be an integer of at least 0, got {value!r}")

    @classmethod
    def of(cls, value: BufferConfig | Mapping[str, Any]) -> BufferConfig:
        """A BufferConfig as it is, or one made of a dict with its three names."""
        if isinstance(value, BufferConfig):
            return value
        if not isinstance(value, Mapping):
            raise InputError(f"a buffer is described by a BufferConfig or a dict, got {value!r}")
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise InputError(f"BufferConfig has no field {name!r}: it has {', '.join(names)}{nearest(str(name), names)}")
        if missing := [name for name in names if name not in value]:
            raise InputError(f"BufferConfig lacks {', '.join(missing)}: give {', '.join(names)}")
        return cls(**value)
