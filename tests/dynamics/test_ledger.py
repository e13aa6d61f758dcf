"""The ledger: whole at any moment, the same results after it, no other run mixed in."""

import csv
import math
import sqlite3

import numpy as np
import pytest
import torch
from dynamics_samples import LennardJones, argon, cluster
from screening_samples import argon_structures, ledger_rows

from carryall.data import AtomicData, Batch, read_structures
from carryall.dynamics import FIRE, FixAtoms, HookStageEnum, relax
from carryall.dynamics.blobs import (
    batch_from_bytes,
    batch_to_bytes,
    content_hash,
    from_bytes,
    structure_from_bytes,
    structure_to_bytes,
    to_bytes,
)
from carryall.dynamics.ledger import InFlight, Ledger, LedgerResults
from carryall.dynamics.results import RelaxResult
from carryall.errors import CarryallError, InputError

FACTS = {
    "name": "a",
    "number": 3,
    "float": 0.1,
    "nothing": None,
    "yes": True,
    "list": [1, [2.5, "x"]],
    "tuple": (1, 2),
    "dict": {"a": {"b": (1,)}},
}
ARRAYS = {"reals": np.arange(6.0).reshape(2, 3), "whole": np.array([1, 2], dtype=np.int32), "texts": np.array(["a", "bc"])}


def same_structure(a, b):
    for name in ("positions", "cell", "pbc", "velocities", "masses", "forces", "energy", "stress", "atomic_numbers"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or not torch.equal(x, y))):
            return False
    return a.info.keys() == b.info.keys()


# -- bytes


def test_structures_come_back_with_every_bit():
    full = AtomicData.from_ase(argon(1)).replace(
        velocities=torch.ones(4, 3, dtype=torch.float32) / 3,
        energy=-1.5,
        info={**FACTS, **ARRAYS, "nan": math.nan},
        atom_extras={"tag": torch.arange(4, dtype=torch.int32)},
        system_extras={"fparam": torch.tensor([0.3])},
    )
    for data in (full, AtomicData(torch.zeros(0, 3), []), cluster(3).to(dtype=torch.float32)):
        back = structure_from_bytes(structure_to_bytes(data))
        assert same_structure(data, back)
        assert [*back.atom_extras, *back.system_extras] == [*data.atom_extras, *data.system_extras]
    back = structure_from_bytes(structure_to_bytes(full))
    assert {name: back.info[name] for name in FACTS} == FACTS
    assert math.isnan(back.info["nan"])
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(back.info[name], array)
        assert back.info[name].dtype == array.dtype


def test_batches_come_back_with_every_key():
    batch = FIRE(LennardJones()).run(Batch.from_data_list([cluster(3), cluster(5)]), 2)
    batch.info[1]["failure"] = "because"
    back, facts = batch_from_bytes(batch_to_bytes(batch, {"step": 2}))
    assert facts == {"step": 2}
    assert back.info == batch.info
    assert back.atom_counts == batch.atom_counts
    for level in ("system", "atom", "edge"):
        assert sorted(back.keys(level)) == sorted(batch.keys(level))
        for key in batch.keys(level):
            assert torch.equal(back.get(key), batch.get(key))
            assert back.get(key).dtype == batch.get(key).dtype


def test_other_bytes_are_refused():
    for data in (b"", b"CAB1", b"something else that is long enough", to_bytes({})[:-4]):
        with pytest.raises((InputError, ValueError)):
            from_bytes(data)


def test_the_hash_tells_structures_apart_and_not_their_labels():
    one = cluster(4)
    assert content_hash(one) == content_hash(one.replace(energy=1.0, info={"a": 1}))
    moved = one.positions.clone()
    moved[2, 1] = torch.nextafter(moved[2, 1], torch.tensor(9.0, dtype=moved.dtype))
    for other in (
        one.replace(positions=moved),
        one.replace(cell=torch.eye(3) * 30),
        one.replace(masses=torch.ones(4)),
        one.replace(atomic_numbers=[18, 18, 18, 29]),
        one.replace(atom_extras={"move_mask": torch.zeros(4, 3, dtype=torch.bool)}),
    ):
        assert content_hash(other) != content_hash(one)


