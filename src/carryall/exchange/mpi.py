"""Ranks of MPI through mpi4py, for engines that `mpirun` starts; and how one rank's error ends them all."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from carryall.errors import CarryallError, InputError, MissingDependencyError
from carryall.exchange.transport import Messages, PeerError

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, its library is not
    raise MissingDependencyError(
        f"ranks of MPI need mpi4py and an MPI library ({str(error).splitlines()[0]}): pip install mpi4py mpich, both into the "
        "environment that runs this; mpi4py finds the library of its own environment only, or the one that MPI4PY_LIBMPI names"
    ) from error

_OWN = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, own: own.Free())
"""Under this key a communicator keeps the copy of itself that messages of carryall go through."""

SAID = 0.5
"""Seconds for a launcher to pass on what was printed, before it ends everything."""
_TAGS = 1 << 15  # every MPI allows so many
_INT_BYTES = 2**31 - 1


class MPITransport:
    """A communicator of mpi4py, MPI.COMM_WORLD when None; messages lie on the CPU. Making the first one of it is collective.

    It talks through a copy of the communicator, so that what an engine sends through the original can never be taken for an
    exchange. A message says which call it belongs to: ranks that make different exchanges get a PeerError, not wrong rows.
    """

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        self.comm = _own_copy(MPI.COMM_WORLD if comm is None else comm)
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self._calls = 0

    def device(self, device: torch.device) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def send_receive(self, sends: Messages, receives: Messages) -> None:
        """All at once; returns when all is there. PeerError for a message of another call or length."""
        self._calls += 1
        tag = self._calls % _TAGS
        if not sends and not receives:
            return
        arrays = [buffer.numpy() for _, buffer in receives]
        requests = [
            # any tag: a message of another call has to be noticed, not waited for
            self.comm.Irecv(array, peer, MPI.ANY_TAG)
            for (peer, _), array in zip(receives, arrays, strict=True)
        ]
        requests += [self.comm.Isend(_sendable(buffer), peer, tag) for peer, buffer in sends]
        statuses = [MPI.Status() for _ in requests]
        try:
            MPI.Request.Waitall(requests, statuses)
        except MPI.Exception as error:
            raise PeerError(f"rank {self.rank}: {_failed(receives, sends, statuses) or error}") from error
        for (peer, _), array, status in zip(receives, arrays, statuses, strict=False):
            if status.Get_tag() != tag or status.Get_count(MPI.BYTE) != array.nbytes:
                raise PeerError(
                    f"rank {self.rank} expected {array.nbytes} bytes of exchange {tag} from rank {peer} and got "
                    f"{status.Get_count(MPI.BYTE)} of exchange {status.Get_tag()}: every rank has to make the same exchanges"
                )

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the communicator, of numbers of any dtype."""
        # half precision, which MPI does not know, is summed in single
        narrow = values.dtype in (torch.float16, torch.bfloat16)
        sent = values.detach().to("cpu", torch.float32 if narrow else values.dtype).contiguous()
        total = torch.empty_like(sent)
        mine, found = sent.numpy(), total.numpy()
        if sent.is_floating_point() or sent.is_complex():
            # summed on one rank, so that no rank can round in another order
            self.comm.Reduce(mine, found, MPI.SUM, 0)
            self.comm.Bcast(found, 0)
        else:
            self.comm.Allreduce(mine, found, MPI.SUM)
        return total.to(values.device, values.dtype)

    def all_to_all(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Lengths first, then the vectors."""
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        lengths = np.empty_like(counts)
        self.comm.Alltoall(counts, lengths)
        found = torch.empty(int(lengths.sum()), dtype=torch.int64)
        sent = torch.cat(list(rows))
        self.comm.Alltoallv([sent.numpy(), counts], [found.numpy(), lengths])
        return list(found.split(lengths.tolist()))


def abort_all(comm: MPI.Comm | None, error: BaseException) -> NoReturn:
    """End every process of the job with exit code 1, after `carryall: rank R of P: <error>` on stderr.

    Python's own way out would wait for ever: ranks that did not fail still expect messages. Errors that are not carryall's own
    are printed with their traceback. Does not return; `comm` None is MPI.COMM_WORLD.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    text = str(error)
    if not isinstance(error, CarryallError):
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    print(f"carryall: rank {comm.Get_rank()} of {comm.Get_size()}: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(SAID)
    comm.Abort(1)
    raise SystemExit(1)  # never reached


@contextmanager
def ending_all(comm: MPI.Comm | None = None) -> Iterator[None]:
    """What is raised inside ends every rank, by `abort_all`; on a single rank it is raised as usual."""
    try:
        yield
    except BaseException as error:
        if (MPI.COMM_WORLD if comm is None else comm).Get_size() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        abort_all(comm, error)


def _own_copy(comm: MPI.Comm) -> MPI.Comm:
    """The copy that `comm` keeps for carryall, made by the first who asks; collective then."""
    own: Any = comm.Get_attr(_OWN)
    if own is None:
        own = comm.Dup()
        own.Set_errhandler(MPI.ERRORS_RETURN)
        comm.Set_attr(_OWN, own)
    return own


def _sendable(buffer: Tensor) -> np.ndarray[Any, Any]:
    if buffer.numel() > _INT_BYTES and MPI.VERSION < 4:
        raise InputError(
            f"a message of {buffer.numel()} bytes is more than this MPI can send ({_INT_BYTES} bytes before MPI 4): "
            "use an MPI library of version 4, or more ranks"
        )
    return buffer.numpy()


def _failed(receives: Messages, sends: Messages, statuses: Sequence[MPI.Status]) -> str:
    """The first message that MPI could not deliver, and why; empty when it does not say."""
    ways = [(peer, buffer, "from") for peer, buffer in receives] + [(peer, buffer, "to") for peer, buffer in sends]
    for (peer, buffer, way), status in zip(ways, statuses, strict=True):
        if (code := status.Get_error()) not in (MPI.SUCCESS, MPI.ERR_PENDING):
            reason = MPI.Get_error_string(code).splitlines()[0]
            return f"the exchange of {buffer.numel()} bytes {way} rank {peer} failed: {reason}"
    return ""
