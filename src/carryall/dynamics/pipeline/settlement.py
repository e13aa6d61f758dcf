"""The sinks of a pipeline and the ledger: results reach a sink first, and a crash between the two is healed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from carryall.data.batch import Batch
from carryall.dynamics.ledger import Ledger
from carryall.dynamics.sinks import DataSink, write_in_order
from carryall.dynamics.status import SYSTEM_ID
from carryall.errors import InputError

SinkOrOpener: TypeAlias = "DataSink | Callable[[], DataSink]"
"""A sink, or a function that opens one: called on rank 0 only, so that no two ranks open the same file."""
FACT = "sinks"
"""Fact of the ledger: how many systems each sink had when the ledger was last written."""
logger = logging.getLogger("carryall.dynamics")


class Sinks:
    """Takes results for as long as it is entered."""

    def __init__(self, sinks: Sequence[SinkOrOpener]) -> None:
        self._given = tuple(sinks)
        self._open: list[DataSink] = []
        self._stack = ExitStack()

    def __enter__(self) -> Sinks:
        for one in self._given:
            if isinstance(one, DataSink):
                self._open.append(one)
                continue
            if not callable(one):
                raise InputError(f"a sink must be a DataSink, or a function that opens one, got {one!r}")
            sink = one()
            self._stack.callback(sink.close)
            self._open.append(sink)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def write(self, batch: Batch) -> dict[str, Any]:
        """Write systems; SinkFullError, with nothing written, when they do not all fit. Returns what the ledger has to know."""
        if self._open:
            write_in_order(self._open, batch)
        return self.lengths()

    def unknown(self, ledger: Ledger) -> set[int]:
        """Ids of systems that a sink has got since the ledger was last written."""
        known, found = ledger.fact(FACT) or [], set()
        for place, sink in enumerate(self._open):
            before = known[place] if place < len(known) else 0
            if len(sink) < before:
                logger.warning("%r has %d systems, the ledger knows of %d that were written to it", sink, len(sink), before)
            elif len(sink) > before:
                found.update(sink.read().get(SYSTEM_ID)[before:].tolist())
        return found

    def lengths(self) -> dict[str, Any]:
        """How many systems each sink has, for the ledger."""
        return {FACT: [len(one) for one in self._open]} if self._open else {}
