"""How far a run is, from its folder: read while it writes, after it was killed, or when it is done."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from carryall.dynamics.blobs import batch_from_bytes
from carryall.dynamics.ledger import FINISHED, FORMAT, LEDGER, LOCK
from carryall.dynamics.pipeline.books import STAGE_COUNTS, stage_counts
from carryall.dynamics.pipeline.report import LIVE
from carryall.errors import InputError

RUNNING, DONE, STOPPED = "running", "finished", "stopped"
TRIES = 5
"""The file may be busy for a moment when a run begins or ends."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Failure:
    """A kind of failure: reasons that differ in their numbers count as one."""

    reason: str
    """Of the first input that failed so."""
    count: int
    index: int
    """Of that input."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is."""

    kind: str
    """"pipeline" or "relax"."""
    state: str
    """"running", "finished", or "stopped" with inputs left."""
    inputs: int | None
    """None where nobody knows yet."""
    finished: int
    """Inputs that are done and did not fail."""
    failed: int
    outcomes: Mapping[str, int]
    stages: tuple[Mapping[str, Any], ...]
    """Of each stage name, waiting (None: nobody knows), in_flight, done, failed, and rate in 1/s while it runs."""
    seconds: float | None
    """Of the last start of a pipeline until its last update."""
    seconds_left: float | None
    updated: float | None
    """Seconds since 1970, of the last word of the run."""
    failures: tuple[Failure, ...]
    """The most frequent first."""

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        rest = {name: value for name, value in vars(self).items() if name not in ("stages", "failures", "outcomes")}
        return {
            **rest,
            "outcomes": dict(self.outcomes),
            "stages": [dict(one) for one in self.stages],
            "failures": [vars(one) for one in self.failures],
        }


def folder_status(folder: str | Path) -> RunStatus:
    """The status of the run in a folder, of `DistributedPipeline.run` or of `relax`; nothing is written, nothing waits.

    InputError for a folder without a run.
    """
    path = Path(folder) / LEDGER
    if not path.is_file():
        raise InputError(f"{folder} holds no run: there is no {LEDGER}")
    running = is_held(Path(folder) / LOCK)
    return _tried(lambda: _read(path, running), path)


def is_held(lock: Path) -> bool:
    """Whether a process works on the run. (On a network file system without locks over machines: one on this machine.)"""
    try:
        import fcntl
    except ImportError:  # where there is no flock, a run that is new counts as one that goes on
        return lock.is_file() and time.time() - lock.parent.joinpath(LEDGER).stat().st_mtime < 60
    try:
        with lock.open("rb") as file:
            # shared and at once given back: two who look do not hinder each other
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _tried(read: Callable[[], Value], path: Path) -> Value:
    for attempt in range(TRIES):
        try:
            return read()
        except sqlite3.OperationalError as error:
            if attempt == TRIES - 1:
                raise InputError(f"{path} cannot be read: {error}") from None
            time.sleep(0.2)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} is not a ledger of carryall: {error}") from None
    raise AssertionError


def _read(path: Path, running: bool) -> RunStatus:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)) as database:
        database.execute("BEGIN")  # all of it at one moment
        facts = {key: json.loads(value) for key, value in database.execute("SELECT key, value FROM run")}
        if facts.get("format") != FORMAT:
            raise InputError(f"{path} is not a ledger of carryall, or its run has not begun")
        query = "SELECT outcome, count(*) FROM systems WHERE state = ? GROUP BY outcome"
        outcomes = dict(database.execute(query, (FINISHED,)).fetchall())
        failures = _failures(database)
        if "stages" in facts["settings"]:
            return _pipeline(database, facts, outcomes, failures, running)
        return _relaxation(database, facts, outcomes, failures, running, path)


