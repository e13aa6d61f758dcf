"""What became of every input of a run, in one SQLite file: a run that is killed goes on from it and loses nothing.

`ledger.sqlite` has a row for each input that is done, or in a stage of a pipeline (`systems`), the settings of the run (`run`),
the batches that were on their way when they were last saved (`in_flight`), and the state of systems that came into a stage of
a pipeline (`travelling`). It is written in transactions, so that it is whole whenever the process ends.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import filelock

from carryall.data.batch import Batch
from carryall.dynamics.blobs import batch_from_bytes, batch_to_bytes, structure_from_bytes, structure_to_bytes
from carryall.dynamics.results import RelaxResult
from carryall.errors import CarryallError, InputError

LEDGER, LOCK = "ledger.sqlite", "ledger.lock"
FORMAT, VERSION = "carryall-ledger", 1
FINISHED, IN_STAGE = "finished", "in_stage"
"""States of an input: done, whatever its outcome; and in the pipeline's stage that its row names. Others wait."""
WORK = ("systems", "in_flight")
"""Tables that are empty before there is any work."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS systems (
    id INTEGER PRIMARY KEY, state TEXT NOT NULL, stage INTEGER, hash BLOB, source TEXT, frame INTEGER,
    outcome TEXT, reason TEXT, steps INTEGER, energy REAL, fmax REAL, structure BLOB);
CREATE TABLE IF NOT EXISTS travelling (
    id INTEGER PRIMARY KEY, stage INTEGER NOT NULL, fresh INTEGER NOT NULL, primed INTEGER NOT NULL, n_atoms INTEGER NOT NULL,
    state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS in_flight (part INTEGER PRIMARY KEY, step_count INTEGER NOT NULL, batch BLOB NOT NULL);
"""
COLUMNS = "id, outcome, reason, steps, energy, fmax, structure, source, frame"


@dataclass(frozen=True, eq=False)
class InFlight:
    """The systems that were on their way when the ledger was last told."""

    batch: Batch
    step_count: int
    """Steps of the engine."""
    forces_current: bool
    """Whether the batch's forces are those of its positions."""
    originals: dict[int, bytes]
    """The inputs by index, as `structure_to_bytes` gives them."""
    hashes: dict[int, bytes]


