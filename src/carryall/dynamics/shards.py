"""A run in shards of consecutive inputs, each with a folder and a ledger of its own, that become one ledger at the end.

`out/shards/plan.json` says how the inputs are divided, `out/shards/00007/` is the run of a shard, and its `done.json` is there
when every input of it has a result. Whoever starts shards (`carryall.engines.dask`, a job array) calls `run_shard` for each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from carryall.dynamics.ledger import FINISHED, LEDGER, LOCK, Ledger, LedgerResults, differing, holds_run
from carryall.dynamics.results import FINISHED_STRUCTURES, RESULTS, export
from carryall.dynamics.structure_files import FilePart, MeasuredFile, divided_files
from carryall.dynamics.structures import each
from carryall.errors import CarryallError, InputError

log = logging.getLogger(__name__)

SHARDS, PLAN, SETTINGS, DONE, TASK_LOCK = "shards", "plan.json", "settings.json", "done.json", "task.lock"
MERGED, MERGING = "merged", ".merging"
"""Fact of a ledger that was made of shards; folder in which it is made."""
ROWS = "id, state, stage, hash, source, frame, outcome, reason, steps, energy, fmax, structure"

Run = Callable[..., Any]
"""`run(structures, out=folder, resume=True)`, such as `functools.partial(relax, potential=...)` or `pipeline.run`."""


@dataclass(frozen=True, eq=False)
class Range:
    """Consecutive items of an indexed data set, read when they are asked for."""

    dataset: Any
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        return self.dataset[self.first + place]


@dataclass(frozen=True, eq=False)
class Shard:
    """Inputs `first_index` to `first_index + n_inputs - 1` of a run; `relax` and pipelines take it as their structures."""

    number: int
    first_index: int
    """`relax` and pipelines number its inputs from here on, so that noise, settings and results go by the place among all."""
    n_inputs: int
    parts: tuple[Any, ...]
    """Parts of files, of a list or of a data set."""

    def __len__(self) -> int:
        return self.n_inputs

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            yield from each(part)

    @property
    def content(self) -> str | None:
        """What tells shards of other files apart; None for a data set."""
        files = [(Path(one.name).name, one.first, one.count) for one in self.parts if isinstance(one, FilePart)]
        return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest() if files else None


@dataclass(frozen=True)
class Plan:
    """How a run is divided."""

    n_inputs: int
    shard_size: int

    @property
    def n_shards(self) -> int:
        """The last one may have fewer inputs than the others."""
        return -(-self.n_inputs // self.shard_size)

    def bounds(self, number: int) -> tuple[int, int]:
        """First input of a shard, and the number of its inputs."""
        first = number * self.shard_size
        return first, min(self.shard_size, self.n_inputs - first)


# -- division


def n_inputs_of(structures: Any) -> int:
    """How many inputs there are; InputError for what cannot be divided without being read."""
    if _are_files(structures):
        return sum(one.n_inputs for one in structures)
    indexed = hasattr(structures, "__len__") and hasattr(structures, "__getitem__")
    if not indexed or isinstance(structures, (str, bytes, Mapping)) or hasattr(structures, "get_atomic_numbers"):
        raise InputError(
            f"shards are made of files, or of a data set with len() and [i], got {type(structures).__name__}: give a list"
        )
    return len(structures)


def divided(structures: Any, shard_size: int) -> Iterator[Shard]:
    """Shards of an indexed data set (`len()` and `[i]`), or of measured files; nothing is read."""
    plan = Plan(n_inputs_of(structures), _checked_size(shard_size))
    parts_of_files = divided_files(structures, shard_size) if _are_files(structures) else None
    for number in range(plan.n_shards):
        first, count = plan.bounds(number)
        if parts_of_files is not None:
            yield Shard(number, first, count, next(parts_of_files))
        elif isinstance(structures, (list, tuple)):
            yield Shard(number, first, count, (structures[first : first + count],))  # a worker gets its own structures only
        else:
            yield Shard(number, first, count, (Range(structures, first, count),))


def _are_files(structures: Any) -> bool:
    return isinstance(structures, (list, tuple)) and bool(structures) and isinstance(structures[0], MeasuredFile)


def begin(out: str | Path, n_inputs: int, shard_size: int, resume: bool) -> Plan:
    """Write or check the plan of a run.

    InputError: no inputs; the folder holds another run, shards without `resume`, or shards of another size or of more inputs.
    """
    if not n_inputs:
        raise InputError("no structures: give at least one")
    folder, plan = Path(out) / SHARDS, Plan(n_inputs, _checked_size(shard_size))
    if not (folder / PLAN).exists():
        if holds_run(out):
            raise InputError(f"{out} holds a run without shards already: write elsewhere")
    else:
        before = plan_of(out)
        if not resume:
            raise InputError(f"{out} holds shards of a run already: go on with resume=True, or write elsewhere")
        if before.shard_size != shard_size:
            raise InputError(f"{out} was divided with shard_size={before.shard_size}, not {shard_size}: give the same")
        if before.n_inputs > n_inputs:
            raise InputError(
                f"{out} was begun with {before.n_inputs} inputs, {n_inputs} are given: give the same inputs in the same order, "
                "or write elsewhere"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PLAN, asdict(plan))
    return plan


def plan_of(out: str | Path) -> Plan:
    """The plan of a run; InputError where there is none."""
    found = _read(Path(out) / SHARDS / PLAN)
    if found is None:
        raise InputError(f"{out} holds no shards: there is no {SHARDS}/{PLAN}; workers need a file system that they all share")
    return Plan(**found)


def shard_folder(out: str | Path, number: int) -> Path:
    """The folder of a shard's run."""
    return Path(out) / SHARDS / f"{number:05d}"


