"""A connection between two ranks that never blocks the caller, and that notices when the other side is gone or stopped.

gloo's own messages cannot serve here: a receive that is under way never says that it is complete, and a wait that times out
closes the connection for good, so that a rank could not go on with its steps while it waits for systems.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from carryall.dynamics.pipeline.messages import Message, decode, encode

PULSE = 2.0
"""Seconds without a message after which an empty one is sent, as a sign of life of the process."""
LAST_WORDS = 10.0
"""Seconds that closing waits for what was still to be sent."""


class Channel:
    """Sends and receives messages over a connection, each in a thread of its own.

    `receive(message)` is called in the reading thread with each message, and with `closed` once, as the last one.
    """

    def __init__(self, connection: Connection, receive: Callable[[Message], None]) -> None:
        self._connection, self._receive = connection, receive
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader.start()
        self._writer.start()

    def send(self, message: Message) -> None:
        """Send a message as soon as the other side takes it; to a side that is gone nothing is sent."""
        self._outgoing.put(encode(message))

    @property
    def silence(self) -> float:
        """Seconds since the other process gave a sign of life."""
        return time.monotonic() - self._heard

    def close(self) -> None:
        """Send what is still to be sent, and end the connection."""
        self._outgoing.put(None)
        self._writer.join(LAST_WORDS)
        # a close alone would not end the other thread's wait, nor tell the other side
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        self._reader.join(LAST_WORDS)
        self._connection.close()

    def _read(self) -> None:
        reason = "it was closed"
        while True:
            try:
                data = self._connection.recv_bytes()
                self._heard = time.monotonic()
                if data:
                    self._receive(decode(data))
            except EOFError:
                break
            except (OSError, ValueError) as error:
                reason = str(error)
                break
        self._receive(Message("closed", {"reason": reason}))

    def _write(self) -> None:
        while True:
            try:
                data = self._outgoing.get(timeout=PULSE)
            except queue.Empty:
                data = b""
            if data is None:
                return
            try:
                self._connection.send_bytes(data)
            except OSError:
                # the reading thread says so
                return
