"""Shards of a run: how inputs are divided, and how the shards' ledgers become one that is the ledger of a run in one piece."""

import gzip
import json
import sqlite3
import threading
import time
from functools import partial
from itertools import chain

import filelock
import numpy as np
import pytest
from dynamics_samples import LennardJones
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from screening_samples import argon_structures, ledger_rows

from carryall.cli.inputs import FrameStream
from carryall.data import AtomicData, write_structures
from carryall.dynamics import FIRE, ConvergenceHook, NVTLangevin, RelaxResult, Unreadable, relax, shards
from carryall.dynamics.blobs import content_hash, structure_to_bytes
from carryall.dynamics.ledger import Ledger, LedgerResults
from carryall.dynamics.shards import Plan, begin, divided, is_done, merge_shards, merged, run_shard, shard_folder
from carryall.dynamics.structure_files import STRIDE, FilePart, Mark, MeasuredFile, divided_files, measured
from carryall.errors import CarryallError, InputError

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -- division


class Numbers:
    """An indexed data set that counts what is read."""

    def __init__(self, n):
        self.n, self.n_read = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        self.n_read += 1
        return index


@given(n=st.integers(0, 300), size=st.integers(1, 70))
@example(n=70, size=70)
@example(n=71, size=70)
def test_shards_are_consecutive_and_hold_each_input_once(n, size):
    dataset = Numbers(n)
    found = list(divided(dataset, size))
    assert dataset.n_read == 0
    assert [one.number for one in found] == list(range(len(found)))
    assert list(chain.from_iterable(found)) == list(range(n))
    assert [list(one) for one in divided(list(range(n)), size)] == [list(one) for one in found]
    for one in found:
        assert next(iter(one)) == one.first_index == one.number * size
        assert len(one) == len(list(one)) == (size if one.number < len(found) - 1 else n - one.first_index)
        assert Plan(n, size).bounds(one.number) == (one.first_index, len(one))
    assert Plan(n, size).n_shards == len(found)


