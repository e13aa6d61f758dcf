"""Shards of a run on the workers of a Dask cluster: this machine's cores, a batch system's jobs, any cluster that Dask has.

Dask starts workers, and gives the task of a worker that died to another one; nothing of carryall runs between them. What is
done is known from the shards' own folders (`carryall.dynamics.shards`), never from the cluster's memory.
"""

from __future__ import annotations

import queue
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from carryall.data.batch import Batch
from carryall.dynamics.ledger import LedgerResults
from carryall.dynamics.shards import Run, Shard, begin, divided, is_done, listed, merge_shards, merged, n_inputs_of, run_shard
from carryall.dynamics.stopping import StopRequested
from carryall.dynamics.structure_files import MeasuredFile, measured
from carryall.errors import CarryallError, InputError, MissingDependencyError
from carryall.interrupt import stop_between_steps
from carryall.progress import progress_bar

try:
    import cloudpickle
    import dask.config
    from distributed import Client, Future, KilledWorker, get_worker
except ImportError:
    raise MissingDependencyError(
        "shards on a Dask cluster need distributed, which is not installed: pip install 'carryall[dask]'"
    ) from None

FILES_PER_TASK = 200
"""Files that one task counts."""
AHEAD, LEAST_AHEAD = 4, 64
"""Shards given to the cluster at a time, for each worker and at least: enough to scale by, few for the scheduler's memory."""
LARGEST = 16 * 1024 * 1024
"""Bytes that may be sent with each shard beside its own structures."""
LOOK = 0.25
"""Seconds between two looks for Ctrl-C."""
TOLD = 5
"""Reasons that an error tells in full."""


class ShardsFailed(CarryallError):
    """Some shards failed for good; all others are done."""

    def __init__(self, message: str, reasons: dict[int, str]) -> None:
        super().__init__(message)
        self.reasons = reasons
        """By the shard's number."""


