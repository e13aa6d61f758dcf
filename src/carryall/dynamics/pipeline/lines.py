"""Rank 0's side of the connections: one line for each rank, and the thread in which the hub serves them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from carryall.dynamics.pipeline.channel import Channel
from carryall.dynamics.pipeline.hub import Hub
from carryall.dynamics.pipeline.meeting import LATE
from carryall.dynamics.pipeline.messages import Message


class Line:
    """The hub's end of a rank's channel, which may come late: what is sent before waits."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._before: list[Message] = []
        self._lock = threading.Lock()

    @property
    def channel(self) -> Channel | None:
        """None until it is there."""
        return self._channel

    @channel.setter
    def channel(self, value: Channel) -> None:
        with self._lock:
            self._channel = value
            for message in self._before:
                value.send(message)

    def send(self, message: Message) -> None:
        """Send now, or as soon as the rank is there."""
        with self._lock:
            if self._channel is None:
                self._before.append(message)
            else:
                self._channel.send(message)

    def silence(self) -> float:
        """Seconds since the rank gave a sign of life; 0 before it came."""
        return 0.0 if self._channel is None else self._channel.silence

    def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            self._channel.close()


def tell_late_ones(lines: Sequence[Line]) -> None:
    """Wait a little for ranks that are still connecting, so that they hear why the run has ended."""
    deadline = time.monotonic() + LATE
    while any(one.channel is None for one in lines) and time.monotonic() < deadline:
        time.sleep(0.02)


class Keeper:
    """The thread in which the hub serves."""

    def __init__(self, hub: Hub, show: Callable[..., None]) -> None:
        self.failure: BaseException | None = None
        self._hub, self._show = hub, show
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        try:
            self._hub.serve(self._show)
        except BaseException as error:
            self.failure = error
            self._hub.give_up(f"rank 0 could not keep the ledger: {type(error).__name__}: {error}")


def admitting(hub: Hub, lines: Sequence[Line]) -> Callable[[Connection], None]:
    """Takes a connection: its first message says which rank it is."""

    def admit(connection: Connection) -> None:
        rank: int | None = None

        def receive(message: Message) -> None:
            nonlocal rank
            if message.kind == "hello":
                rank = message.facts["rank"]
                lines[rank].channel = channel
            if rank is not None:
                hub.inbox.put((rank, message))

        channel = Channel(connection, receive)

    return admit