# -- the ledger


def result(index, **changes):
    values = {"outcome": "converged", "reason": None, "steps": 3, "energy": -0.1 / (index + 1), "fmax": 0.01}
    return RelaxResult(index, **{**values, "structure": cluster(3, index), "source": "a.cif", "frame": index, **changes})


def test_results_are_kept_in_input_order_and_read_lazily(tmp_path):
    with Ledger(tmp_path / "run", {"fmax": 0.1}) as ledger:
        ledger.add([result(2), result(0)], {0: b"0", 2: b"2"})
        ledger.add([result(1, outcome="failed", reason="why", energy=None, fmax=None, structure=None)], {})
        assert len(ledger) == 3
        assert 1 in ledger
        assert 3 not in ledger
        assert (ledger.hash_of(2), ledger.hash_of(1), ledger.hash_of(7)) == (b"2", None, None)
        found = LedgerResults(tmp_path / "run")  # also while the run goes on
        assert [one.index for one in found] == [0, 1, 2]
        assert found.outcomes() == {"converged": 2, "failed": 1}
        assert found[1].reason == "why"
        assert found[-1].energy == result(2).energy
        assert [one.index for one in found[1:]] == [1, 2]
        assert same_structure(found[2].structure, cluster(3, 2))
        with pytest.raises(IndexError, match="there is no result 3"):
            found[3]
    with pytest.raises(InputError, match="holds no run"):
        LedgerResults(tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["ledger.lock", "ledger.sqlite"]


def test_an_input_is_never_written_twice_and_a_failed_write_keeps_nothing(tmp_path):
    with Ledger(tmp_path, {}) as ledger:
        ledger.add([result(0)], {})
        with pytest.raises(sqlite3.IntegrityError):
            ledger.add([result(1), result(0)], {})
        assert 1 not in ledger


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with Ledger(tmp_path, {}) as ledger:
        ledger._database.execute("PRAGMA max_page_count = 8")
        with pytest.raises(CarryallError, match=r"ledger.sqlite cannot be written: database or disk is full"):
            ledger.add([result(index) for index in range(100)], {})
        assert len(ledger) == 0


def test_the_batch_on_its_way_comes_back_without_what_was_done_since(tmp_path):
    dynamics = FIRE(LennardJones())
    batch = dynamics.run(Batch.from_data_list([cluster(3), cluster(5), cluster(4)]), 2)
    batch.set("system_id", torch.tensor([7, 3, 5]))
    originals = {index: structure_to_bytes(cluster(3, index)) for index in (7, 3, 5)}
    hashes = {index: bytes([index]) * 16 for index in originals}
    with Ledger(tmp_path, {}) as ledger:
        assert ledger.in_flight() is None
        ledger.save_in_flight(InFlight(batch, 2, True, originals, hashes))
        ledger.save_in_flight(InFlight(batch, 9, True, originals, hashes))
    with Ledger(tmp_path, {}, resume=True) as ledger:
        ledger.add([result(3)], {})
        state = ledger.in_flight()
        assert (state.step_count, state.forces_current) == (9, True)
        assert state.batch.get("system_id").tolist() == [7, 5]
        assert state.originals == {index: originals[index] for index in (7, 5)}
        assert state.hashes == {index: hashes[index] for index in (7, 5)}
        assert torch.equal(state.batch.get("fire_velocities")[:3], batch.get("fire_velocities")[:3])
        ledger.add([result(7), result(5)], {})
        assert ledger.in_flight() is None


def test_two_processes_do_not_work_on_one_run(tmp_path):
    with Ledger(tmp_path, {}), pytest.raises(InputError, match="another process works on this run"):
        Ledger(tmp_path, {}, resume=True)
    Ledger(tmp_path, {}, resume=True).close()


def test_what_is_no_ledger_is_not_touched(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all, but a text of some length" * 30)
    with pytest.raises(InputError, match="cannot be used as a ledger: file is not a database"):
        Ledger(tmp_path, {}, resume=True)
    assert (tmp_path / "ledger.sqlite").read_bytes().startswith(b"no database")


# -- runs with a ledger


class Stop(Exception):
    """Stands for the end of the process."""


def stop_after(steps):
    """A hook that ends a run in the middle of a step."""
    seen = []

    def hook(batch, dynamics):
        seen.append(1)
        if len(seen) > steps:
            raise Stop

    hook.stage, hook.frequency = HookStageEnum.AFTER_COMPUTE, 1
    return hook


STRUCTURES = argon_structures(14, largest=12)
SETTINGS = {"fmax": 0.01, "max_atoms_per_batch": 25, "checkpoint_seconds": 0.0, "progress": False}


def test_a_run_that_ends_anywhere_goes_on_to_the_same_bits(tmp_path):
    whole_model = LennardJones()
    whole = relax(STRUCTURES, whole_model, out=tmp_path / "whole", **SETTINGS)
    assert [one.index for one in whole] == list(range(len(STRUCTURES)))
    calls = 0
    for steps in (7, 40, 3, 60, 100):  # the last while a structure that is too large for a batch runs alone
        model = LennardJones()
        with pytest.raises(Stop):
            relax(STRUCTURES, model, out=tmp_path / "parts", resume=True, hooks=[stop_after(steps)], **SETTINGS)
        calls += model.n_calls
    model = LennardJones()
    seen = []
    parts = relax(
        STRUCTURES, model, out=tmp_path / "parts", resume=True, on_result=lambda one: seen.append(one.index), **SETTINGS
    )
    assert ledger_rows(tmp_path / "parts") == ledger_rows(tmp_path / "whole")
    assert 0 < len(seen) < len(STRUCTURES)  # what was done is not done again
    # each start costs the step that was lost, and a call for the energy that the potential is known by
    assert calls + model.n_calls <= whole_model.n_calls + 6 * 12
    assert len(parts) == len(STRUCTURES)
    for a, b in zip(parts, relax(STRUCTURES, LennardJones(), **{**SETTINGS, "max_atoms_per_batch": 500}), strict=True):
        assert (a.outcome, a.steps, a.energy, a.fmax) == (b.outcome, b.steps, b.energy, b.fmax)
        assert torch.equal(a.structure.positions, b.structure.positions)
    for name in ("relaxed.extxyz", "results.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("optimizer", ["lbfgs", "gradient_descent"])
def test_other_optimizers_and_a_moving_cell_resume_too(optimizer, tmp_path):
    crystals = [argon(1, rattle=0.1, seed=seed, a=5.2 + 0.1 * seed) for seed in range(3)]
    settings = {**SETTINGS, "optimizer": optimizer, "cell_filter": "frechet", "max_steps": 15, "pressure": [0.0, 0.1, 0.2]}
    whole = relax(crystals, LennardJones(), **settings)
    with pytest.raises(Stop):
        relax(crystals, LennardJones(), out=tmp_path, hooks=[stop_after(9)], **settings)
    parts = relax(crystals, LennardJones(), out=tmp_path, resume=True, **settings)
    for a, b in zip(parts, whole, strict=True):
        assert (a.outcome, a.steps, a.energy, a.fmax) == (b.outcome, b.steps, b.energy, b.fmax)
        assert torch.equal(a.structure.cell, b.structure.cell)
        assert torch.equal(a.structure.stress, b.structure.stress)
    assert not torch.equal(parts[0].structure.cell, AtomicData.from_ase(crystals[0]).cell)


def test_a_finished_run_is_only_read_again(tmp_path):
    relax(STRUCTURES[:3], LennardJones(), out=tmp_path, **SETTINGS)
    model = LennardJones()
    again = relax(iter(STRUCTURES[:3]), model, out=tmp_path, resume=True, **SETTINGS)
    assert (len(again), model.n_calls) == (3, 1)
    more = relax(STRUCTURES[:5], model, out=tmp_path, resume=True, **SETTINGS)
    assert [one.index for one in more] == list(range(5))


def started(folder, structures=STRUCTURES[:4], **changes):
    with pytest.raises(Stop):
        relax(structures, LennardJones(), out=folder, hooks=[stop_after(12)], **{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmax": 0.02}, r"was begun with fmax = 0\.01, this run has fmax = 0\.02"),
        ({"max_steps": 7}, "max_steps = 500, this run has max_steps = 7"),
        ({"optimizer": "lbfgs"}, "optimizer = fire, this run has optimizer = lbfgs"),
        ({"constraints": [FixAtoms(indices=[0])]}, "constraints"),
        ({"potential": LennardJones(epsilon=0.0105)}, "begun with another potential: the energy of input 0 was"),
        ({"potential": LennardJones(cutoff=8.0)}, r"cutoff = 8\.5, this run has cutoff = 8\.0"),
    ],
)
def test_another_run_is_told_apart(change, message, tmp_path):
    started(tmp_path)
    arguments = {
        "structures": STRUCTURES[:4],
        "potential": LennardJones(),
        "out": tmp_path,
        "resume": True,
        **SETTINGS,
        **change,
    }
    with pytest.raises(InputError, match=message):
        relax(**arguments)
    assert len(relax(STRUCTURES[:4], LennardJones(), out=tmp_path, resume=True, **SETTINGS)) == 4


@pytest.mark.parametrize("place", [0, 2, 3])
def test_other_inputs_are_told_apart(place, tmp_path):
    relax(STRUCTURES[:4], LennardJones(), out=tmp_path, **SETTINGS)
    changed = list(STRUCTURES[:4])
    changed[place] = STRUCTURES[7]
    with pytest.raises(CarryallError, match=f"input {place} is not the structure that this run had there before"):
        relax(changed, LennardJones(), out=tmp_path, resume=True, **SETTINGS)
    with pytest.raises(InputError, match="has results of 4 inputs, 3 are given"):
        relax(STRUCTURES[:3], LennardJones(), out=tmp_path, resume=True, **SETTINGS)


def test_inputs_on_their_way_are_told_apart_too(tmp_path):
    started(tmp_path, max_atoms_per_batch=500)
    assert 1 not in [row[0] for row in ledger_rows(tmp_path)]
    assert ledger_rows(tmp_path, "in_flight") != []
    with pytest.raises(CarryallError, match="input 1 is not the structure"):
        relax([STRUCTURES[0], STRUCTURES[9], *STRUCTURES[2:4]], LennardJones(), out=tmp_path, resume=True, **SETTINGS)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="resume=True needs out="):
        relax(STRUCTURES[:2], LennardJones(), resume=True)
    with pytest.raises(InputError, match="structure 0: atom 0 is Au"):
        relax([AtomicData([[0, 0, 0]], [79]), *STRUCTURES[:2]], LennardJones(), out=tmp_path, **SETTINGS)
    relax(STRUCTURES[:2], LennardJones(), out=tmp_path, **SETTINGS)  # nothing had been done
    with pytest.raises(InputError, match="holds a run already"):
        relax(STRUCTURES[:2], LennardJones(), out=tmp_path, **SETTINGS)


def test_the_two_files_tell_everything_in_input_order(tmp_path):
    lost = AtomicData([[0, 0, 0], [0, 0, 0]], [18, 18], info={"name": "lost"})
    odd = STRUCTURES[1].replace(info={"Lattice": "a key of the format"})
    found = relax([STRUCTURES[0], lost, odd], LennardJones(), out=tmp_path, errors="set_aside", **SETTINGS)
    with (tmp_path / "results.csv").open() as file:
        names, units, *rows = csv.reader(file)
    assert names == ["index", "input", "frame", "outcome", "steps", "energy", "fmax", "reason"]
    assert units == ["1", "1", "1", "1", "1", "eV", "eV/angstrom", "1"]
    assert [(row[0], row[3]) for row in rows] == [("0", "converged"), ("1", "failed"), ("2", "converged")]
    assert "coincide" in rows[1][-1]
    frames = read_structures(tmp_path / "relaxed.extxyz")
    assert [one.info["index"] for one in frames] == [0, 2]
    assert float(frames[0].energy) == found[0].energy
    torch.testing.assert_close(frames[1].positions, found[2].structure.positions, atol=0, rtol=0)
    assert not list(tmp_path.glob(".*"))