def map_shards(
    client: Client,
    make_run: Callable[[], Run],
    structures: Any,
    out: str | Path,
    *,
    shard_size: int = 1000,
    resume: bool = True,
    retries: int = 2,
    progress: bool = True,
) -> LedgerResults:
    """Run shards of `structures` on the workers of `client`, and make one ledger of them, finished.extxyz and results.csv.

    make_run: called once in each worker process, where it loads the potential; it returns what is called for each shard as
    `run(structures, out=folder, resume=True)`: `functools.partial(relax, potential=..., errors="set_aside")`, or a function of
    your own that runs a pipeline. It is sent by cloudpickle, so that it may be a function of the script.
    structures: files (a path, or a list of paths), which workers count and read; or a data set with `len()` and `[i]`, which is
    sent to the workers and read there; of a list each worker gets its own part. Inputs are numbered through all of them.
    out: folder for everything, on a file system that all workers share. shard_size: inputs of a shard, some minutes of work.
    resume: go on with what is in the folder; more inputs may have come at the end. progress: a bar at a terminal.
    retries: how often a shard is started again that failed, or whose workers died more often than Dask allows; what is an
    InputError is not tried again.

    InputError: a worker has several threads, what is in `out` does not fit, no inputs. ShardsFailed: at the end, where shards
    failed for good. StopRequested (a KeyboardInterrupt): Ctrl-C or SIGTERM; the same call goes on.
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise InputError(f"retries must be an integer of at least 0, got {retries!r}")
    _check_client(client)
    if not callable(make_run):
        raise InputError(f"make_run must be a function that loads the potential and returns a run, got {make_run!r}")
    out, made = Path(out).absolute(), _sent(make_run, "make_run", "load the potential inside it")
    if isinstance(structures, Batch):
        structures = structures.to_data_list()
    elif (paths := _paths(structures)) is not None:
        structures = _measured(client, paths, progress)
    n_inputs = n_inputs_of(structures)
    if not isinstance(structures, (list, tuple)):
        _sent(structures, "the data set", "give a list, or a data set that opens its file when it is first read")
    plan = begin(out, n_inputs, shard_size, resume)
    todo = [shard for shard in divided(structures, shard_size) if not is_done(out, shard)]
    if not todo and (results := merged(out)) is not None:
        return results
    n_left = sum(map(len, todo))
    with progress_bar("structures", n_inputs, n_inputs - n_left) if progress else nullcontext() as advance:
        n_shards = plan.n_shards - len(todo)

        def tell(shard: Shard) -> None:
            nonlocal n_shards
            n_shards += 1
            if advance is not None:
                advance(len(shard), f"{n_shards} of {plan.n_shards} shards")

        reasons = _run_all(client, made, out, todo, retries, tell)
    if reasons:
        raise ShardsFailed(_told(reasons, plan.n_shards), reasons)
    return merge_shards(out)


def _run_all(
    client: Client, made: bytes, out: Path, todo: Iterable[Shard], retries: int, tell: Callable[[Shard], None]
) -> dict[int, str]:
    """Bring shards to their end; why some failed for good."""
    waiting, running = deque(todo), dict[Any, tuple[Shard, Future]]()
    failures: Counter[int] = Counter()
    reasons: dict[int, str] = {}
    arrived: queue.SimpleQueue[Future] = queue.SimpleQueue()
    total, room, name = len(waiting), LEAST_AHEAD, f"carryall-shard-{uuid4().hex}"
    with stop_between_steps() as requested:
        try:
            while waiting or running:
                while waiting and len(running) < room:
                    shard = waiting.popleft()
                    key = f"{name}-{shard.number}-{failures[shard.number]}"
                    # of a list, its structures are in the task: Dask warns of tasks of more than 10 MB
                    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "100GB"}):
                        future = client.submit(_task, made, shard, str(out), key=key, pure=False)
                    running[key] = (shard, future)
                    future.add_done_callback(arrived.put)
                if requested():
                    raise StopRequested(
                        f"stopped: {len(waiting) + len(running)} of {total} shards that were to do are left, the same call "
                        "goes on; a worker that is left running finishes its shard"
                    )
                try:
                    future = arrived.get(timeout=LOOK)
                except queue.Empty:
                    _check_client(client)
                    continue
                shard, _ = running.pop(future.key)
                room = max(LEAST_AHEAD, AHEAD * len(client.nthreads()))
                reason, again = _reason(future)
                if reason is None:
                    tell(shard)
                elif again and failures[shard.number] < retries:
                    failures[shard.number] += 1
                    waiting.append(shard)
                else:
                    reasons[shard.number] = reason
        finally:
            client.cancel([future for _, future in running.values()])
    return reasons


def _task(made: bytes, shard: Shard, out: str) -> None:
    """On a worker: one shard."""
    threads = get_worker().state.nthreads
    if threads != 1:
        raise InputError(_threads_text(get_worker().address, threads))
    run_shard(_made(made), shard, out)


@lru_cache(maxsize=1)
def _made(payload: bytes) -> Run:
    """What `make_run` returns, once in each process."""
    run: Run = cloudpickle.loads(payload)()
    if not callable(run):
        raise InputError(f"make_run has to return a function run(structures, out=..., resume=...), it returned {run!r}")
    return run


def _measure(paths: Sequence[str], base: str) -> list[MeasuredFile]:
    return [measured(path, base) for path in paths]


def _measured(client: Client, paths: Sequence[str], progress: bool) -> list[MeasuredFile]:
    """How many inputs each file gives, counted by the workers."""
    chunks = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    futures = client.map(_measure, chunks, base=str(Path.cwd()), pure=False)
    found: list[MeasuredFile] = []
    with progress_bar("files counted", len(paths)) if progress else nullcontext() as advance:
        for future in futures:
            one = future.result()
            found += one
            if advance is not None:
                advance(len(one), None)
    return found


def _paths(structures: Any) -> list[str] | None:
    """Paths as text; None where the structures are no files."""
    if isinstance(structures, (str, Path)):
        return [str(structures)]
    if isinstance(structures, (list, tuple)) and structures and all(isinstance(one, (str, Path)) for one in structures):
        return [str(one) for one in structures]
    return None


def _check_client(client: Client) -> None:
    """InputError for what is no client in use from a script, or a worker with several threads."""
    if not isinstance(client, Client) or client.asynchronous:
        raise InputError(f"client must be a distributed.Client that is not asynchronous, got {client!r}")
    if client.status not in ("running", "connecting"):
        raise CarryallError(f"the connection to the Dask scheduler is {client.status}: start it, and the same call goes on")
    for address, threads in client.nthreads().items():
        if threads != 1:
            raise InputError(_threads_text(address, threads))


def _threads_text(address: str, threads: int) -> str:
    return (
        f"worker {address} has {threads} threads, and two shards in one process would share a potential: start workers with "
        "one (LocalCluster: threads_per_worker=1; dask-jobqueue: as many processes as cores; dask worker: --nthreads 1)"
    )


def _sent(value: Any, name: str, advice: str) -> bytes:
    """The bytes in which a value goes to workers; InputError for what cannot be sent, or is too large for every shard."""
    try:
        payload: bytes = cloudpickle.dumps(value)
    except Exception as error:  # whatever it refers to may refuse
        raise InputError(f"{name} cannot be sent to workers: {error}; {advice}") from None
    if len(payload) > LARGEST:
        raise InputError(f"{name} takes {len(payload) / 1e6:.0f} MB, and is sent with each shard: {advice}")
    return payload


def _reason(future: Future) -> tuple[str | None, bool]:
    """Why a task failed, None where it did not; and whether it may be tried again."""
    if future.status == "finished":
        return None, False
    if future.status != "error":
        return f"its task was {future.status}", True
    error = future.exception()
    if isinstance(error, KilledWorker):
        return "workers died while they worked on it, more often than distributed.scheduler.allowed-failures", True
    return (str(error) if isinstance(error, CarryallError) else f"{type(error).__name__}: {error}"), not isinstance(
        error, InputError
    )


def _told(reasons: dict[int, str], n_shards: int) -> str:
    numbers = sorted(reasons)
    lines = [f"shard {number}: {reasons[number]}" for number in numbers[:TOLD]]
    more = [f"and {len(numbers) - TOLD} more"] if len(numbers) > TOLD else []
    head = f"{len(numbers)} of {n_shards} shards failed ({listed(numbers)}), all others are done:"
    foot = "the same call tries them again; carryall.dynamics.shards.merge_shards(out, partial=True) gives what is there"
    return "\n".join([head, *lines, *more, foot])
