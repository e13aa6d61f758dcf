"""One rank of a torch.distributed group; writes what it found as JSON. Run by test_gloo.py."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from carryall import load
from carryall.errors import InputError
from carryall.exchange import Exchange
from carryall.exchange.distributed import DistributedTransport
from carryall.graph import graph_from_structures
from carryall.models import EagerPotential
from message_passing import Recorded, SwitchedOff, Tangled
from ranks import evaluate_share, split
from structures import CUTOFF, structure

SPREADS = {"two": [0, 1] * 4, "first has none": [1] * 8}


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    transport = DistributedTransport()
    potentials = {"eager": EagerPotential(Tangled())}
    potentials |= {path.suffix: load(path) for path in sorted(folder.glob("model.*"))}
    graph = graph_from_structures([structure("tilted", ("Cu", "Au"))], CUTOFF, ("Cu", "Au"))
    found: dict[str, Any] = {}
    for spread, rank_of in SPREADS.items():
        share = split(graph, rank_of, rank)
        for name, potential in potentials.items():
            out = evaluate_share(potential, share, transport)
            here = share.on(transport, Recorded)
            potential(here)
            off = potential(share.on(transport, SwitchedOff))
            found[f"{name}, {spread}"] = {
                "ids": share.local_ids.tolist(),
                "calls": here.exchange.calls,
                "off": float(off["energy"]),
                "out": {key: value.tolist() for key, value in out.items()},
            }
    share = split(graph, SPREADS["two"], rank)
    here = share.on(transport)
    try:
        potentials["eager"](here if rank == 0 else graph.replace(exchange=here.exchange))
    except InputError as error:
        found["error"] = str(error)
    kinds = (torch.int8, torch.bool, torch.float32, torch.float16, torch.int64)
    rows = {str(kind): share.local_ids.to(kind) for kind in kinds}
    found["rows"] = [bool(torch.equal(here.exchange.forward(r), share.ghost_ids.to(r.dtype))) for r in rows.values()]
    big = torch.rand(share.graph.n_local, 1 << 18, dtype=torch.float64)
    found["big"] = isinstance(here.exchange, Exchange) and here.exchange.forward(big).shape == (len(share.ghost_ids), 1 << 18)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
