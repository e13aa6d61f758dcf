"""Shards on a Dask cluster of two worker processes: killed, stopped, failing, started again; against one run in one piece."""

import importlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from dynamics_samples import LennardJones
from screening_samples import argon_structures, ledger_rows

import carryall
from carryall.cli.inputs import FrameStream
from carryall.data import AtomicData, write_structures
from carryall.dynamics import relax
from carryall.dynamics.shards import merge_shards
from carryall.dynamics.stopping import StopRequested
from carryall.errors import InputError, MissingDependencyError

pytest.importorskip("distributed", reason="needs Dask: pip install 'carryall[dask]'")

import cloudpickle
from distributed import Client, LocalCluster

from carryall.engines.dask import ShardsFailed, map_shards

SETTINGS = {"max_steps": 12, "errors": "set_aside", "progress": False, "max_atoms_per_batch": 60, "checkpoint_seconds": 0.0}


@pytest.fixture(scope="module", autouse=True)
def own_environment():
    # who starts workers sets the numbers of threads in its own environment too
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def cluster_client(own_environment):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as found,
    ):
        yield found


@pytest.fixture
def client(cluster_client):
    cluster_client.wait_for_workers(2)  # one that was killed comes again
    return cluster_client


@pytest.fixture(scope="module")
def structures():
    return [*argon_structures(11, largest=8), AtomicData([[0, 0, 0]], [1]), *argon_structures(3, seed=1, largest=8)]


