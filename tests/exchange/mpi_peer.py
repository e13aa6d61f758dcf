"""One rank of an MPI job; what it finds goes to a pickle of its own. Run by test_mpi.py.

Groups of the first one, two, three and four ranks run their cases one after the other; the others wait.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from exchange_cases import (
    MODELS,
    cases,
    check_large,
    check_rows,
    check_sums,
    check_vectors,
    evaluate_case,
    graph_of,
    parameter_gradients,
)
from mpi4py import MPI

from carryall import load
from carryall.errors import InputError
from carryall.exchange import Exchange, plan_from_ids
from carryall.exchange.mpi import MPITransport, ending_all
from carryall.exchange.transport import PeerError
from carryall.models import EagerPotential
from ranks import split


def group_results(transport: MPITransport, potentials: dict[str, Any], *, rows: bool) -> dict[str, Any]:
    """What this rank of the group finds."""
    found: dict[str, Any] = {}
    if rows:
        for seed in range(4):
            check_rows(transport, seed)
        check_vectors(transport)
        check_large(transport, 32)
        found["sums"] = check_sums(transport)
        share = split(graph_of("tilted"), [i % transport.size for i in range(8)], transport.rank)
        found["gradients"] = [gradient.numpy() for gradient in parameter_gradients(share.on(transport))]
    for case in cases():
        if case.size == transport.size:
            for name, potential in potentials.items():
                found[f"{name}, {case.name}"] = evaluate_case(case, potential, transport)
    return found


def refusals(transport: MPITransport) -> dict[str, str]:
    """What two ranks are told whose exchanges are not each other's."""
    other, found = 1 - transport.rank, {}

    def swap(sent: int, expected: int) -> str:
        bytes_of = {n: torch.zeros(n, dtype=torch.uint8) for n in (sent, expected)}
        try:
            transport.send_receive([(other, bytes_of[sent])], [(other, torch.zeros(expected, dtype=torch.uint8))])
        except PeerError as error:
            return str(error)
        return ""

    found["too short"] = swap(9, 12 if transport.rank else 9)
    found["too long"] = swap(9, 4 if transport.rank else 9)
    if transport.rank:
        # the other rank takes no part in this one, and takes its message for one of the next
        transport.send_receive([(other, torch.zeros(9, dtype=torch.uint8))], [])
        MPITransport.send_receive(transport, [], [])
    else:
        transport.send_receive([], [])
        try:
            transport.send_receive([], [(other, torch.zeros(9, dtype=torch.uint8))])
        except PeerError as error:
            found["crossed"] = str(error)
    exchange = Exchange(plan_from_ids(torch.tensor([transport.rank]), torch.tensor([other]), transport), transport)
    try:
        EagerPotential(MODELS["tangled"]())(graph_of("tilted").replace(exchange=exchange))
    except InputError as error:
        found["misfit"] = str(error)
    return found


def wait_for_all(world: MPI.Comm) -> None:
    """A barrier that leaves the processor to the others."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def main(folder: Path, *, rows: bool) -> None:
    """All groups."""
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    potentials: dict[str, Any] = {path.name: load(path) for path in sorted(folder.glob("*.pt[e2]"))}
    if rows:
        potentials |= {name: EagerPotential(make()) for name, make in MODELS.items()}
    found: dict[int, Any] = {}
    for size in range(1, world.size + 1):
        group = world.Split(int(world.rank < size))
        if world.rank < size:
            transport = MPITransport(group)
            found[size] = group_results(transport, potentials, rows=rows)
            if size == 2:
                found[size]["refusals"] = refusals(transport)
        wait_for_all(world)
        group.Free()
    (folder / f"{world.rank}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    with ending_all():
        main(Path(sys.argv[1]), rows=sys.argv[2] == "rows")
