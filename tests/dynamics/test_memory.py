"""Batch sizes from measured memory: right for potentials whose need is known, bounded, and no influence on results."""

from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from dynamics_samples import LennardJones, Well, argon, cluster

from carryall.data import AtomicData
from carryall.dynamics import FIRE, memory, relax
from carryall.dynamics.memory import BatchLimits, Probe, automatic_limits, best_size, free_memory, measure, n_edges
from carryall.errors import InputError

MEGABYTE = 2**20
RELAX = import_module("carryall.dynamics.relax")  # the name of the package is the function


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(memory, "PROBE_ATOMS", (500, 1500))


class Hungry(LennardJones):
    """Needs a known number of bytes for each edge or atom while it is evaluated."""

    def __init__(self, per_edge=0, per_atom=0):
        super().__init__()
        self.per_edge, self.per_atom, self.largest = per_edge, per_atom, 0

    def __call__(self, graph, *, atomic_virial=False):
        self.largest = max(self.largest, graph.n_atoms)
        need = self.per_edge * len(graph.edge_center) + self.per_atom * graph.n_atoms
        held = np.ones(max(need, 1), dtype=np.uint8)  # written to, so that it counts
        found = super().__call__(graph)
        return {**found, "energy": found["energy"] + 0.0 * float(held[0])}


def never(potential):
    return lambda: FIRE(potential, convergence_hook=-1.0)


def crystal(repeat=2):
    return AtomicData.from_ase(argon(repeat))


def probes_of(per_edge, per_atom):
    """What is measured of a known need, and of the potential alone."""
    sizes = (500, 1500)
    return measure(never(Hungry(per_edge, per_atom)), [crystal()], sizes), measure(never(Hungry()), [crystal()], sizes)[-1]


@pytest.mark.parametrize(("per_edge", "per_atom"), [(500, 0), (0, 60_000)])
def test_bytes_are_measured(per_edge, per_atom):
    # a process of its own: one that has run other tests uses memory again that it has already
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        probes, own = fresh.submit(probes_of, per_edge, per_atom).result(timeout=120)
    assert [one.n_atoms for one in probes] == sorted(one.n_atoms for one in probes)
    assert probes[0].n_atoms >= memory.PROBE_ATOMS[0]
    last = probes[-1]
    assert last.n_edges == n_edges(crystal(), 8.5) * last.n_atoms // 32
    known = per_edge * last.n_edges + per_atom * last.n_atoms
    assert own.n_atoms == last.n_atoms or own.seconds < 0.3
    # what the potential itself needs comes on top, about a kilobyte an edge
    assert 0.9 * known < last.n_bytes < known + 2000 * last.n_edges + 50 * MEGABYTE


def test_limits_follow_from_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda potential: 1000 * MEGABYTE)
    limits = automatic_limits(never(Hungry(per_atom=500_000)), [crystal()])
    assert 500 <= limits.max_atoms <= 0.7 * 1000 * MEGABYTE / 500_000
    assert limits.max_edges >= limits.max_atoms * n_edges(crystal(), 8.5) / 32 * 0.99
    many = AtomicData(np.random.default_rng(0).normal(0, 90, (1500, 3)), [18] * 1500)
    assert "it has 1500 atoms" in limits.refusal(many, 8.5)
    assert limits.refusal(crystal(), 8.5) is None
    monkeypatch.setattr(memory, "free_memory", lambda potential: 10**15)
    assert automatic_limits(never(Well()), [cluster(8)], for_speed=False).max_atoms == memory.GPU_ATOMS[1]
    assert automatic_limits(never(Well()), [cluster(8)]).max_atoms <= memory.CPU_ATOMS[1]
    monkeypatch.setattr(memory, "free_memory", lambda potential: 1)
    assert automatic_limits(never(Well()), [cluster(8)]).max_atoms == memory.CPU_ATOMS[0]


def test_what_is_tried_is_predicted_to_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda potential: 200 * MEGABYTE)
    hungry = Hungry(per_atom=200_000)
    assert len(measure(never(hungry), [crystal()])) == 1
    assert hungry.largest == 512


def test_a_denser_structure_is_refused_by_its_pairs():
    limits = BatchLimits(500, None, memory_atoms=1000, memory_edges=3000)
    dense = crystal(3)
    found = n_edges(dense, 8.5)
    assert f"it has {found} neighbour pairs, 3000 are predicted to fit" in limits.refusal(dense, 8.5)


def test_few_atoms_are_not_measured():
    model = LennardJones()
    assert automatic_limits(never(model), [crystal()], whole=32) == BatchLimits(memory.CPU_ATOMS[0], None)
    assert automatic_limits(never(model), []).max_atoms == memory.CPU_ATOMS[0]
    assert model.n_calls == 0