def making(folder, kill_after=None, broken=None, wait_for=None):
    """A `make_run` that keeps logs in a folder: who made it, model calls of each shard, and every result as it comes.

    kill_after: input whose result is the last thing that its worker does, once. broken: shard -> error, each time it is run.
    wait_for: a file without which no shard but the first ends.
    """
    folder, settings = str(folder), dict(SETTINGS)

    def make_run():
        # sent by value: what it needs is imported where it runs
        import os
        import signal
        import time
        from pathlib import Path

        from dynamics_samples import LennardJones

        from carryall.dynamics import relax

        potential, here = LennardJones(), Path(folder)

        def log(name, text):
            with (here / name).open("a") as stream:
                stream.write(f"{text}\n")

        log("made", os.getpid())

        def run(structures, *, out, resume):
            log("began", structures.number)
            if broken and structures.number in broken:
                raise broken[structures.number]
            until = time.monotonic() + 60
            while wait_for is not None and structures.number and not Path(wait_for).exists() and time.monotonic() < until:
                time.sleep(0.01)

            def told(one):
                log("results", one.index)
                if one.index == kill_after and not (here / "killed").exists():
                    (here / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            before = potential.n_calls
            relax(structures, potential, out=out, resume=resume, on_result=told, **settings)
            log("calls", f"{structures.number} {potential.n_calls - before}")

        return run

    return make_run


def logged(folder, name):
    path = Path(folder) / name
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def one_run(structures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    relax(structures, LennardJones(), out=folder, **SETTINGS)
    return folder


def test_a_killed_worker_loses_nothing_and_a_second_start_does_nothing(client, structures, one_run, tmp_path):
    make_run = making(tmp_path, kill_after=5)
    results = map_shards(client, make_run, structures, tmp_path / "out", shard_size=4)
    assert (tmp_path / "killed").exists()
    assert ledger_rows(tmp_path / "out") == ledger_rows(one_run)
    assert [one.index for one in results] == list(range(len(structures)))
    assert results.outcomes()["failed"] == 1
    assert (tmp_path / "out" / "results.csv").read_bytes() == (one_run / "results.csv").read_bytes()
    assert (tmp_path / "out" / "finished.extxyz").read_bytes() == (one_run / "relaxed.extxyz").read_bytes()
    # no input has come to its result twice, though its shard was begun twice; the kill came before others were told of
    told = Counter(logged(tmp_path, "results"))
    assert set(told.values()) == {1}
    assert set(map(str, range(len(structures)))) - set(told) < {"4", "6", "7"}
    assert Counter(logged(tmp_path, "began"))["1"] == 2
    makers = logged(tmp_path, "made")
    assert len(makers) == len(set(makers)) <= 3  # once in each worker process
    calls = logged(tmp_path, "calls")
    assert {line.split()[0] for line in calls} == {"0", "1", "2", "3"}
    again = map_shards(client, make_run, structures, tmp_path / "out", shard_size=4)
    assert len(again) == len(results)
    assert (logged(tmp_path, "calls"), logged(tmp_path, "made")) == (calls, makers)


def test_files_are_counted_and_read_by_the_workers(client, structures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_structures("a.xyz", structures[:3])
    write_structures("b.xyz.gz", structures[3:8])
    Path("c.xyz").write_text("2\nhalf a frame\nAr 0 0 0\n")
    write_structures("d.extxyz", structures[8:])
    paths = [Path(name) for name in ("a.xyz", "b.xyz.gz", "c.xyz", "absent.xyz", "d.extxyz")]
    relax(FrameStream(paths), LennardJones(), out="one", **SETTINGS)
    results = map_shards(client, making(tmp_path), paths, "out", shard_size=5)
    assert len(results) == len(structures) + 2
    assert ledger_rows(Path("out")) == ledger_rows(Path("one"))
    Path("a.xyz").unlink()
    write_structures("a.xyz", structures[:2])
    with pytest.raises(InputError, match=r"was begun with 17 inputs, 16 are given"):
        map_shards(client, making(tmp_path), paths, "out", shard_size=5)
    with pytest.raises(InputError, match=r"shard 0 .* was made of other files before"):
        map_shards(client, making(tmp_path), [*paths[1:], *paths[:1], *paths[:1]], "out", shard_size=5)


def test_shards_that_fail_are_told_and_the_others_go_on(client, structures, one_run, tmp_path):
    broken = {1: OSError("no space left"), 2: InputError("no such element")}
    with pytest.raises(
        ShardsFailed, match=r"2 of 4 shards failed \(1 to 2\), all others are done:\nshard 1: OSError: no"
    ) as info:
        map_shards(client, making(tmp_path, broken=broken), structures, tmp_path / "out", shard_size=4, retries=1)
    assert info.value.reasons == {1: "OSError: no space left", 2: "no such element"}
    # what a user has to mend is not tried again
    assert Counter(logged(tmp_path, "began")) == {"0": 1, "1": 2, "2": 1, "3": 1}
    with pytest.raises(InputError, match=r"2 of 4 shards in .* are not done: 1 to 2;"):
        merge_shards(tmp_path / "out")
    assert [one.index for one in merge_shards(tmp_path / "out", partial=True)] == [0, 1, 2, 3, 12, 13, 14]
    map_shards(client, making(tmp_path), structures, tmp_path / "out", shard_size=4)
    assert Counter(logged(tmp_path, "began")) == {"0": 1, "1": 3, "2": 2, "3": 1}
    assert ledger_rows(tmp_path / "out") == ledger_rows(one_run)


def test_a_shard_that_kills_its_workers_is_given_up(client, structures, tmp_path):
    scheduler = client.cluster.scheduler
    before, scheduler.allowed_failures = scheduler.allowed_failures, 0
    try:
        with pytest.raises(ShardsFailed, match=r"shard 0: workers died while they worked on it") as info:
            map_shards(client, making(tmp_path, kill_after=0), structures[:2], tmp_path / "out", shard_size=1, retries=0)
    finally:
        scheduler.allowed_failures = before
    assert list(info.value.reasons) == [0]
    assert [one.index for one in merge_shards(tmp_path / "out", partial=True)] == [1]
    map_shards(client, making(tmp_path), structures[:2], tmp_path / "out", shard_size=1)
    # its result was in its ledger before the worker died
    assert sorted(logged(tmp_path, "results")) == ["0", "1"]


def test_ctrl_c_ends_the_call_and_the_next_one_goes_on(client, structures, one_run, tmp_path, monkeypatch):
    make_run, shown = making(tmp_path, wait_for=tmp_path / "go"), []

    @contextmanager
    def bar(description, total, completed):
        def advance(steps, note):
            shown.append((steps, note))
            if len(shown) == 1:  # only the first shard ends, the others wait for a file
                os.kill(os.getpid(), signal.SIGINT)

        shown.clear()
        yield advance
        shown.append((description, total, completed))

    monkeypatch.setattr("carryall.engines.dask.progress_bar", bar)
    with pytest.raises(StopRequested, match=r"stopped: 3 of 4 shards that were to do are left, the same call goes on"):
        map_shards(client, make_run, structures, tmp_path / "out", shard_size=4)
    assert shown == [(4, "1 of 4 shards")]
    (tmp_path / "go").touch()
    monkeypatch.setattr(os, "kill", lambda *_: None)
    map_shards(client, make_run, structures, tmp_path / "out", shard_size=4)
    assert [note for _, note in shown[:3]] == ["2 of 4 shards", "3 of 4 shards", "4 of 4 shards"]
    assert shown[3:] == [("structures", 15, 4)]
    assert ledger_rows(tmp_path / "out") == ledger_rows(one_run)
    assert sorted(map(int, logged(tmp_path, "results"))) == list(range(len(structures)))


def test_what_cannot_work_is_refused_before_anything_is_sent(client, structures, tmp_path):
    with pytest.raises(InputError, match=r"client must be a distributed\.Client"):
        map_shards(None, making(tmp_path), structures, tmp_path / "out")
    with pytest.raises(InputError, match="make_run must be a function"):
        map_shards(client, "relax", structures, tmp_path / "out")
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"make_run cannot be sent to workers: .*lock"):
        map_shards(client, lambda: lock, structures, tmp_path / "out")
    weights = b"0" * 20_000_000
    with pytest.raises(InputError, match="make_run takes 20 MB, and is sent with each shard: load the potential inside it"):
        map_shards(client, lambda: weights, structures, tmp_path / "out")
    with pytest.raises(InputError, match="the data set takes 20 MB, and is sent with each shard: give a list"):
        map_shards(client, making(tmp_path), weights_as_data(weights), tmp_path / "out")
    with pytest.raises(InputError, match="retries must be an integer of at least 0"):
        map_shards(client, making(tmp_path), structures, tmp_path / "out", retries=-1)
    with pytest.raises(InputError, match="got generator: give a list"):
        map_shards(client, making(tmp_path), (one for one in structures), tmp_path / "out")
    with pytest.raises(InputError, match="no structures"):
        map_shards(client, making(tmp_path), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ShardsFailed, match=r"make_run has to return a function run\(structures, out=..., resume=...\)"):
        map_shards(client, lambda: None, structures, tmp_path / "out")


def weights_as_data(weights):
    class Heavy:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return weights

    return Heavy()


def test_workers_with_several_threads_are_refused(structures, tmp_path):
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as several,
        pytest.raises(InputError, match=r"has 2 threads, .*threads_per_worker=1"),
    ):
        map_shards(several, making(tmp_path), structures, tmp_path / "out")


def test_without_dask_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "carryall.engines.dask")
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[dask\]'"):
        importlib.import_module("carryall.engines.dask")


