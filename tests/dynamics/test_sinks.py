"""Sinks: what goes in comes out, in order, whatever the keys; nothing is lost when they are full or their process is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
import torch
from sink_writer import KINDS, structure

from carryall.data import AtomicData, Batch, read_structures
from carryall.dynamics.buffers import BufferConfig
from carryall.dynamics.sinks import DataSink, ExtXYZSink, HDF5Sink, MemorySink, SinkFullError, read_hdf5, write_in_order
from carryall.dynamics.sinks.swmr import clear_marks, lookup3
from carryall.errors import InputError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)
MAKERS = ("memory", "h5", "extxyz")


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    """A function that makes a sink of one kind; each call with another name, or the same for reopening."""

    def made(capacity=None, name="results"):
        if request.param == "memory":
            return MemorySink(capacity)
        return KINDS[request.param](tmp_path / f"{name}.{request.param}", capacity)

    made.kind = request.param
    made.on_disk = request.param != "memory"
    return made


def rich(*sizes, seed=0, cell=True):
    """Structures with a key of every dtype on each level but that of edges, and facts."""
    rng = np.random.default_rng(seed)
    found = []
    for n in sizes:
        atom = {f"a_{i}": some(rng, dtype, (n, *((2,) if i % 2 else ()))) for i, dtype in enumerate(DTYPES)}
        system = {f"s_{i}": some(rng, dtype, ((), (3,), (2, 2))[i % 3]) for i, dtype in enumerate(DTYPES)}
        found.append(
            AtomicData(
                rng.normal(size=(n, 3)),
                rng.integers(1, 119, n),
                rng.normal(size=(3, 3)) if cell else None,
                pbc=[True, False, True],
                charges=rng.normal(size=n),
                forces=torch.from_numpy(rng.normal(size=(n, 3))).float(),
                energy=rng.normal(),
                stress=rng.normal(size=(3, 3)),
                info={"name": f"s{rng.integers(10**9)}", "nested": {"k": [1, 2]}, "number": 3, "text": 'a "b"\n= c'},
                atom_extras=atom,
                system_extras=system,
            )
        )
    return found


def some(rng, dtype, shape):
    if dtype.is_floating_point:
        return torch.from_numpy(np.asarray(rng.normal(size=shape))).to(dtype)
    return torch.from_numpy(np.asarray(rng.integers(0, 2 if dtype == torch.bool else 200, size=shape))).to(dtype)


def assert_same(found, expected, keys=None):
    """Systems of a batch and structures: every key, dtype, shape and fact."""
    assert found.n_systems == len(expected)
    wanted = Batch.from_data_list(expected)
    assert set(found.keys()) == set(keys or wanted.keys())
    assert found.atom_counts == wanted.atom_counts
    for key in keys or wanted.keys():
        assert found.level_of(key) == wanted.level_of(key)
        assert found.get(key).dtype == wanted.get(key).dtype, key
        torch.testing.assert_close(found.get(key), wanted.get(key), rtol=0, atol=0, equal_nan=True)
    assert found.info == wanted.info


# -- the protocol, all kinds


def test_what_goes_in_comes_out_in_order(make):
    structures = rich(3, 1, 0, 5, 2)
    batch = Batch.from_data_list(structures)
    with make() as sink:
        assert isinstance(sink, DataSink)
        assert (len(sink), sink.capacity, sink.is_full, bool(sink)) == (0, None, False, True)
        with pytest.raises(InputError, match="holds no system"):
            sink.read()
        sink.write(batch, torch.tensor([False, True, False, True, False]))
        sink.write(batch)
        sink.write(batch, np.zeros(5, dtype=bool))
        sink.write(batch.index_select([]))
        order = [1, 3, 0, 1, 2, 3, 4]
        assert len(sink) == 7
        assert_same(sink.read(), [structures[i] for i in order])
        assert_same(sink.read(), [structures[i] for i in order])
        assert f"{type(sink).__name__}(7 systems" in repr(sink)
        assert_same(sink.drain(), [structures[i] for i in order])
        assert len(sink) == 0
        with pytest.raises(InputError, match="holds no system"):
            sink.drain()
        sink.write(batch, [True, False, False, False, False])
        assert_same(sink.read(), structures[:1])
        sink.zero()
        assert len(sink) == 0
    assert_same(batch, structures)


def test_a_copy_is_kept(make):
    batch = Batch.from_data_list(rich(2, 3))
    expected = batch.clone()
    with make() as sink:
        sink.write(batch)
        batch.positions += 1
        batch.info[0]["name"] = "changed"
        found = sink.read()
        torch.testing.assert_close(found.positions, expected.positions, rtol=0, atol=0)
        assert found.info == expected.info
        found.positions *= 2
        torch.testing.assert_close(sink.read().positions, expected.positions, rtol=0, atol=0)


def test_what_exploded_is_kept_as_it_is(make):
    batch = Batch.from_data_list(rich(2, 3))
    batch.positions = batch.positions.index_fill(0, torch.tensor([0, 4]), float("nan"))
    batch.energy = torch.tensor([float("inf"), float("nan")], dtype=torch.float64)
    batch.cell = batch.cell.index_fill(0, torch.tensor([1]), float("nan"))
    batch.info[0]["failure"] = "energy or forces are not finite"
    with make() as sink:
        sink.write(batch)
        found = sink.read()
        for key in ("positions", "energy", "cell"):
            torch.testing.assert_close(found.get(key), batch.get(key), rtol=0, atol=0, equal_nan=True)
        assert found.info == batch.info


def test_more_than_fits_is_refused_before_anything_is_written(make):
    batch = Batch.from_data_list(rich(1, 2, 3))
    with make(capacity=4) as sink:
        sink.write(batch)
        assert (sink.capacity, sink.is_full) == (4, False)
        with pytest.raises(
            SinkFullError, match=r"2 systems do not fit .*it holds 3 of 4, 1 more fit; nothing was written"
        ) as caught:
            sink.write(batch, [True, False, True])
        assert caught.value.fits == 1
        assert len(sink) == 3
        sink.write(batch, [False, True, False])
        assert sink.is_full
        assert sink.read().atom_counts == [1, 2, 3, 2]
        sink.zero()
        assert not sink.is_full
    with make(capacity=0, name="none") as sink:
        assert sink.is_full
        sink.write(batch, [False] * 3)
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="capacity"):
            make(capacity=wrong, name="wrong")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"mask has shape \(1,\), but the batch has 2 systems"),
        (torch.tensor([1, 0]), "mask must be true or false for each of the 2 systems"),
        ([[True, True]], r"mask has shape \(1, 2\)"),
    ],
)
def test_a_wrong_mask_is_named(make, mask, message):
    with make() as sink:
        with pytest.raises(InputError, match=message):
            sink.write(Batch.from_data_list(rich(1, 2)), mask)
        assert len(sink) == 0


def test_batches_of_different_keys_are_read_as_one(make):
    """Trap 20: scratch rows of another width, and keys that only some systems have, must not lock the results in."""
    one, two, three = (Batch.from_data_list([one]) for one in rich(2, 3, 1))
    one.set("scratch", torch.ones(2, 4, dtype=torch.int64), level="atom")
    two.set("scratch", torch.full((3, 6), 2, dtype=torch.int64), level="atom")
    two.set("velocities", torch.ones(3, 3, dtype=torch.float64))
    two.set("flag", torch.tensor([True]), level="system")
    three.remove("energy")
    three.set("s_4", torch.tensor([[0.5, 1.5]], dtype=torch.float32), level="system")
    with make() as sink:
        for part in (one, two, three):
            sink.write(part)
        found = sink.read()
    assert found.n_systems == 3
    assert found.scratch.tolist() == [[1, 1, 1, 1, 0, 0]] * 2 + [[2] * 6] * 3 + [[0] * 6]
    assert found.velocities.isnan().tolist() == [[True] * 3] * 2 + [[False] * 3] * 3 + [[True] * 3]
    assert found.energy.tolist()[:2] == [float(one.energy), float(two.energy)]
    assert found.energy[2].isnan()
    assert found.get("flag").tolist() == [False, True, False]
    assert [info.get("filled_keys") for info in found.info] == [
        ["flag", "velocities"],
        None,
        ["energy", "flag", "scratch", "velocities"],
    ]
    # s_4 is an integer of shape (3,) in two systems and two floats in the last.
    assert found.get("s_4").dtype == torch.float64
    assert found.get("s_4")[0].tolist() == one.get("s_4")[0].tolist()
    assert found.get("s_4")[2].tolist()[:2] == [0.5, 1.5]
    assert found.get("s_4")[2, 2].isnan()
    assert found.info[0]["padded_keys"] == {"scratch": [4]}
    assert found.info[2]["padded_keys"] == {"s_4": [2]}
    torch.testing.assert_close(found.positions, torch.cat([one.positions, two.positions, three.positions]), rtol=0, atol=0)


def test_a_key_that_changes_its_level_is_refused_when_it_is_written(make):
    one, two = (Batch.from_data_list([one]) for one in rich(2, 3))
    one.set("x", torch.ones(1), level="system")
    two.set("x", torch.ones(3), level="atom")
    with make() as sink:
        sink.write(one)
        with pytest.raises(InputError, match="'x' is of level 'atom', but was written with level 'system' before"):
            sink.write(two)
        assert len(sink) == 1
        assert sink.read().get("x").tolist() == [1.0]


def test_sinks_are_filled_in_order(make):
    batch = Batch.from_data_list(rich(1, 2, 3, 4, 5))
    with make(capacity=2, name="first") as first, MemorySink(capacity=1) as second, MemorySink() as third:
        write_in_order([first, second, third], batch, [True, True, False, True, True])
        assert [one.read().atom_counts for one in (first, second, third)] == [[1, 2], [4], [5]]
        write_in_order([first, second, third], batch, [False, False, True, False, False])
        assert third.read().atom_counts == [5, 3]
        with pytest.raises(SinkFullError, match="5 systems do not fit into the 2 sinks: 0 fit, nothing was written") as caught:
            write_in_order([first, second], batch)
        assert caught.value.fits == 0
        first.zero()
        with pytest.raises(SinkFullError, match="2 fit"):
            write_in_order([first, second], batch)
        assert [len(one) for one in (first, second, third)] == [0, 1, 2]
    with pytest.raises(SinkFullError):
        write_in_order([], batch)
    write_in_order([], batch, [False] * 5)


def test_a_sink_that_fails_says_what_the_others_have():
    class Broken(MemorySink):
        def write(self, batch, mask=None):
            raise OSError("no space left")

    batch = Batch.from_data_list(rich(1, 2, 3))
    first = MemorySink(capacity=1)
    with pytest.raises(OSError, match="no space") as caught:
        write_in_order([first, Broken()], batch, [False, True, True])
    assert caught.value.__notes__[0].startswith("systems [1] of the batch are in the sinks before Broken(")
    assert first.read().atom_counts == [2]


# -- files


@pytest.mark.parametrize("kind", ["h5", "extxyz"])
def test_a_file_is_gone_on_with(tmp_path, kind):
    structures = rich(3, 1, 2)
    path = tmp_path / f"results.{kind}"
    for i, one in enumerate(structures):
        with KINDS[kind](path, capacity=3) as sink:
            assert len(sink) == i
            sink.write(Batch.from_data_list([one]))
        with pytest.raises(InputError, match="closed"):
            sink.write(Batch.from_data_list([one]))
    with KINDS[kind](path, capacity=3) as sink:
        assert sink.is_full
        assert_same(sink.read(), structures)
        with pytest.raises(InputError, match="another process, or another sink, writes to it"):
            KINDS[kind](path)
    with KINDS[kind](path) as sink:
        sink.zero()
    with KINDS[kind](path) as sink:
        assert len(sink) == 0
    with pytest.raises(InputError, match="does not exist"):
        KINDS[kind](tmp_path / "none" / path.name)


@pytest.mark.parametrize("kind", ["h5", "extxyz"])
def test_something_else_is_left_alone(tmp_path, kind):
    path = tmp_path / f"other.{kind}"
    path.write_bytes(b"something else, of more than forty-eight bytes in all\n")
    with pytest.raises(InputError, match="is not"):
        KINDS[kind](path)
    assert path.read_bytes().startswith(b"something else, of more")
    if kind == "h5":
        with h5py.File(path, "w", libver="v110") as file:
            file.attrs["format"] = "a trajectory"
        before = path.read_bytes()
        for opened in (HDF5Sink, read_hdf5):
            with pytest.raises(InputError, match="not a sink of carryall"):
                opened(path)
        assert path.read_bytes() == before
        with pytest.raises(InputError, match="no such file"):
            read_hdf5(tmp_path / "none.h5")


def test_hdf5_is_plain_to_other_readers_also_while_it_is_written(tmp_path):
    structures = rich(3, 1, 2)
    path = tmp_path / "results.h5"
    with HDF5Sink(path) as sink:
        sink.write(Batch.from_data_list(structures[:2]))
        program = (
            "import sys, h5py\n"
            "with h5py.File(sys.argv[1], 'r', swmr=True) as file:\n"
            "    n = int(file['committed'][0]); table = file['tables/0']\n"
            "    counts, energies = (table[name][:n].tolist() for name in ('atom_counts', 'system/energy'))\n"
            "    print(n, counts, table['atom/positions'].shape, energies)\n"
        )
        out = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
        energies = [float(one.energy) for one in structures[:2]]
        assert out.strip() == f"2 [3, 1] (4, 3) {energies}"
        assert_same(read_hdf5(path), structures[:2])
        sink.write(Batch.from_data_list(structures[2:]))
    with h5py.File(path, "r") as file:
        assert file["tables/0/atom/a_8"].dtype == bool
        assert json.loads(file["tables/0"].attrs["keys"])[0][0] == "system"
    with HDF5Sink(tmp_path / "none.h5"), pytest.raises(InputError, match="holds no system"):
        read_hdf5(tmp_path / "none.h5")


def test_hdf5_keeps_edges_facts_and_odd_names(tmp_path):
    info = {"array": np.arange(4).reshape(2, 2), "texts": np.array(["a", "b"]), "one": np.float32(1.5), "tuple": (1, 2)}
    one = AtomicData(
        np.zeros((3, 3)),
        [1, 1, 8],
        edge_index=[[0, 1], [2, 0]],
        edge_extras={"shift": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)},
        system_extras={"a/b": 1.0, "a%2Fb": 2.0, ".": 3.0, "empty": torch.zeros(0, 2)},
        info=info,
    )
    path = tmp_path / "results.h5"
    with HDF5Sink(path) as sink:
        sink.write(Batch.from_data_list([one, one]))
        found = sink.read()
    assert found.edge_index.tolist() == [[0, 1], [2, 0], [3, 4], [5, 3]]
    assert found.get("shift").tolist() == [[1, 2], [3, 4]] * 2
    assert [found.get(name).tolist() for name in ("a/b", "a%2Fb", ".")] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert found.get("empty").shape == (2, 0, 2)
    kept = found.info[1]
    np.testing.assert_array_equal(kept["array"], info["array"])
    np.testing.assert_array_equal(kept["texts"], info["texts"])
    assert (kept["one"], kept["tuple"]) == (1.5, [1, 2])


def test_extxyz_is_read_by_others(tmp_path):
    structures = rich(3, 2)
    path = tmp_path / "results.extxyz"
    with ExtXYZSink(path) as sink:
        sink.write(Batch.from_data_list(structures))
    for one, atoms, again in zip(structures, ase.io.read(path, ":"), read_structures(path), strict=True):
        np.testing.assert_array_equal(atoms.positions, one.positions)
        np.testing.assert_array_equal(atoms.cell, one.cell)
        np.testing.assert_array_equal(atoms.get_forces(), one.forces)
        assert atoms.info["s_4"].tolist() == one.system_extras["s_4"].tolist()
        assert atoms.info["name"] == one.info["name"]
        assert torch.equal(again.positions, one.positions)
        assert torch.equal(again.stress, one.stress)
    with path.open("a") as file:
        file.write("1\nProperties=species:S:1:pos:R:3\nH 0 0 0\n")
    with ExtXYZSink(path) as sink:
        assert len(sink) == 3
        with pytest.raises(InputError, match="frame 2: the comment line has no batch_keys: no sink wrote it"):
            sink.read()
    with pytest.raises(InputError, match=r"\.gz"):
        ExtXYZSink(tmp_path / "results.extxyz.gz")


def test_extxyz_keeps_velocities_masks_and_facts_named_like_labels(tmp_path):
    rng = np.random.default_rng(0)
    one = AtomicData(
        rng.normal(size=(3, 3)),
        [1, 8, 8],
        velocities=rng.normal(size=(3, 3)),
        energy=1.5,
        forces=rng.normal(size=(3, 3)),
        info={"energy": "low", "labels": np.array(["a", "b", "c"])},
        atom_extras={"move_mask": torch.tensor([[True] * 3, [False] * 3, [True] * 3])},
    )
    with ExtXYZSink(tmp_path / "results.extxyz") as sink:
        sink.write(Batch.from_data_list([one]))
        found = sink.read()
        torch.testing.assert_close(found.velocities, one.velocities, rtol=1e-15, atol=0)
        assert found.energy.tolist() == [1.5]
        assert torch.equal(found.forces, one.forces)
        assert torch.equal(found.get("move_mask"), one.atom_extras["move_mask"])
        assert found.info[0]["energy"] == "low"
        assert found.info[0]["labels"].tolist() == ["a", "b", "c"]
        for name in ("pos", "with space"):
            wrong = one.replace(atom_extras={name: [1, 2, 3]})
            with pytest.raises(InputError, match="rename it"):
                sink.write(Batch.from_data_list([one, wrong], fill={name: 0, "move_mask": True}))
        assert len(sink) == 1
        assert sink.read().n_systems == 1


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_a_torn_frame_is_cut_off(tmp_path, cut):
    structures = rich(3, 1, 2)
    path = tmp_path / "results.extxyz"
    with ExtXYZSink(path) as sink:
        sink.write(Batch.from_data_list(structures))
    path.write_bytes(path.read_bytes()[:-cut])
    with ExtXYZSink(path) as sink:
        assert len(sink) == 2
        sink.write(Batch.from_data_list(structures[2:]))
        assert_same(sink.read(), structures)


def test_a_write_to_hdf5_that_fails_leaves_nothing(tmp_path, monkeypatch):
    structures = rich(3, 1, 2)
    with HDF5Sink(tmp_path / "results.h5") as sink:
        sink.write(Batch.from_data_list(structures[:1]))
        real, calls = sink._tables[0].add, []

        def interrupted(batch):
            real(batch)
            calls.append(batch)
            raise KeyboardInterrupt

        monkeypatch.setattr(sink._tables[0], "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sink.write(Batch.from_data_list(structures[1:]))
        assert len(calls) == 1
        monkeypatch.undo()
        assert_same(sink.read(), structures[:1])
        sink.write(Batch.from_data_list(structures[2:]))
        assert_same(sink.read(), [structures[0], structures[2]])
    with HDF5Sink(tmp_path / "results.h5") as sink:
        assert_same(sink.read(), [structures[0], structures[2]])


def test_the_checksum_is_the_published_one(tmp_path):
    """The driver of lookup3.c prints these two."""
    assert lookup3(b"") == 0xDEADBEEF
    assert lookup3(b"Four score and seven years ago") == 0x17770551
    path = tmp_path / "plain.h5"
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file["x"] = [1, 2]
    before = path.read_bytes()
    assert lookup3(before[:44]) == int.from_bytes(before[44:48], "little")
    clear_marks(path)
    assert path.read_bytes() == before


# -- kill -9

KILLS = int(os.environ.get("CARRYALL_KILLS", "6"))
"""How often each kind of writer is killed; give the environment a larger number to try harder."""


@pytest.fixture(scope="module")
def writers():
    """The process that starts writers."""
    command = [sys.executable, str(Path(__file__).with_name("sink_writer.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.stdin.close()


@pytest.mark.parametrize("kind", ["h5", "extxyz"])
def test_a_killed_writer_loses_nothing(tmp_path, kind, writers):
    path = tmp_path / f"results.{kind}"
    rng, safe = random.Random(kind), 0
    for _ in range(KILLS):
        writers.stdin.write(f"{kind} {path}\n")
        writers.stdin.flush()
        pid, found = map(int, writers.stdout.readline().split())
        assert safe <= found <= safe + 5
        time.sleep(rng.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        safe = found
        while (line := writers.stdout.readline()) != "gone\n":
            safe = int(line.split()[1])
        if kind == "h5" and safe:
            assert safe <= read_hdf5(path).n_systems <= safe + 5
    with KINDS[kind](path) as sink:
        count = len(sink)
        assert safe <= count <= safe + 5
        assert count > 0
        found = sink.read()
    for index, one in enumerate(found.to_data_list()):
        expected = structure(index, False)
        assert torch.equal(one.positions, expected.positions)
        assert torch.equal(one.forces, expected.forces)
        assert torch.equal(one.atomic_numbers, expected.atomic_numbers)
        assert torch.equal(one.atom_extras["tag"], expected.atom_extras["tag"])
        assert (float(one.energy), int(one.system_extras["system_id"])) == (float(expected.energy), index)
        assert {key: one.info[key] for key in expected.info} == expected.info


# -- BufferConfig


def test_buffer_config_is_compared_by_value_and_taken_from_a_dict():
    one = BufferConfig(2, 30, 0)
    assert one == BufferConfig(num_systems=2, num_nodes=30, num_edges=0)
    assert one != BufferConfig(2, 30, 1)
    assert len({one, BufferConfig(2, 30, 0)}) == 1
    assert BufferConfig.of(one) is one
    assert BufferConfig.of({"num_systems": 2, "num_nodes": 30, "num_edges": 0}) == one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BufferConfig(-1, 0, 0), "num_systems of BufferConfig must be an integer of at least 0, got -1"),
        (lambda: BufferConfig(1, 2.0, 0), "num_nodes"),
        (lambda: BufferConfig(1, 2, True), "num_edges"),
        (
            lambda: BufferConfig.of({"num_systems": 1, "num_node": 1, "num_edges": 0}),
            "'num_node'.*perhaps you meant 'num_nodes'",
        ),
        (lambda: BufferConfig.of({"num_systems": 1, "num_edges": 0}), "lacks num_nodes"),
        (lambda: BufferConfig.of(3), "BufferConfig or a dict, got 3"),
    ],
)
def test_a_wrong_buffer_config_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
