"""Ctrl-C and SIGTERM as a wish that is granted between two steps, so that nothing is left half-done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Inside, the first signal only makes the value of the call true; a second one interrupts at once.

    Outside the main thread, where Python delivers no signals, the call is always false.
    """
    wanted = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal wanted
        if wanted:
            raise KeyboardInterrupt
        wanted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {one: signal.signal(one, on_signal) for one in SIGNALS}
    try:
        yield lambda: wanted
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
