"""How the ranks of a pipeline find each other: torch.distributed tells where rank 0 listens, TCP carries the messages."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from carryall.dynamics.stopping import StopRequested
from carryall.exchange.transport import PeerError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
GATHERING = timedelta(minutes=10)
"""How long ranks may need to start: the first ones wait for the last."""
LATE = 3.0
"""Seconds that a rank may still come in, once rank 0 has ended the run."""


@dataclass(frozen=True)
class World:
    """Which rank this process is."""

    rank: int = 0
    size: int = 1

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def world() -> Iterator[World]:
    """The ranks that torchrun started, or this process alone.

    A process group that is there already is used and left as it is; else one is made, for the time of the run.
    """
    import torch.distributed as dist

    if not dist.is_available():
        yield World()
    elif dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
    elif "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield World()
    else:
        store, rank, size = next(dist.rendezvous("env://", timeout=GATHERING))
        # torchrun's store outlives groups: a second one would read the addresses of the first
        count = store.add(f"carryall/pipeline/rank/{rank}", 1)
        own = dist.PrefixStore(f"carryall/pipeline/{count}", store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=GATHERING)
        try:
            yield World(rank, size)
        finally:
            dist.destroy_process_group()


class Reception:
    """Rank 0's door: takes the connections of the others, in a thread of its own."""

    def __init__(self, n_expected: int, welcome: Callable[[Connection], None]) -> None:
        """welcome: called with each connection that knows the key."""
        self._key = secrets.token_bytes(32)
        inside = os.environ.get("MASTER_ADDR", "localhost") in LOOPBACK
        self._listener = Listener(("127.0.0.1" if inside else "", 0), backlog=n_expected, authkey=self._key)
        self._welcome, self._closed = welcome, False
        self._thread = threading.Thread(target=self._take, args=(n_expected,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[int, str]:
        """Port and key, for `knock`."""
        return self._listener.address[1], self._key.hex()

    def close(self) -> None:
        """No longer take connections."""
        self._closed = True
        if self._thread.is_alive():
            # a wait for a connection ends with a connection
            with suppress(OSError, EOFError, AuthenticationError):
                Client(self._listener.address, authkey=self._key).close()
            self._thread.join(1.0)
        self._listener.close()

    def _take(self, n_expected: int) -> None:
        taken = 0
        while taken < n_expected:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, OSError):
                if self._closed:
                    return
                continue
            if self._closed:
                connection.close()
                return
            taken += 1
            self._welcome(connection)


def knock(address: tuple[int, str], rank: int, timeout: float, requested: Callable[[], bool]) -> Connection:
    """The connection of a rank to rank 0; PeerError when there is none within `timeout` s, StopRequested when asked to stop."""
    port, key = address[0], bytes.fromhex(address[1])
    host = os.environ.get("MASTER_ADDR", "localhost")
    host = "127.0.0.1" if host in LOOPBACK else host
    began = time.monotonic()
    while True:
        try:
            return Client((host, port), authkey=key)
        except (OSError, EOFError, AuthenticationError) as error:
            if time.monotonic() - began > timeout:
                raise PeerError(
                    f"rank {rank} could not reach rank 0 at {host}:{port} for {timeout:.0f} s ({error}): rank 0 has ended, or "
                    "the network lets no connection pass between these machines"
                ) from error
            if requested():
                raise StopRequested from error
            time.sleep(0.1)