def _pipeline(
    database: sqlite3.Connection,
    facts: Mapping[str, Any],
    outcomes: Mapping[str, int],
    failures: tuple[Failure, ...],
    running: bool,
) -> RunStatus:
    names, live = [one["name"] for one in facts["settings"]["stages"]], facts.get(LIVE)
    failed, passed = stage_counts(database.execute(STAGE_COUNTS), len(names))
    here = dict(database.execute("SELECT stage, count(*) FROM travelling GROUP BY 1").fetchall())
    done = sum(outcomes.values())
    inputs = _n_inputs(facts, live)
    if inputs is not None:
        inputs = max(inputs, done + sum(here.values()))
    unfinished = sum(here.values()) or inputs is None or inputs > done
    state = RUNNING if running else STOPPED if unfinished else DONE
    rows = []
    for stage, name in enumerate(names):
        told = live["stages"][stage] if live else {}
        flying = min(told.get("in_flight", 0), here.get(stage, 0)) if running else 0
        waiting = here.get(stage, 0) - flying
        if stage == 0:
            waiting = None if inputs is None else max(0, inputs - passed[0] - failed[0] - flying)
        rate = told.get("rate", 0.0) if running else 0.0
        counts = {"in_flight": flying, "done": passed[stage], "failed": failed[stage]}
        rows.append({"name": name, "waiting": waiting, **counts, "rate": rate})
    bad = outcomes.get("failed", 0)
    seconds, left = (live["seconds"], live["seconds_left"]) if live else (None, None)
    updated = live["time"] if live else facts.get("began")
    left = left if running else None
    return RunStatus("pipeline", state, inputs, done - bad, bad, outcomes, tuple(rows), seconds, left, updated, failures)


def _n_inputs(facts: Mapping[str, Any], live: Mapping[str, Any] | None) -> int | None:
    """How many inputs a pipeline has: as it said when it ended, or last, for a resumed run may have more."""
    if live is None or live["time"] <= facts.get("ended", 0.0):
        return facts.get("n_inputs")
    first = live["stages"][0]
    if first["waiting"] is None:
        return None
    return int(first["waiting"] + first["in_flight"] + first["done"] + first["failed"])


def _relaxation(
    database: sqlite3.Connection,
    facts: Mapping[str, Any],
    outcomes: Mapping[str, int],
    failures: tuple[Failure, ...],
    running: bool,
    path: Path,
) -> RunStatus:
    bad, done = outcomes.get("failed", 0), sum(outcomes.values())
    saved = database.execute("SELECT batch FROM in_flight WHERE part = 0").fetchone()
    ids = [] if saved is None else batch_from_bytes(saved[0])[1]["ids"]
    query = "SELECT count(*) FROM systems WHERE id IN (SELECT value FROM json_each(?))"
    flying = len(ids) - database.execute(query, (json.dumps(ids),)).fetchone()[0]
    known = facts.get("n_inputs")
    inputs = known if known is not None and known >= done + flying else None
    ended = inputs is not None and inputs == done and not running
    counts = {"in_flight": flying, "done": done - bad, "failed": bad}
    row = {"name": "relax", "waiting": 0 if ended else None, **counts, "rate": 0.0}
    files = [path, path.with_name(f"{path.name}-wal")]
    updated = max(one.stat().st_mtime for one in files if one.exists())
    state = RUNNING if running else DONE if ended else STOPPED
    return RunStatus("relax", state, inputs, done - bad, bad, outcomes, (row,), None, None, updated, failures)


def _failures(database: sqlite3.Connection) -> tuple[Failure, ...]:
    found: dict[str, Failure] = {}
    query = "SELECT reason, count(*), min(id) FROM systems WHERE outcome = 'failed' GROUP BY reason ORDER BY min(id)"
    for reason, count, index in database.execute(query):
        alike = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", str(reason))
        first = found.get(alike, Failure(str(reason), 0, index))
        found[alike] = Failure(first.reason, first.count + count, first.index)
    return tuple(sorted(found.values(), key=lambda one: (-one.count, one.index)))
