"""One rank of a job that makes exchanges until rank 1 fails, in the way that it is told. Run by test_faults.py."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch

from carryall.errors import InputError
from carryall.exchange import Exchange, Transport, plan_from_ids


def run_steps(transport: Transport, case: str, folder: Path) -> None:
    """Each rank sends a row to the one before; an engine would look at what it gets like this."""
    rank, after = transport.rank, (transport.rank + 1) % transport.size
    exchange = Exchange(plan_from_ids(torch.tensor([rank]), torch.tensor([after]), transport), transport)
    for step in itertools.count():
        rows = torch.ones(1, 3, dtype=torch.float64)
        if step == 5 and rank == 1:
            (folder / "failed").write_text(str(time.time()))
            if case == "raise":
                raise InputError("atom 7 has no type")
            if case == "bug":
                raise KeyError("atom 7")
            if case == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            rows[0, 1] = torch.nan
        if not bool(exchange.forward(rows).isfinite().all()):
            raise InputError(f"features of atom {after} are not finite at step {step}")


def main(kind: str, case: str, folder: Path) -> None:
    """Under mpirun or torchrun."""
    if kind == "mpi":
        from carryall.exchange.mpi import MPITransport, ending_all

        with ending_all():
            run_steps(MPITransport(), case, folder)
        return
    import torch.distributed as dist

    from carryall.exchange.distributed import DistributedTransport

    dist.init_process_group("gloo")
    run_steps(DistributedTransport(), case, folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
