"""One large system over several processes: space is cut into bricks, one for each rank of torch.distributed.

    torchrun --nproc-per-node 4 script.py

    with domain.joined() as transport:                       # one process alone, too
        dynamics = NVTLangevin(potential, temperature=300.0)
        part = domain.spread(structure, dynamics, transport)
        dynamics.run(part, n_steps=1000)
        whole = domain.gather(part, dynamics)                # on rank 0

Ghosts lie within one cutoff (and the skin) around a brick, for models that pass messages too: those exchange features.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carryall.engines.domain.group import joined as joined
    from carryall.engines.domain.group import ranks_of_torchrun as ranks_of_torchrun
    from carryall.engines.domain.run import md as md
    from carryall.engines.domain.single_point import single_points as single_points
    from carryall.engines.domain.system import gather as gather
    from carryall.engines.domain.system import spread as spread

_WHERE = {
    "joined": "group",
    "ranks_of_torchrun": "group",
    "gather": "system",
    "spread": "system",
    "md": "run",
    "single_points": "single_point",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