class Ledger:
    """The ledger of a run folder; one process at a time has it open."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], resume: bool = False) -> None:
        """Begin a ledger with these settings (values that JSON has), or go on with one that has the same.

        InputError: the folder holds a run already (without `resume`), its settings differ, another process has it open.
        """
        folder = Path(folder)
        self.path = folder / LEDGER
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"{folder}: another process works on this run: wait for it, or write elsewhere") from None
        self._database: sqlite3.Connection | None = None
        try:
            self._database = _connected(self.path)
            self._begin(json.loads(json.dumps(dict(settings))), resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, settings: dict[str, Any], resume: bool) -> None:
        if not resume:
            if self._has_work():
                raise InputError(f"{self.path.parent} holds a run already: go on with resume, or write elsewhere")
            with self.transaction() as database:
                database.execute("DELETE FROM run")
        known = self.fact("format")
        if known is None:
            with self.transaction() as database:
                for key, value in {"format": FORMAT, "version": VERSION, "settings": settings, "began": time.time()}.items():
                    database.execute("INSERT INTO run VALUES (?, ?)", (key, json.dumps(value)))
            return
        if known != FORMAT or self.fact("version") > VERSION:
            raise InputError(f"{self.path} is not a ledger of carryall (version {VERSION} or older)")
        for name, (then, now) in differing(self.fact("settings"), settings).items():
            raise InputError(
                f"{self.path.parent} was begun with {name} = {then}, this run has {name} = {now}: "
                "give the same, or write elsewhere"
            )

    # -- results

    def add(self, results: Iterable[RelaxResult], hashes: Mapping[int, bytes]) -> None:
        """Write what became of inputs, all or none of them; CarryallError when the file cannot be written."""
        rows = [
            (
                one.index, FINISHED, hashes.get(one.index), one.source, one.frame, one.outcome, one.reason, one.steps,
                one.energy, one.fmax, None if one.structure is None else structure_to_bytes(one.structure),
            )
            for one in results
        ]  # fmt: skip
        names = "id, state, hash, source, frame, outcome, reason, steps, energy, fmax, structure"
        with self.transaction() as database:
            database.executemany(f"INSERT INTO systems ({names}) VALUES ({', '.join('?' * 11)})", rows)

    def __contains__(self, index: object) -> bool:
        return self.rows("SELECT 1 FROM systems WHERE id = ? AND state = ?", index, FINISHED) != []

    def __len__(self) -> int:
        return int(self.rows("SELECT count(*) FROM systems WHERE state = ?", FINISHED)[0][0])

    def hash_of(self, index: int) -> bytes | None:
        """The content hash of a finished input; None when it is not finished, or was never read."""
        found = self.rows("SELECT hash FROM systems WHERE id = ?", index)
        return found[0][0] if found else None

    def result(self, index: int) -> RelaxResult | None:
        """What became of an input; None while it is not done."""
        found = self.rows(f"SELECT {COLUMNS} FROM systems WHERE id = ? AND state = ?", index, FINISHED)
        return _result(found[0]) if found else None

    def results(self) -> Iterator[RelaxResult]:
        """What became of all inputs that are done, in input order, a few at a time."""
        last = -1
        query = f"SELECT {COLUMNS} FROM systems WHERE id > ? AND state = ? ORDER BY id LIMIT 100"
        while rows := self.rows(query, last, FINISHED):
            yield from map(_result, rows)
            last = rows[-1][0]

    # -- systems on their way

    def save_in_flight(self, state: InFlight) -> None:
        """Keep the batch on its way, in the place of the one kept before."""
        facts = {
            "forces_current": state.forces_current,
            "ids": list(state.originals),
            "hashes": [state.hashes[one].hex() for one in state.originals],
            "lengths": [len(one) for one in state.originals.values()],
        }
        blob = b"".join([batch_to_bytes(state.batch, facts), *state.originals.values()])
        with self.transaction() as database:
            database.execute("INSERT OR REPLACE INTO in_flight VALUES (0, ?, ?)", (state.step_count, blob))

    def in_flight(self) -> InFlight | None:
        """The systems that were on their way, those that are done since left out; None when there is none."""
        found = self.rows("SELECT step_count, batch FROM in_flight WHERE part = 0")
        if not found:
            return None
        step_count, blob = found[0]
        batch, facts = batch_from_bytes(blob)
        ids, originals, end = facts["ids"], {}, len(blob)
        for index, length in zip(reversed(ids), reversed(facts["lengths"]), strict=True):
            originals[index] = blob[end - length : end]
            end -= length
        hashes = {index: bytes.fromhex(one) for index, one in zip(ids, facts["hashes"], strict=True)}
        names = batch.get("system_id").tolist()
        left = [place for place, index in enumerate(names) if index not in self]
        if not left:
            return None
        kept = {names[place] for place in left}
        return InFlight(
            batch if len(left) == len(names) else batch.index_select(left),
            step_count,
            facts["forces_current"],
            {index: one for index, one in originals.items() if index in kept},
            {index: one for index, one in hashes.items() if index in kept},
        )

    def clear_in_flight(self) -> None:
        """Forget the batch: nothing is on its way."""
        with self.transaction() as database:
            database.execute("DELETE FROM in_flight")

    # -- facts of the run

    def fact(self, key: str) -> Any:
        """A fact of the run, such as "settings"; None when it is unknown."""
        found = self.rows("SELECT value FROM run WHERE key = ?", key)
        return json.loads(found[0][0]) if found else None

    def set_fact(self, key: str, value: Any) -> None:
        """Keep a fact of the run, a value that JSON has."""
        with self.transaction() as database:
            self.set_facts(database, {key: value})

    @staticmethod
    def set_facts(database: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
        """Keep facts of the run within a transaction that is under way."""
        rows = [(key, json.dumps(value)) for key, value in facts.items()]
        database.executemany("INSERT OR REPLACE INTO run VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file; others may open it."""
        if self._database is not None:
            # the journal goes into the file, so that the file can be copied, and read where nothing may be written
            with suppress(sqlite3.OperationalError):
                self._database.execute("PRAGMA journal_mode=DELETE")
            self._database.close()
            self._database = None
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the file

    def _has_work(self) -> bool:
        return any(self.rows(f"SELECT 1 FROM {table} LIMIT 1") for table in WORK)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        assert self._database is not None, "the ledger is closed"
        return self._database.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, or nothing; CarryallError when the file cannot be written."""
        assert self._database is not None, "the ledger is closed"
        try:
            with self._database:
                yield self._database
        except sqlite3.OperationalError as error:
            raise CarryallError(f"{self.path} cannot be written: {error}") from error


class LedgerResults(Sequence[RelaxResult]):
    """What became of every input, read from the run folder when asked for; in input order."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LEDGER
        if not self.path.exists():
            raise InputError(f"{folder} holds no run: there is no {LEDGER}")
        with self._opened() as database:
            (self._length,) = database.execute("SELECT count(*) FROM systems WHERE state = ?", (FINISHED,)).fetchone()

    def __len__(self) -> int:
        return int(self._length)

    @overload
    def __getitem__(self, index: int) -> RelaxResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[RelaxResult]: ...
    def __getitem__(self, index: int | slice) -> RelaxResult | list[RelaxResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there is no result {index}: the run has {len(self)}")
        return next(self._read(place))

    def __iter__(self) -> Iterator[RelaxResult]:
        return self._read(0)

    def outcomes(self) -> dict[str, int]:
        """How many inputs have each outcome."""
        query = "SELECT outcome, count(*) FROM systems WHERE state = ? GROUP BY outcome"
        with self._opened() as database:
            return dict(database.execute(query, (FINISHED,)).fetchall())

    def _read(self, first: int) -> Iterator[RelaxResult]:
        # Inputs are numbered without gaps, so that a place is an id once all are done.
        query = f"SELECT {COLUMNS} FROM systems WHERE state = ? ORDER BY id LIMIT -1 OFFSET ?"
        with self._opened() as database:
            for row in database.execute(query, (FINISHED, first)):
                yield _result(row)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            yield database


def holds_run(folder: str | Path) -> bool:
    """Whether a folder has a ledger in which there is some work."""
    path = Path(folder) / LEDGER
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return any(database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchall() for table in WORK)
    except sqlite3.DatabaseError:
        return True


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: name -> (then, now), the first first; nested ones by their path, such as `optimizer.dt`."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*now, *(name for name in then if name not in now)]:
        a, b = then.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= {f"{name}.{inner}": pair for inner, pair in differing(a, b).items()}
        elif a != b:
            found[name] = (a, b)
    return found


def _connected(path: Path) -> sqlite3.Connection:
    # one thread at a time uses it: of a pipeline the one that keeps the books
    database = sqlite3.connect(path, timeout=60.0, check_same_thread=False)
    try:
        # Where a file system has no shared memory the journal stays the classical one: slower, as safe.
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(SCHEMA)
    except sqlite3.DatabaseError as error:
        database.close()
        raise InputError(f"{path} cannot be used as a ledger: {error}") from None
    return database


def _result(row: Sequence[Any]) -> RelaxResult:
    index, outcome, reason, steps, energy, fmax, structure, source, frame = row
    data = None if structure is None else structure_from_bytes(structure)
    return RelaxResult(index, outcome, reason, steps, energy, fmax, data, source, frame)