# -- one shard


def is_done(out: str | Path, shard: Shard) -> bool:
    """Whether every input of a shard has a result; InputError when its results are those of other files."""
    found = _read(shard_folder(out, shard.number) / DONE)
    if found is None or found["n_inputs"] != len(shard):
        return False
    if found["content"] != shard.content:
        raise InputError(
            f"shard {shard.number} (inputs {_span(shard.first_index, len(shard))}) was made of other files before: "
            "give the same files in the same order, or write elsewhere"
        )
    return True


def run_shard(run: Run, shard: Shard, out: str | Path, poll: float = 1.0) -> None:
    """Bring every input of a shard to its result, from wherever an earlier run of it has come; nothing when that is done.

    run: called as `run(shard, out=folder, resume=True)`. Where another process works on the shard, wait until it has ended,
    looking every `poll` seconds. InputError: settings are not those of the other shards; not every input has one result.
    """
    plan_of(out)
    folder = shard_folder(out, shard.number)
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(folder, poll):
        if is_done(out, shard):
            return
        # a ledger with the settings of the others refuses a run with other ones before it works
        settings = _read(Path(out) / SHARDS / SETTINGS)
        if settings is not None and not (folder / LEDGER).exists():
            Ledger(folder, settings, resume=True).close()
        run(shard, out=folder, resume=True)
        _check_complete(folder, shard.number, shard.first_index, len(shard))
        _agree(out, folder)
        _write(folder / DONE, {"first_index": shard.first_index, "n_inputs": len(shard), "content": shard.content})