def blocks(title):
    page = (Path(__file__).parents[2] / "docs" / "high-throughput.md").read_text(encoding="utf-8")
    return re.findall(rf"```python{title}\n(.*?)```", page, re.DOTALL)


def test_the_page_runs(client, structures, one_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("structures").mkdir()
    write_structures("structures/a.xyz", structures[:8])
    write_structures("structures/b.xyz", structures[8:])
    write_structures("structures/all.xyz", structures)
    for name in ("screen.py", "screen_slurm.py", "one_shard.py"):
        Path(name).write_text(blocks(f' title="{name}"')[0])
    done = subprocess.run([sys.executable, "screen.py"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({"converged": 28, "failed": 2})
    shutil.move("out", "screened")
    # the SLURM script, with this test's workers in the place of jobs
    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=partial(Jobs, client.cluster)))
    screen = importlib.import_module("screen")
    monkeypatch.setitem(sys.modules, "screen", screen)
    cloudpickle.register_pickle_by_value(screen)
    try:
        runpy.run_path("screen_slurm.py", run_name="__main__")
    finally:
        cloudpickle.unregister_pickle_by_value(screen)
    assert capsys.readouterr().out.strip() == str({"converged": 14, "failed": 1})
    energies = [row[9] for row in ledger_rows(Path("screened"))]
    assert [row[9] for row in ledger_rows(Path("out"))] == energies[8:23]  # files are sorted: a, all, b
    monkeypatch.setattr(sys, "argv", ["one_shard.py", "0"])
    runpy.run_path("one_shard.py", run_name="__main__")
    merge_shards("array")
    assert ledger_rows(Path("array")) == ledger_rows(Path("screened"))
    of_a_pipeline, merging = blocks("")
    names = {"carryall": carryall}
    exec(compile(of_a_pipeline, "high-throughput.md", "exec"), names)
    results = names["make_run"]()(structures[:4], out=tmp_path / "pipeline", resume=True)
    assert results.outcomes() == {"step_budget": 4}
    exec(compile(merging, "high-throughput.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == len(structures)


class Jobs:
    """Stands in for dask-jobqueue's cluster, with workers that are there already."""

    def __init__(self, cluster, *, cores, processes, memory, walltime, queue, local_directory):
        assert cores == processes
        self.cluster = cluster

    def __getattr__(self, name):
        return getattr(self.cluster, name)

    def scale(self, jobs):
        assert jobs == 4

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
