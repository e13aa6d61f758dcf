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
        return self._lengths()

    def unknown(self, ledger: Ledger) -> tuple[Batch, dict[str, Any]] | None:
        """Systems that reached a sink but not the ledger, with what the ledger has to know then; None when there are none."""
        known = ledger.fact(FACT) or []
        found: list[Batch] = []
        for place, sink in enumerate(self._open):
            before = known[place] if place < len(known) else 0
            if len(sink) < before:
                logger.warning("%r has %d systems, the ledger knows of %d that were written to it", sink, len(sink), before)
            elif len(sink) > before:
                batch = sink.read()
                found.append(batch.index_select(slice(before, None)))
        open_ = [_on_their_way(one, ledger) for one in found]
        left = [one for one in open_ if one is not None]
        if not left:
            return None
        batch = left[0] if len(left) == 1 else Batch.joined([(one, None) for one in left])
        return batch, self._lengths()

    def _lengths(self) -> dict[str, Any]:
        return {FACT: [len(one) for one in self._open]} if self._open else {}


def _on_their_way(batch: Batch, ledger: Ledger) -> Batch | None:
    """Systems of a sink that the ledger has on their way; others are of another run."""
    ids = batch.get(SYSTEM_ID).tolist()
    rows = [place for place, index in enumerate(ids) if ledger.is_on_its_way(index)]
    return batch.index_select(rows) if rows else None
