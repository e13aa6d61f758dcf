"""Force training of one structure whose atoms are spread over ranks: every number is that of one process.

python parallel_model.py
torchrun --nproc-per-node 2 parallel_model.py
"""

from __future__ import annotations

import torch
from message_passing_model import MessagePassing

from carryall.data import AtomicData
from carryall.engines.check_parallel import check_parallel, split_graph
from carryall.engines.domain import joined
from carryall.exchange import sum_to_owners
from carryall.exchange.context import open_exchange
from carryall.graph import graph_from_structures
from carryall.models import EagerPotential, SuttonChen
from carryall.models.derivatives import evaluate_model

CUTOFF, STEPS = 4.0, 5


def alloy() -> AtomicData:
    """32 atoms in a box of two lattice constants."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    face = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
    places = (corners[:, None] + face).reshape(-1, 3) * 3.9
    numbers = [29 if k % 3 else 79 for k in range(32)]
    return AtomicData(places + 0.1 * torch.randn(32, 3, generator=generator), numbers, 7.8 * torch.eye(3))


def main() -> None:
    """Check the model, then train it."""
    structure = alloy()
    model = MessagePassing(("Cu", "Au"), CUTOFF)
    whole = graph_from_structures([structure], CUTOFF, model.type_map)
    labels = EagerPotential(SuttonChen(("Cu", "Au"), CUTOFF))(whole)["forces"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with joined() as transport:  # the ranks of torchrun, or one process
        if transport.size == 1:
            print(check_parallel(EagerPotential(model), structure, n_ranks=[1, 2]))
        # whichever atoms a rank owns, results are the same
        owner = [atom * transport.size // whole.n_atoms for atom in range(whole.n_atoms)]
        part = split_graph(whole, owner, transport.rank)
        graph = part.on(transport)
        for step in range(STEPS):
            here = open_exchange(graph)  # the exchanges of one call, and of its derivatives
            out = evaluate_model(model, here, create_graph=True)
            forces = sum_to_owners(out["forces"], here)
            loss = (forces - labels[part.local_ids]).square().sum() / whole.n_atoms
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():  # each rank has its own atoms' share of the gradient
                parameter.grad = transport.all_reduce(parameter.grad)
            optimizer.step()
            total = float(transport.all_reduce(loss.detach().reshape(1)))
            if transport.rank == 0:
                print(f"step {step}: loss {total:.12f} (eV/Å)²")


if __name__ == "__main__":
    main()
