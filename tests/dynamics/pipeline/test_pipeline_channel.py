"""A channel keeps the order, sends what is still to be sent, and tells when the other side is gone or silent."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from carryall.dynamics.pipeline import channel as module
from carryall.dynamics.pipeline.channel import Channel
from carryall.dynamics.pipeline.lines import Line
from carryall.dynamics.pipeline.meeting import Reception, knock
from carryall.dynamics.pipeline.messages import Message
from carryall.dynamics.stopping import StopRequested
from carryall.exchange.transport import PeerError

PATIENCE = 20.0


def opened(connection: Connection) -> tuple[Channel, queue.Queue[Message]]:
    mail: queue.Queue[Message] = queue.Queue()
    return Channel(connection, mail.put), mail


def test_messages_come_in_order_both_ways_and_closing_sends_the_rest() -> None:
    near, far = Pipe()
    one, mail_one = opened(near)
    other, mail_other = opened(far)
    big = os.urandom(3_000_000)
    for number in range(200):
        one.send(Message("there", {"number": number}, [b"x" * number]))
        other.send(Message("back", {"number": number}))
    one.send(Message("big", {}, [big]))
    one.close()
    there = [mail_other.get(timeout=PATIENCE) for _ in range(202)]
    back = [mail_one.get(timeout=PATIENCE) for _ in range(201)]
    other.close()
    assert [one.facts["number"] for one in there[:200]] == list(range(200))
    assert [len(one.blobs[0]) for one in there[:200]] == list(range(200))
    assert there[200].blobs == [big]
    assert [one.kind for one in (there[201], back[200])] == ["closed", "closed"]
    assert [one.facts["number"] for one in back[:200]] == list(range(200))
    assert mail_other.empty()
    assert mail_one.empty()
    other.send(Message("late"))  # to a side that is gone nothing is sent, and nothing is raised


def test_a_side_with_nothing_to_say_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PULSE", 0.05)
    near, far = Pipe()
    (one, mail), (other, _) = opened(near), opened(far)
    threading.Event().wait(1.0)
    assert one.silence < 0.9
    assert mail.empty()  # they are no messages
    one.close()
    other.close()


SPEAKER = """
import sys, time
from multiprocessing.connection import Connection
end = Connection(int(sys.argv[1]))
while True:
    end.send_bytes(b"")
    time.sleep(0.05)
"""


def test_a_side_that_is_stopped_is_silent_and_one_that_is_killed_is_closed() -> None:
    near, far = Pipe()
    process = subprocess.Popen([sys.executable, "-S", "-c", SPEAKER, str(far.fileno())], pass_fds=[far.fileno()])
    far.close()
    channel, mail = opened(near)
    try:
        began = time.monotonic()
        while time.monotonic() - began <= channel.silence + 1.0:
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        while channel.silence < 1.5:
            assert time.monotonic() - began < 3 * PATIENCE
            time.sleep(0.01)
        assert mail.empty()
        for _ in range(3):
            channel.send(Message("to one that is stopped", {}, [bytes(3_000_000)]))  # does not block
        process.kill()
        assert mail.get(timeout=PATIENCE).kind == "closed"
        assert mail.empty()
    finally:
        process.kill()
        process.wait(PATIENCE)
        channel.close()


def test_a_line_keeps_what_is_said_before_the_rank_is_there() -> None:
    line = Line()
    assert line.silence() == 0.0
    line.send(Message("first"))
    line.send(Message("second"))
    near, far = Pipe()
    channel, _ = opened(near)
    _, mail = opened(far)
    line.channel = channel
    line.send(Message("third"))
    assert [mail.get(timeout=PATIENCE).kind for _ in range(3)] == ["first", "second", "third"]
    line.close()
    assert mail.get(timeout=PATIENCE).kind == "closed"


def never() -> bool:
    return False


def test_only_who_knows_the_key_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    came: queue.Queue[Connection] = queue.Queue()
    reception = Reception(1, came.put)
    port, key = reception.address
    with pytest.raises(PeerError, match=r"rank 3 could not reach rank 0 at 127.0.0.1"):
        knock((port, b"another key".hex()), 3, 0.3, never)
    connection = knock((port, key), 1, 5.0, never)
    came.get(timeout=PATIENCE).send_bytes(b"welcome")
    assert connection.recv_bytes() == b"welcome"
    connection.close()
    reception.close()
    with pytest.raises(PeerError, match="rank 1 could not reach rank 0"):
        knock((port, key), 1, 0.3, never)


def test_who_knocks_can_be_asked_to_stop() -> None:
    reception = Reception(1, lambda connection: None)
    address = reception.address
    reception.close()
    with pytest.raises(StopRequested):
        knock(address, 1, 1e9, lambda: True)


def test_a_reception_to_which_nobody_comes_can_be_closed() -> None:
    reception = Reception(2, lambda connection: None)
    reception.close()