@contextmanager
def _turn(folder: Path, poll: float) -> Iterator[None]:
    """Inside, nobody else works on a shard."""
    lock = filelock.FileLock(folder / TASK_LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.warning("%s: another process works on this shard; waiting until it ends", folder)
        lock.acquire(poll_interval=poll)
    try:
        yield
    finally:
        lock.release()


def _check_complete(folder: Path, number: int, first: int, count: int) -> None:
    """InputError unless the ledger has one result for each input of the shard, and nothing else."""
    where = f"shard {number} ({folder})"
    if not (folder / LEDGER).exists():
        raise InputError(f"{where} has no {LEDGER}: its run has to write to the folder that it is given as `out`")
    query = "SELECT count(*), sum(state = ?), min(id), max(id) FROM systems"
    try:
        with closing(_opened(folder)) as database:
            (found,) = database.execute(query, (FINISHED,)).fetchall()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{where}: its ledger cannot be read: {error}; remove the folder and run the shard again") from None
    if found != (count, count, first, first + count - 1):
        held = f"inputs {found[2]} to {found[3]}, {found[0]} of them, {found[1]} done" if found[0] else "none"
        raise InputError(f"{where} has to have one result for each of inputs {_span(first, count)}, and has {held}")


def _agree(out: str | Path, folder: Path) -> None:
    """InputError unless the settings of a shard are those of the first that was done."""
    path, settings = Path(out) / SHARDS / SETTINGS, _settings(folder)
    known = _read(path)
    if known is None:
        # two that end at the same time may both write it: where they differ, merging tells
        _write(path, settings)
        return
    for name, (then, now) in differing(known, settings).items():
        raise InputError(
            f"{folder} was run with {name} = {now}, other shards with {then}: give all the same, and remove this folder"
        )


# -- all together


def merge_shards(out: str | Path, *, partial: bool = False) -> LedgerResults:
    """Make one ledger of the shards that are done, and finished.extxyz and results.csv of it; what is returned reads from it.

    Rows are copied shard by shard into a new file, which gets its name when it is whole. Shards are left as they are.
    InputError: a shard is not done, unless `partial`; a shard has not one result for each of its inputs; settings differ;
    the folder holds a ledger that was not made of shards.
    """
    out = Path(out)
    plan = plan_of(out)
    done = [number for number in range(plan.n_shards) if _is_whole(out, plan, number)]
    missing = sorted(set(range(plan.n_shards)) - set(done))
    if missing and not partial:
        raise InputError(
            f"{len(missing)} of {plan.n_shards} shards in {out} are not done: {listed(missing)}; start the run again, or merge "
            "what is there with partial=True"
        )
    if not done:
        raise InputError(f"no shard in {out} is done")
    with _alone(out):
        if (out / LEDGER).exists() and _fact(out, MERGED) is None:
            raise InputError(f"{out}/{LEDGER} was not made of shards: move it away, or write elsewhere")
        _copy_all(out, plan, done)
        results = LedgerResults(out)
        export(out, results, FINISHED_STRUCTURES)
    return results


def merged(out: str | Path) -> LedgerResults | None:
    """The results of all inputs of the plan where they were merged already; else None."""
    out = Path(out)
    if not ((out / LEDGER).exists() and (out / RESULTS).exists()):
        return None
    results = LedgerResults(out)
    return results if _fact(out, MERGED) is not None and len(results) == plan_of(out).n_inputs else None


def _copy_all(out: Path, plan: Plan, numbers: Sequence[int]) -> None:
    """A new ledger with the rows of shards, in the place of the one before."""
    making, first = out / MERGING, shard_folder(out, numbers[0])
    shutil.rmtree(making, ignore_errors=True)  # what a kill has left
    settings = _settings(first)
    n_inputs = sum(plan.bounds(number)[1] for number in numbers)
    try:
        with Ledger(making, settings) as ledger:
            for number in numbers:
                folder = shard_folder(out, number)
                _check_complete(folder, number, *plan.bounds(number))
                for name, (then, now) in differing(settings, _settings(folder)).items():
                    raise InputError(f"{folder} was run with {name} = {now}, {first} with {then}: run one of them again")
                _copy(ledger, folder)
            facts = {"n_inputs": n_inputs, "potential": _fact(first, "potential"), "ended": time.time()}
            with ledger.transaction() as database:
                ledger.set_facts(database, {**facts, MERGED: {"shards": len(numbers), "of": plan.n_shards}})
        (making / LEDGER).replace(out / LEDGER)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _copy(ledger: Ledger, folder: Path) -> None:
    ledger.rows("ATTACH DATABASE ? AS shard", str(folder / LEDGER))
    try:
        with ledger.transaction() as database:
            database.execute(f"INSERT INTO main.systems ({ROWS}) SELECT {ROWS} FROM shard.systems ORDER BY id")
    finally:
        ledger.rows("DETACH DATABASE shard")


def _is_whole(out: Path, plan: Plan, number: int) -> bool:
    found = _read(shard_folder(out, number) / DONE)
    return found is not None and (found["first_index"], found["n_inputs"]) == plan.bounds(number)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = filelock.FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{out}: another process works on this run: wait for it") from None
    try:
        yield
    finally:
        lock.release()


# -- files


def _settings(folder: Path) -> Any:
    return _fact(folder, "settings")


def _fact(folder: Path, key: str) -> Any:
    with closing(_opened(folder)) as database:
        found = database.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchall()
    return json.loads(found[0][0]) if found else None


def _opened(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{(folder / LEDGER).resolve().as_uri()}?mode=ro", uri=True)


def _write(path: Path, value: Any) -> None:
    """The file appears whole, or stays as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{socket.gethostname()}")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def _read(path: Path) -> Any:
    """What a file of ours says; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CarryallError(f"{path} is damaged: {error}; remove it and start again") from None


def _checked_size(shard_size: int) -> int:
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
        raise InputError(f"shard_size must be an integer of at least 1, got {shard_size!r}")
    return shard_size


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def listed(numbers: Sequence[int], most: int = 12) -> str:
    """Numbers in ascending order, neighbours as one range: `0, 3 to 7, 9`."""
    spans: list[list[int]] = []
    for one in numbers:
        if spans and spans[-1][0] + spans[-1][1] == one:
            spans[-1][1] += 1
        else:
            spans.append([one, 1])
    shown = [_span(first, count) for first, count in spans[:most]]
    return ", ".join(shown) + (" and more" if len(spans) > most else "")