def test_where_nothing_can_be_measured_a_constant_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    monkeypatch.setattr(memory, "_largest_so_far", lambda: 10**9)  # never more than ever before
    monkeypatch.setattr(memory, "free_memory", lambda potential: 1000 * memory.ASSUMED_BYTES_PER_ATOM)
    assert [one.n_bytes for one in measure(never(Well()), [cluster(8)])] == [None] * len(memory.PROBE_ATOMS)
    assert automatic_limits(never(Well()), [cluster(8)], for_speed=False).max_atoms == 700


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.01, 0.04, 0.16], 500),  # the same rate at all sizes
        ([0.01, 0.02, 0.076], 2000),
        ([0.01, 0.015, 0.03], 16000),  # still better: twice the largest tried
        ([0.01, 0.2], 500),
        ([0.4], 500),  # one slow step: no larger one was tried
    ],
)
def test_larger_batches_only_while_they_pay(seconds, expected):
    probes = [Probe(n, 60 * n, 0, t) for n, t in zip((500, 2000, 8000), seconds, strict=False)]
    assert best_size(probes, 20_000) == expected


def test_the_control_group_of_a_batch_system_counts(tmp_path):
    def files(folder, **values):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name.replace("__", ".")).write_text(value)

    files(tmp_path / "new", memory__max="max\n", memory__current="10\n")
    files(tmp_path / "new" / "job", memory__max="1000\n", memory__current="700\n", memory__stat="anon 5\ninactive_file 100\n")
    files(tmp_path / "new" / "job" / "step", memory__max="max\n", memory__current="3\n")
    (tmp_path / "member").write_text("0::/job/step\n")
    assert memory._group_memory(tmp_path / "new", tmp_path / "member") == 400
    files(tmp_path / "old" / "memory" / "slurm", memory__limit_in_bytes="5000", memory__usage_in_bytes="2000")
    (tmp_path / "member").write_text("7:cpu:/slurm\n4:memory:/slurm\n")
    assert memory._group_memory(tmp_path / "old", tmp_path / "member") == 3000
    (tmp_path / "member").write_text("0::/elsewhere\n")
    assert memory._group_memory(tmp_path / "none", tmp_path / "member") is None
    assert memory._group_memory(tmp_path / "none", tmp_path / "absent") is None
    assert free_memory(LennardJones()) > 10 * MEGABYTE


def test_relax_keeps_within_what_is_measured(monkeypatch):
    structures = [crystal(2) for _ in range(40)]
    model = Hungry()
    monkeypatch.setattr(RELAX, "automatic_limits", lambda *args, **kwargs: BatchLimits(600, None, 700, 10**6))
    results = relax(structures, model, fmax=1e-6, max_steps=2, progress=False)
    assert model.largest <= 600
    assert len(results) == 40
    large = AtomicData.from_ase(argon(6))
    with pytest.raises(InputError, match="structure 1: it has 864 atoms, 700 are predicted to fit into memory"):
        relax([crystal(), large], model, progress=False)
    found = relax(iter([crystal(), large, crystal()]), model, errors="set_aside", fmax=0.3, progress=False)
    assert [one.outcome for one in found] == ["converged", "failed", "converged"]
    assert "864 atoms" in found[1].reason
    monkeypatch.setattr(RELAX, "automatic_limits", lambda *args, **kwargs: BatchLimits(600, None, 900, 10**6))
    assert [one.outcome for one in relax([large, crystal()], model, fmax=0.3, progress=False)] == ["converged"] * 2
    assert model.largest == 864


def test_edges_are_held_to_too():
    structures = [crystal() for _ in range(6)]
    model = Hungry()
    most = 2 * n_edges(crystal(), 8.5)
    seen = []
    original = model.__call__

    class Counting(Hungry):
        def __call__(self, graph, *, atomic_virial=False):
            seen.append(len(graph.edge_center))
            return original(graph)

    results = relax(
        structures, Counting(), fmax=1e-6, max_steps=2, max_atoms_per_batch=10**6, max_edges_per_batch=most, progress=False
    )
    assert len(results) == 6
    assert max(seen) <= most
    assert torch.tensor([one.steps for one in results]).tolist() == [2] * 6


def test_on_a_gpu_its_own_memory_is_measured(monkeypatch):
    """The numbers of a device that is not there."""
    model = Hungry()
    model.device = "cuda"
    state = {"held": 10 * MEGABYTE, "peak": 0}

    def start_measuring(device):
        state["peak"] = state["held"]

    def evaluated(graph):
        state["peak"] = max(state["peak"], state["held"] + 40_000 * graph.n_atoms)

    original = Hungry.__call__
    monkeypatch.setattr(
        Hungry, "__call__", lambda self, graph, **options: (evaluated(graph), original(self, graph, **options))[1]
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["held"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state["held"] + 5 * MEGABYTE)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", start_measuring)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (395 * MEGABYTE, 400 * MEGABYTE))
    assert free_memory(model) == 400 * MEGABYTE
    limits = automatic_limits(never(model), [crystal()])
    assert limits.max_atoms == limits.memory_atoms == int(0.7 * 400 * MEGABYTE / 40_000)
    assert limits.max_edges == int(n_edges(crystal(), 8.5) / 32 * limits.memory_atoms)
