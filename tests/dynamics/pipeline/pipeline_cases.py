"""Runs of a pipeline by one rank, described by plain values; the ranks are forked from one process that has imported all."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline_samples import Failing, LennardJones, Single, Slow, bits, stage, systems

from carryall.data import AtomicData, Batch
from carryall.dynamics import FIRE, NVE, DistributedPipeline, ExtXYZSink, HDF5Sink, MemorySink, NVTLangevin, SizeAwareSampler
from carryall.dynamics.inflight import moving_batch


class Troubled(LennardJones):
    """Something happens at one of its calls."""

    def __init__(self, trouble: Callable[[], None], at: int) -> None:
        super().__init__()
        self.trouble, self.at, self.count = trouble, at, 0

    def __call__(self, graph: Any, **options: Any) -> dict[str, torch.Tensor]:
        self.count += 1
        if self.count == self.at:
            self.trouble()
        return super().__call__(graph, **options)


class OnlyOnRank0:
    """A data set that no other rank may read."""

    def __init__(self, structures: list[AtomicData], rank: int) -> None:
        self.structures, self.rank = structures, rank

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> AtomicData:
        if self.rank:
            raise AssertionError(f"rank {self.rank} reads the data set")
        return self.structures[index]


class Unwritable(MemorySink):
    """A disk that is full."""

    def write(self, batch: Batch, mask: Any = None) -> None:
        raise OSError("no space left on device")


def made(out: str | None, kind: str, capacity: int | None) -> Callable[[], Any]:
    """Opens a sink on the rank that asks for it."""
    kinds: dict[str, Callable[[], Any]] = {
        "h5": lambda: HDF5Sink(f"{out}.{capacity}.h5", capacity),
        "extxyz": lambda: ExtXYZSink(f"{out}.{capacity}.extxyz", capacity),
        "memory": lambda: MemorySink(capacity),
        "unwritable": lambda: Unwritable(capacity),
    }
    return kinds[kind]


def trouble_of(kind: str, rank: int, marker: Path) -> Callable[[], None]:
    """What happens to a rank."""

    def fail() -> None:
        raise RuntimeError(f"the model of rank {rank} is broken")

    def send(number: int) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), number)

    known = {"raise": fail, "mark": marker.touch}
    return known[kind] if kind in known else send(getattr(signal, kind))


def model_of(plan: dict[str, Any], rank: int, place: int) -> Any:
    """The potential of a stage."""
    if (trouble := plan.get("trouble")) and trouble["rank"] == rank and trouble.get("stage", place) == place:
        return Troubled(trouble_of(trouble["kind"], rank, Path(plan["out"] + ".marker")), trouble["at"])
    seconds = plan.get("slow", {}).get(str(place))
    if seconds is not None:
        return Slow(seconds)
    return {"single": Single, "failing": Failing}.get(plan.get("model", ""), LennardJones)()


def stages_of(plan: dict[str, Any], rank: int) -> list[Any]:
    """FIRE, NVE and, of three, a thermostat."""
    n_ranks, n_steps = plan["n_ranks"], plan.get("n_steps", 15)
    models = [model_of(plan, rank, place) for place in range(len(n_ranks))]
    structures = given(plan)
    sampler = None
    if plan.get("source") == "sampler":
        sampler = SizeAwareSampler(OnlyOnRank0(structures, rank), max_atoms=40, max_batch_size=plan.get("room", 8))
    frequency = plan.get("frequency", 5)
    engines: list[Any] = [
        FIRE(
            models[0], convergence_hook=0.02, n_steps=plan.get("relax_steps", 40), sampler=sampler, refill_frequency=frequency
        ),
        NVE(models[1], timestep=2.0, n_steps=n_steps, refill_frequency=frequency),
    ]
    if len(n_ranks) == 3:
        engines.append(NVTLangevin(models[2], timestep=1.0, temperature=40.0, n_steps=10, seed=1, refill_frequency=frequency))
    if plan.get("other_program") == rank:
        engines[1] = NVE(models[1], timestep=2.0, n_steps=n_steps + 1)
    room = plan.get("room", 8)
    return [stage(one, count, room, 40) for one, count in zip(engines, n_ranks, strict=True)]


def given(plan: dict[str, Any]) -> list[AtomicData]:
    """The inputs; one in ten has copper where the model fails for it."""
    count = plan["count"]
    failing = range(4, count, 10) if plan.get("model") == "failing" else ()
    return systems(count, failing, velocities=bool(plan.get("velocities")))


def batch_of(plan: dict[str, Any]) -> Batch:
    """The inputs as a batch with keys of every dtype, numbered from 100 down."""
    structures = given(plan)
    count = len(structures)
    batch = moving_batch(structures, [100 - index for index in range(count)])
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64, torch.bool):
        name = str(dtype).removeprefix("torch.")
        batch.set(
            f"system_{name}",
            (torch.arange(count) % 2 if dtype == torch.bool else torch.arange(count)).to(dtype),
            level="system",
        )
        batch.set(f"atom_{name}", (torch.arange(batch.n_atoms) % 7).to(dtype), level="atom")
    return batch


def source_of(plan: dict[str, Any], rank: int) -> Any:
    """What `run` is given."""
    kind, structures = plan.get("source", "list"), given(plan)
    if kind == "sampler":
        return None
    if kind == "batch":
        return batch_of(plan)
    if kind == "generator":
        return broken(structures, plan["breaks_at"]) if "breaks_at" in plan else (one for one in structures)
    return OnlyOnRank0(structures, rank)


def broken(structures: list[AtomicData], at: int) -> Iterator[AtomicData]:
    yield from structures[:at]
    raise OSError("the archive is damaged")


SETTINGS = ("comm_mode", "synchronized", "helping", "timeout", "buffer_config")


def pipeline_of(plan: dict[str, Any], rank: int) -> DistributedPipeline:
    """The pipeline of a plan."""
    sinks = [made(plan.get("sink_path", plan["out"]), kind, capacity) for kind, capacity in plan.get("sinks", ())]
    settings = {name: plan[name] for name in SETTINGS if name in plan}
    return DistributedPipeline(stages_of(plan, rank), sinks=sinks, **settings)


def run_case(plan: dict[str, Any], rank: int) -> None:
    """Run a plan; rank 0 writes what came of it."""
    out = plan["out"]

    def on_start() -> None:
        if "started" in plan:
            Path(f"{plan['started']}.{rank}").touch()

    results = pipeline_of(plan, rank).run(
        source_of(plan, rank),
        out=plan.get("folder"),
        resume=plan.get("resume", False),
        checkpoint_seconds=plan.get("checkpoint_seconds", 10.0),
        progress=False,
        on_start=on_start,
    )
    assert (results is None) == (rank > 0)
    if results is not None:
        found = [
            bits(one) | {"reason": one.reason, "stages": (one.structure.info if one.structure else {}).get("stages")}
            for one in results
        ]
        Path(out + ".json").write_text(json.dumps(found))


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def be_rank(plan: dict[str, Any], rank: int, size: int, port: int) -> None:
    """The life of a forked rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(f"{plan['out']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        run_case(plan, rank)
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def nursery() -> None:
    """For each line with a plan its ranks, forked from here since importing takes longer than what is tested."""
    torch.set_num_threads(1)
    os.write(1, b"ready\n")
    for line in sys.stdin:
        plan = json.loads(line)
        size, port = plan["size"], free_port()
        assert threading.active_count() == 1, "a process with threads must not be forked"
        ranks: dict[int, int] = {}
        for rank in range(size):
            pid = os.fork()
            if not pid:
                be_rank(plan, rank, size, port)
            ranks[pid] = rank
        os.write(1, (json.dumps(list(ranks)) + "\n").encode())
        while ranks:
            pid, status = os.wait()
            os.write(1, (json.dumps([ranks.pop(pid), os.waitstatus_to_exitcode(status)]) + "\n").encode())


if __name__ == "__main__":
    nursery()
