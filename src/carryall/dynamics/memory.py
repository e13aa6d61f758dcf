"""How large a batch may be: measured on the first structures with the potential itself, against the memory that is free."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from carryall.data.atomic_data import AtomicData
from carryall.data.batch import Batch
from carryall.dynamics.base import BaseDynamics
from carryall.dynamics.inflight import moving_batch
from carryall.errors import InputError
from carryall.graph.neighbor_search import neighbor_edges
from carryall.graph.potential import Potential

FRACTION = 0.7
"""Part of the free memory that a batch may take."""
CPU_ATOMS, GPU_ATOMS = (500, 20_000), (500, 2_000_000)
"""Atoms that a batch may have, whatever is measured: on a CPU where speed counts, and otherwise."""
ASSUMED_BYTES_PER_ATOM, ASSUMED_FREE = 200_000, 4 * 2**30
"""Where memory cannot be measured: a large message-passing model, and a small machine."""
LEAST_BYTES_PER_ATOM = 2000
"""What dynamics keeps of an atom and its neighbours, beside the model."""
PROBE_ATOMS, PROBE_SECONDS = (500, 3000), 0.3
"""Sizes that are tried, and the time of a step after which no larger one is."""
STEPS = 5
"""Most steps of a probe."""
DENSER = 20
"""How many times denser than the first structures others may well be."""
WORTH = 0.9
"""A larger batch pays while the smaller one has less than this part of its rate."""


@dataclass(frozen=True)
class Probe:
    """One size that was tried."""

    n_atoms: int
    n_edges: int
    n_bytes: int | None
    """More than before the probe, at the peak; None where it cannot be measured."""
    seconds: float
    """Of a step."""


@dataclass(frozen=True)
class BatchLimits:
    """What fits into a batch; a batch within both limits fits whatever its density."""

    max_atoms: int
    """Atoms of a batch."""
    max_edges: int | None
    """Neighbour pairs (i, j) and (j, i) of a batch; None: not limited."""
    memory_atoms: int | None = None
    """Atoms that fit into memory, be it worth it or not; None: not limited."""
    memory_edges: int | None = None
    """Pairs that fit into memory."""

    def refusal(self, data: AtomicData, cutoff: float) -> str | None:
        """Why a structure does not even fit alone; None when it does."""
        edges = 0 if self.memory_edges is None else n_edges(data, cutoff)
        for found, limit, what in ((data.n_atoms, self.memory_atoms, "atoms"), (edges, self.memory_edges, "neighbour pairs")):
            if limit is not None and found > limit:
                return f"it has {found} {what}, {limit} are predicted to fit into memory: make it smaller, or free memory"
        return None


def automatic_limits(
    make: Callable[[], BaseDynamics], samples: Sequence[AtomicData], *, whole: int | None = None, for_speed: bool = True
) -> BatchLimits:
    """Limits of a batch of structures like `samples` (usable ones), found with a few steps of `make()`.

    whole: atoms of all structures where that is known: what is small enough in any case is not measured. for_speed: on a CPU,
    no larger than what makes a step's time per atom smaller.
    """
    on_gpu = _device(make().model).type == "cuda"
    low, high = CPU_ATOMS if for_speed and not on_gpu else GPU_ATOMS
    if not samples or (whole is not None and whole <= low):
        return BatchLimits(low, None)
    # where all of them are few, it is enough to know whether they fit
    probes = measure(make, samples, [size for size in PROBE_ATOMS if whole is None or size < whole])
    last = probes[-1]
    known = [one for one in probes if one.n_bytes is not None]
    per_atom = max(_slope(known), LEAST_BYTES_PER_ATOM) if known else ASSUMED_BYTES_PER_ATOM
    fit = int(FRACTION * free_memory(make().model) / per_atom)
    pairs = max(last.n_edges / last.n_atoms, 1.0)
    few = whole is not None and whole <= PROBE_ATOMS[-1]
    best = best_size(probes, high) if for_speed and not on_gpu and not few else high
    fit = max(fit, low)
    atoms, most_pairs = min(max(best, low), fit, high), int(pairs * fit)
    # counting pairs costs a search for each structure: not where even a far denser batch would fit
    return BatchLimits(atoms, None if fit > DENSER * atoms else most_pairs, fit, most_pairs)


def measure(make: Callable[[], BaseDynamics], samples: Sequence[AtomicData], sizes: Sequence[int] | None = None) -> list[Probe]:
    """Memory and time of a step with growing copies of the samples, until a step takes long."""
    cutoff = make().model.spec.cutoff
    atoms = [one.n_atoms for one in samples]
    edges = [n_edges(one, cutoff) for one in samples]
    probes: list[Probe] = []
    # what is allocated once, at the first call, is no part of a batch
    _step(make(), moving_batch(samples[:1], [0]))
    for size in PROBE_ATOMS if sizes is None else sizes:
        index = _enough(atoms, size)
        total, pairs = sum(atoms[i] for i in index), sum(edges[i] for i in index)
        if probes and total < 1.5 * probes[-1].n_atoms:
            continue
        if probes and (probes[-1].n_bytes or 0) * total / probes[-1].n_atoms > FRACTION * free_memory(make().model):
            break
        grown, seconds = _grown(make, [samples[i] for i in index])
        probes.append(Probe(total, pairs, grown, seconds))
        if seconds > PROBE_SECONDS:
            break
    return probes


def best_size(probes: Sequence[Probe], largest: int) -> int:
    """Atoms beyond which a batch gains nothing: the smallest with nearly the best rate, twice the last if rates still grow."""
    rates = [one.n_atoms / max(one.seconds, 1e-9) for one in probes]
    good = next(i for i, rate in enumerate(rates) if rate >= WORTH * max(rates))
    still = good == len(probes) - 1 and probes[good].seconds <= PROBE_SECONDS
    return min(2 * probes[good].n_atoms if still else probes[good].n_atoms, largest)


def free_memory(potential: Potential) -> int:
    """Bytes that are free where the potential runs: of the GPU, else of the machine or of the control group of the process."""
    device = _device(potential)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [_number("/proc/meminfo", "MemAvailable:", 1024), _group_memory()]
    known = [one for one in found if one is not None]
    return min(known) if known else ASSUMED_FREE


def n_edges(data: AtomicData, cutoff: float) -> int:
    """Pairs (i, j) and (j, i) within the cutoff; 0 for a structure without neighbour graph."""
    cell = torch.zeros(3, 3) if data.cell is None else data.cell
    positions = data.positions.detach().cpu().double().numpy()
    try:
        return len(neighbor_edges(positions, cell.detach().cpu().double().numpy(), data.pbc.cpu().numpy(), cutoff)[0])
    except InputError:
        return 0


def _enough(atoms: Sequence[int], size: int) -> list[int]:
    """Indices of samples, again from the first after the last, that have `size` atoms together."""
    found: list[int] = []
    total = 0
    while total < size:
        found.append(len(found) % len(atoms))
        total += atoms[found[-1]]
    return found


def _grown(make: Callable[[], BaseDynamics], chosen: Sequence[AtomicData]) -> tuple[int | None, float]:
    """Bytes at the peak of a start and a step, beyond those before (None: unknown), and the time of the step."""
    dynamics, batch = make(), moving_batch(chosen, range(len(chosen)))
    device = _device(dynamics.model)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = _step(dynamics, batch)
        return torch.cuda.max_memory_allocated(device) - before, seconds
    now = _number("/proc/self/status", "VmRSS:", 1024)
    if now is not None and _reset_peak():
        seconds = _step(dynamics, batch)
        peak = _number("/proc/self/status", "VmHWM:", 1024)
        return None if peak is None else max(peak - now, 0), seconds
    before = _largest_so_far()
    seconds = _step(dynamics, batch)
    return (_largest_so_far() - before) or None, seconds


def _step(dynamics: BaseDynamics, batch: Batch) -> float:
    """Seconds of a step: the shortest of a few, as long as they are short."""
    dynamics.start(batch)
    seconds: list[float] = []
    while len(seconds) < STEPS and sum(seconds) < PROBE_SECONDS / STEPS:
        began = time.perf_counter()
        dynamics.step(batch)
        if _device(dynamics.model).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _slope(probes: Sequence[Probe]) -> float:
    """Bytes an atom: the steepest there is between two sizes, or from nothing to the largest."""
    points = [(0, 0), *((one.n_atoms, one.n_bytes or 0) for one in probes)]
    steps = [(b - a) / (n - m) for (m, a), (n, b) in pairwise(points)]
    return max(points[-1][1] / points[-1][0], steps[-1])


def _reset_peak() -> bool:
    """Set the kernel's record of the largest memory back to what is in use; False where it has no such record."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _number("/proc/self/status", "VmHWM:", 1024) is not None


def _largest_so_far() -> int:
    """Most memory that this process ever had; it tells only of calls that needed more than all before."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _group_memory(root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of the process leave it; None where there is no limit."""
    try:
        lines = [line.split(":", 2) for line in member.read_text().splitlines()]
    except OSError:
        return None
    left = []
    for _, controllers, path in lines:
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # inside a container the path may be that of the host: then only the root is there
        for folder in (Path(top, *Path(path).parts[1:i]) for i in range(1, len(Path(path).parts) + 1)):
            most, used = (_number(str(folder / name)) for name in names[:2])
            if most is not None and used is not None and most < 2**60:
                cache = _number(str(folder / "memory.stat"), names[2]) or 0
                left.append(max(most - used + cache, 0))
    return min(left, default=None)


def _number(path: str, label: str = "", unit: int = 1) -> int | None:
    """The number after a label in a file of the kernel; None when it is not there."""
    try:
        words = Path(path).read_text().split()
    except OSError:
        return None
    if label:
        words = words[words.index(label) + 1 :] if label in words else []
    return int(words[0]) * unit if words and words[0].isdigit() else None


def _device(potential: Potential) -> torch.device:
    return torch.device(getattr(potential, "device", "cpu"))
