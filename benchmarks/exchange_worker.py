"""One rank that is timed: python exchange_worker.py KIND quick|full OUT.json; KIND serial, mpi (mpirun) or gloo (torchrun).

Rank 0 writes what was found. A time is the slowest rank's, of the best of many repeats.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from exchange_common import SIZES, WIDTHS

from carryall.exchange import Exchange, SerialTransport, Transport, ops, plan_from_ids

Best = Callable[[Callable[[], Any]], float]
"""Seconds of a call."""


def main(kind: str, quick: bool, out: Path) -> None:
    """All figures of one transport."""
    torch.set_num_threads(1)
    if kind == "mpi":
        from carryall.exchange.mpi import MPITransport, ending_all

        with ending_all():
            measure(MPITransport(), quick, out)
        return
    if kind == "serial":
        measure(SerialTransport(), quick, out)
        return
    import torch.distributed as dist

    from carryall.exchange.distributed import DistributedTransport

    dist.init_process_group("gloo")
    measure(DistributedTransport(), quick, out)
    dist.destroy_process_group()


def measure(transport: Transport, quick: bool, out: Path) -> None:
    """The times of every size and width, seconds."""
    repeats, calls = (2, 2) if quick else (60, 10)

    def best(function: Callable[[], Any]) -> float:
        function()
        return min(slowest(transport, function, calls) for _ in range(repeats))

    rows = [timed(transport, best, *size, width) for size in SIZES for width in WIDTHS]
    local, ghost = ids(transport, *SIZES[0])
    number = torch.zeros(1, dtype=torch.int64)
    found = {
        "rows": rows,
        "plan": best(lambda: plan_from_ids(local, ghost, transport)),
        "sum": best(lambda: transport.all_reduce(number)),
        "call": call_cost(best),
    }
    if transport.rank == 0:
        out.write_text(json.dumps(found))


def timed(transport: Transport, best: Best, n_local: int, n_ghost: int, width: int) -> dict[str, float]:
    """Both exchanges, and the op around the first, of rows of `width` float64."""
    local, ghost = ids(transport, n_local, n_ghost)
    exchange = Exchange(plan_from_ids(local, ghost, transport), transport)
    sent = len(exchange.plan.send_row)
    handle, token = exchange.handle(), torch.zeros(1, dtype=torch.float64)
    places = exchange.rows_of(torch.device("cpu"))
    own, foreign = (torch.rand(rows, width, dtype=torch.float64) for rows in (n_local, n_ghost))
    return {
        "local": n_local,
        "ghost": n_ghost,
        "width": width,
        "message": sent * width * 8,
        "forward": best(lambda: exchange.forward(own)),
        "reverse": best(lambda: exchange.reverse(foreign)),
        "op": best(lambda: ops.exchange_forward(own, *places, handle, token)),
        "limit": limit(n_ghost, sent, width),
    }


def ids(transport: Transport, n_local: int, n_ghost: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ghosts are of the other rank; where there are more than it has atoms, the rest are second images of the same."""
    other = (transport.rank + 1) % transport.size
    generator = torch.Generator().manual_seed(transport.rank)
    atoms = torch.randperm(n_local, generator=generator)
    ghosts = atoms.repeat(n_ghost // n_local + 1)[:n_ghost]
    return transport.rank * n_local + torch.arange(n_local), other * n_local + ghosts


def limit(n_ghost: int, sent: int, width: int) -> int:
    """Bytes that a forward exchange cannot but read and write: rows packed, carried and put in their places."""
    return 8 * width * (2 * sent + 2 * sent + 2 * n_ghost)


def call_cost(best: Best) -> float:
    """Seconds of an op that moves one row of its own: what calling it costs."""
    exchange = Exchange(plan_from_ids(torch.tensor([0]), torch.tensor([0]), SerialTransport()), SerialTransport())
    handle, token, row = exchange.handle(), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    places = exchange.rows_of(torch.device("cpu"))
    return best(lambda: ops.exchange_forward(row, *places, handle, token))


def slowest(transport: Transport, function: Callable[[], Any], calls: int) -> float:
    """Seconds a call, on the rank where they take longest; all begin at the same time."""
    transport.all_reduce(torch.zeros(1, dtype=torch.int64))
    began = time.perf_counter()
    for _ in range(calls):
        function()
    mine = torch.zeros(transport.size, dtype=torch.float64)
    mine[transport.rank] = (time.perf_counter() - began) / calls
    return float(transport.all_reduce(mine).max())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "quick", Path(sys.argv[3]))