@given(counts=st.lists(st.integers(0, 3 * STRIDE), max_size=8), size=st.integers(1, 250))
def test_files_are_divided_by_their_inputs(counts, size):
    marks = [tuple(Mark(1000 * k, 50 * k, STRIDE * k) for k in range(-(-count // STRIDE))) for count in counts]
    files = [MeasuredFile(f"/f{i}", f"f{i}", count, marks[i] if i % 2 else ()) for i, count in enumerate(counts)]
    parts = list(divided_files(files, size))
    assert [sum(map(len, one)) for one in parts[:-1]] == [size] * max(len(parts) - 1, 0)
    whole = [(f"f{i}", k) for i, count in enumerate(counts) for k in range(count)]
    assert [(part.name, part.first + k) for one in parts for part in one for k in range(part.count)] == whole
    for part in chain.from_iterable(parts):
        assert part.count > 0
        # reading begins at the last mark before the first input
        expected = part.first // STRIDE * STRIDE if part.name[1:] in "1357" else 0
        assert part.mark.frames == expected
    if files:
        bounds = [(one.first_index, len(one)) for one in divided(files, size)]
        assert bounds == [Plan(len(whole), size).bounds(k) for k in range(len(bounds))]


def test_an_item_that_a_data_set_cannot_read_is_unreadable():
    class Broken(Numbers):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    assert list(chain.from_iterable(divided(Broken(5), 2))) == [0, 1, 2, Unreadable("OSError: the disk is gone"), 4]


@pytest.mark.parametrize("given_", [(i for i in range(3)), AtomicData([[0, 0, 0]], [18]), "a.xyz", {"a": 1}])
def test_what_has_no_order_or_length_is_refused(given_):
    with pytest.raises(InputError, match="shards are made of files, or of a data set"):
        list(divided(given_, 2))


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="shard_size must be an integer of at least 1"):
        list(divided([1, 2], size))


# -- files


def frame(n_atoms, x, end="\n"):
    rows = [f"Ar {x} {i} 0.5" for i in range(n_atoms)]
    return end.join([str(n_atoms), f"Properties=species:S:1:pos:R:3 tag={x}", *rows, ""])


BAD = {"word": "Ar 0 zero 0\n", "count": "four\nAr\n", "short": "5\ncomment\nAr 0 0 0\n", "empty": "0\n\n", "negative": "-3\n"}
piece = st.one_of(st.integers(1, 4), st.sampled_from(["\n", "  \n", *BAD]))


@FEW
@given(
    pieces=st.lists(piece, max_size=40), size=st.integers(1, 17), stride=st.integers(1, 6), end=st.sampled_from(["\n", "\r\n"])
)
@example(pieces=[], size=1, stride=1, end="\n")
@example(pieces=[2, 2, "word", 3, "count"], size=2, stride=1, end="\n")
@example(pieces=[1, 1, 1, 1, "short"], size=3, stride=2, end="\n")
def test_parts_of_a_file_read_what_the_whole_file_reads(tmp_path, monkeypatch, pieces, size, stride, end):
    monkeypatch.setattr("carryall.dynamics.structure_files.STRIDE", stride)
    text = [frame(p, i, end) if isinstance(p, int) else p for i, p in enumerate(pieces)]
    text = [f"1{end}c{end}{BAD['word']}" if p == "word" else BAD.get(p, one) for p, one in zip(pieces, text, strict=True)]
    path = tmp_path / "some.xyz"
    path.write_bytes("".join(text).encode())
    expected = [told(one) for one in FrameStream([path])]
    for name in (path, tmp_path / "some.xyz.gz"):
        if name != path:
            name.write_bytes(gzip.compress(path.read_bytes()))
            expected = [told(one) for one in FrameStream([name])]
        file = measured(name)
        assert file.n_inputs == len(expected)
        found = [[told(one) for part in parts for one in part] for parts in divided_files([file], size)]
        assert list(chain.from_iterable(found)) == expected
        assert all(len(one) == size for one in found[:-1])


def told(one):
    return one.source, one.frame, one.reason, None if one.data is None else structure_to_bytes(one.data)


def test_bytes_that_are_no_text_cost_the_frames_from_there_on(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_bytes(frame(2, 0).encode() + frame(1, 1).encode() + b"1\n\xff\xfe\nAr 0 0 0\n" + frame(1, 3).encode())
    file = measured("a.xyz", tmp_path)
    assert (file.n_inputs, file.name) == (3, "a.xyz")
    found = [one for part in chain.from_iterable(divided_files([file], 1)) for one in part]
    assert [one.data is None for one in found] == [False, False, True]
    assert found[2].reason.startswith("a.xyz: cannot be read: 'utf-8' codec")


def test_other_formats_are_counted_by_reading_them(tmp_path):
    pytest.importorskip("ase")
    structures = argon_structures(3)
    write_structures(tmp_path / "a.traj", structures)
    (tmp_path / "b.cif").write_text("nonsense")
    files = [measured(name, tmp_path) for name in ("a.traj", "b.cif", "absent.cif")]
    assert [one.n_inputs for one in files] == [3, 1, 1]
    found = [one for part in chain.from_iterable(divided_files(files, 2)) for one in part]
    assert [(one.source, one.frame, one.data is None) for one in found] == [
        ("a.traj", 0, False),
        ("a.traj", 1, False),
        ("a.traj", 2, False),
        ("b.cif", None, True),
        ("absent.cif", None, True),
    ]
    assert found[4].reason.startswith("absent.cif: no such file or folder")
    assert str(tmp_path) not in found[3].reason


def test_a_file_that_lost_structures_is_told(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(frame(1, 0) + frame(1, 1))
    (part,) = next(iter(divided_files([measured(path)], 5)))
    assert isinstance(part, FilePart)
    path.write_text(frame(1, 0))
    with pytest.raises(InputError, match="it has 1 structures, and had at least 2 when the run was divided"):
        list(part)


# -- the ledger of all


def outcome(index, kind):
    if kind == "unreadable":
        return RelaxResult(index, "failed", "it could not be read", 0, None, None, None, f"f{index}.xyz", None)
    data = AtomicData(np.full((2, 3), float(index)) + np.array([[0, 0, 0], [1, 0, 0]]), [18, 18])
    if kind == "failed":
        return RelaxResult(index, "failed", "it exploded", 3, None, None, data, "f.xyz", index)
    return RelaxResult(index, kind, None, index % 7, -0.1 * index, 0.01, data)


def record(structures, *, out, resume, facts=None):
    """A run that knows at once what becomes of its inputs."""
    with Ledger(out, facts or {"fmax": 0.05}, resume) as ledger:
        for index, kind in enumerate(structures, getattr(structures, "first_index", 0)):
            if index in ledger:
                continue
            one = outcome(index, kind)
            ledger.add([one], {} if one.structure is None else {index: content_hash(one.structure)})


@FEW
@given(
    kinds=st.lists(st.sampled_from(["converged", "step_budget", "failed", "unreadable"]), min_size=1, max_size=30),
    size=st.integers(1, 32),
    order=st.randoms(use_true_random=False),
)
def test_the_merged_ledger_is_that_of_one_run(tmp_path_factory, kinds, size, order):
    folder = tmp_path_factory.mktemp("merge")
    record(kinds, out=folder / "one", resume=False)
    begin(folder / "many", len(kinds), size, resume=False)
    todo = list(divided(kinds, size))
    order.shuffle(todo)
    for one in todo:
        assert not is_done(folder / "many", one)
        run_shard(record, one, folder / "many")
        assert is_done(folder / "many", one)
    results = merge_shards(folder / "many")
    assert ledger_rows(folder / "many") == ledger_rows(folder / "one")
    assert [one.index for one in results] == list(range(len(kinds)))
    rows = (folder / "many" / "results.csv").read_text().splitlines()[2:]
    assert [row.split(",")[0] for row in rows] == [str(index) for index in range(len(kinds))]
    lost = {"failed", "unreadable"}
    assert (folder / "many" / "finished.extxyz").exists() == any(kind not in lost for kind in kinds)
    facts = {key: json.loads(value) for key, value in ledger_rows(folder / "many", "run")}
    assert (facts["settings"], facts["n_inputs"]) == ({"fmax": 0.05}, len(kinds))
    assert facts["merged"] == {"shards": len(todo), "of": len(todo)}
    assert not (folder / "many" / ".merging").exists()


def made(folder, n=10, size=3, numbers=None):
    """Shards of ten inputs, those of `numbers` done."""
    kinds = ["converged"] * n
    begin(folder, n, size, resume=True)
    for one in divided(kinds, size):
        if numbers is None or one.number in numbers:
            run_shard(record, one, folder)
    return kinds


def test_missing_shards_are_named_and_the_others_can_be_merged(tmp_path):
    made(tmp_path, 20, 2, numbers=(1, 4, 5, 9))
    with pytest.raises(InputError, match=r"6 of 10 shards in .* are not done: 0, 2 to 3, 6 to 8; "):
        merge_shards(tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()
    assert [one.index for one in merge_shards(tmp_path, partial=True)] == [2, 3, 8, 9, 10, 11, 18, 19]
    assert merged(tmp_path) is None
    made(tmp_path, 20, 2)
    assert [one.index for one in merge_shards(tmp_path)] == list(range(20))
    assert len(merged(tmp_path)) == 20


def test_a_merge_that_is_broken_off_leaves_what_was_there(tmp_path, monkeypatch):
    made(tmp_path, numbers=(0, 1))
    merge_shards(tmp_path, partial=True)
    before = ledger_rows(tmp_path)
    made(tmp_path)
    whole, copied = shards._copy, []

    def broken(ledger, folder):
        if len(copied) == 2:
            raise OSError("no space left on device")
        copied.append(folder)
        whole(ledger, folder)

    monkeypatch.setattr(shards, "_copy", broken)
    with pytest.raises(OSError, match="no space left"):
        merge_shards(tmp_path)
    assert ledger_rows(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / ".merging").mkdir()  # as a kill leaves it
    (tmp_path / ".merging" / "ledger.sqlite").write_bytes(b"half")
    assert len(merge_shards(tmp_path)) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DELETE FROM systems WHERE id = 4", r"one result for each of inputs 3 to 5, and has inputs 3 to 5, 2 of them, 2 done"),
        ("UPDATE systems SET id = 7 WHERE id = 5", r"inputs 3 to 5, and has inputs 3 to 7, 3 of them, 3 done"),
        ("UPDATE systems SET state = 'in_stage' WHERE id = 3", "3 of them, 2 done"),
        ("DELETE FROM systems", "and has none"),
        (
            """UPDATE run SET value = '{"fmax": 0.1}' WHERE key = 'settings'""",
            r"00001 was run with fmax = 0.1, .*00000 with 0.05",
        ),
    ],
)
def test_a_shard_that_is_not_what_it_says_is_told(tmp_path, change, message):
    made(tmp_path)
    database = sqlite3.connect(shard_folder(tmp_path, 1) / "ledger.sqlite")
    with database:
        database.execute(change)
    database.close()
    with pytest.raises(InputError, match=message):
        merge_shards(tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_other_runs_are_not_overwritten(tmp_path):
    record(["converged"], out=tmp_path, resume=False)
    with pytest.raises(InputError, match="holds a run without shards already"):
        begin(tmp_path, 3, 1, resume=True)
    made(tmp_path / "b")
    record(["converged"], out=tmp_path / "b", resume=False)
    with pytest.raises(InputError, match="was not made of shards"):
        merge_shards(tmp_path / "b")
    with pytest.raises(InputError, match="holds no shards"):
        merge_shards(tmp_path / "c")


def test_the_plan_has_to_be_the_same(tmp_path):
    begin(tmp_path, 10, 3, resume=False)
    for n, size, resume, message in (
        (10, 3, False, "holds shards of a run already"),
        (10, 4, True, "was divided with shard_size=3, not 4"),
        (9, 3, True, "was begun with 10 inputs, 9 are given"),
        (0, 3, True, "no structures"),
    ):
        with pytest.raises(InputError, match=message):
            begin(tmp_path, n, size, resume)
    (tmp_path / "shards" / "plan.json").write_text("{")
    with pytest.raises(CarryallError, match=r"plan.json is damaged"):
        begin(tmp_path, 10, 3, resume=True)


def test_more_inputs_may_come_at_the_end(tmp_path):
    made(tmp_path, 10, 4)
    merge_shards(tmp_path)
    made(tmp_path, 13, 4)
    assert [one.index for one in merge_shards(tmp_path)] == list(range(13))


def test_other_files_are_told(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.xyz").write_text(frame(1, 0) + frame(1, 1))
    ((one,), (other,)) = (list(divided([measured(tmp_path / f"{name}.xyz")], 4)) for name in "ab")
    begin(tmp_path / "out", 2, 4, resume=True)
    run_shard(lambda inputs, **kw: record(["converged"] * len(inputs), **kw), one, tmp_path / "out")
    assert is_done(tmp_path / "out", one)
    with pytest.raises(InputError, match=r"shard 0 .inputs 0 to 1. was made of other files before"):
        is_done(tmp_path / "out", other)


def test_a_run_that_does_not_do_its_work_is_told(tmp_path):
    begin(tmp_path, 4, 2, resume=True)
    first, second = divided(["converged"] * 4, 2)
    with pytest.raises(InputError, match="its run has to write to the folder that it is given"):
        run_shard(lambda inputs, **kw: None, first, tmp_path)
    with pytest.raises(InputError, match="one result for each of inputs 0 to 1, and has inputs 0 to 0, 1 of them"):
        run_shard(lambda inputs, **kw: record(["failed"], **kw), first, tmp_path)
    run_shard(record, first, tmp_path)
    worked = []

    def other(inputs, **kw):
        record(inputs, **kw, facts={"fmax": 0.1})
        worked.append(inputs)

    # before any work
    with pytest.raises(InputError, match=r"00001 was begun with fmax = 0.05, this run has fmax = 0.1"):
        run_shard(other, second, tmp_path)
    assert not worked
    run_shard(record, second, tmp_path)


def test_a_shard_waits_for_who_works_on_it(tmp_path, caplog):
    begin(tmp_path, 2, 2, resume=True)
    (one,) = divided(["converged"] * 2, 2)
    runs, entered, go = [], threading.Event(), threading.Event()

    def slow(inputs, **kw):
        runs.append(inputs)
        entered.set()
        assert go.wait(60)
        record(inputs, **kw)

    first = threading.Thread(target=run_shard, args=(slow, one, tmp_path))
    first.start()
    assert entered.wait(60)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(shard_folder(tmp_path, 0) / "task.lock").acquire(timeout=0)
    second = threading.Thread(target=run_shard, args=(slow, one, tmp_path, 0.01))
    second.start()
    until = time.monotonic() + 60
    while "00000: another process works on this shard" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    go.set()
    first.join(60)
    second.join(60)
    assert len(runs) == 1
    assert "waiting until it ends" in caplog.text
    assert is_done(tmp_path, one)


# -- with real runs


def langevin(structures, *, out, resume):
    """Relaxation, then noise, which goes by the number of a system."""
    potential = LennardJones()
    relaxing = FIRE(potential, convergence_hook=ConvergenceHook.from_fmax(0.05), n_steps=30)
    heating = NVTLangevin(potential, timestep=2.0, temperature=40.0, n_steps=5, seed=3)
    return (relaxing | heating).run(structures, out=out, resume=resume, progress=False)


relaxing = partial(relax, potential=LennardJones(), max_steps=20, errors="set_aside", progress=False, max_atoms_per_batch=60)


@pytest.mark.parametrize("run", [relaxing, langevin])
def test_shards_of_real_runs_are_one_run(run, tmp_path):
    structures = [*argon_structures(7, largest=8), Unreadable("it is not there"), AtomicData([[0, 0, 0]], [1])]
    run(structures, out=tmp_path / "one", resume=False)
    begin(tmp_path / "many", len(structures), 4, resume=False)
    for one in divided(structures, 4):
        run_shard(run, one, tmp_path / "many")
    results = merge_shards(tmp_path / "many")
    assert ledger_rows(tmp_path / "many") == ledger_rows(tmp_path / "one")
    assert LedgerResults(tmp_path / "one").outcomes() == results.outcomes()
    assert results.outcomes()["failed"] == 2
    assert (tmp_path / "many" / "results.csv").read_bytes() == (tmp_path / "one" / "results.csv").read_bytes()
