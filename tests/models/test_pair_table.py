"""Pair tables: DeePMD's splines to the last row, what is beyond them, files that cannot be used."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from carryall import evaluate
from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.models import EagerPotential, model_from_source, model_to_source
from carryall.models.pair_table import PairTable
from carryall.models.spline_table import clamped_slopes, read_table, tabulate, write_table
from combined_models import small_table

FOLDER = Path(__file__).parents[1] / "reference_data" / "bridging"
CASES = ["at_end", "at_zero", "cut", "middle_tail", "one_type", "short_tail", "tail", "two_rows", "zeros", "zeros_little"]
RIGHT = np.stack([0.1 * np.arange(1, 21), *(scale * (2.0 - 0.1 * np.arange(1, 21)) ** 3 for scale in (1, 2, 3))], axis=1)


def energy_at(model: PairTable, distances: list[float], pair: int = 0) -> torch.Tensor:
    return model.pair_energy(torch.tensor(distances, dtype=torch.float64), torch.full((len(distances),), pair))


def write(path: Path, rows: np.ndarray) -> Path:
    np.savetxt(path, rows, fmt="%.17g")
    return path


# -- as DeePMD has it


def test_the_cases_are_there() -> None:
    with np.load(FOLDER / "tables.npz") as file:
        assert sorted({key.split("/")[0] for key in file.files}) == CASES


@pytest.mark.parametrize("case", CASES)
def test_rows_and_splines_equal_deepmd(case: str) -> None:
    with np.load(FOLDER / "tables.npz") as file:
        rows, cutoff, expected, splines = (file[f"{case}/{name}"] for name in ("rows", "cutoff", "vdata", "tab_data"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # several end in a step, which is tested elsewhere
        table = tabulate(rows, float(cutoff))
    assert table.rows.shape == expected.shape
    assert np.abs(table.rows - expected).max() <= 1e-14 * np.abs(expected).max()
    assert np.abs(table.coefficients.reshape(-1) - splines).max() <= 1e-13 * np.abs(splines).max()


def test_slopes_equal_scipy() -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(0, 5, 40)), rng.normal(size=(40, 3))
    expected = interpolate.CubicSpline(x, y, bc_type="clamped")(x, 1)
    assert np.abs(clamped_slopes(x, y) - expected).max() <= 1e-12 * np.abs(expected).max()


def test_energies_pass_through_the_rows() -> None:
    model = PairTable(("O", "H"), tabulate(RIGHT, 2.0), 2.0)
    for pair, column in ((0, 1), (1, 2), (2, 2), (3, 3)):
        found = energy_at(model, RIGHT[:-1, 0].tolist(), pair)
        assert np.abs(found.numpy() - RIGHT[:-1, column]).max() <= 1e-13
    # a cubic, but for the slope at the first row, whose error falls by 2 + sqrt(3) with each row
    between = [1.55, 1.83, 1.951]
    expected = (2.0 - torch.tensor(between, dtype=torch.float64)) ** 3
    assert float((energy_at(model, between) - expected).abs().max()) < 1e-7


def test_each_atom_of_a_pair_gets_half() -> None:
    model = PairTable(("O", "H"), tabulate(RIGHT, 2.0), 2.0)
    pair = AtomicData(np.array([[0, 0, 0], [0.0, 0.6, 0.8]]), [8, 1])
    (found,) = evaluate(EagerPotential(model), [pair], ("energy", "atomic_energy"))
    assert found["energy"] == pytest.approx(2.0, abs=1e-13)
    assert found["atomic_energy"] == pytest.approx([1.0, 1.0], abs=1e-13)


# -- the ends


def test_nothing_at_the_cutoff_and_beyond() -> None:
    model = PairTable(("O", "H"), tabulate(RIGHT, 2.0), 2.0)
    assert energy_at(model, [2.0, 2.05, 3.0]).tolist() == [0.0, 0.0, 0.0]
    with pytest.warns(UserWarning, match=r"jump by 1.3e\+00 eV at 1.25 Å"):
        cut = PairTable(("O", "H"), tabulate(RIGHT, 1.25), 1.25)
    at_end, beyond = energy_at(cut, [1.25 - 1e-9, 1.25]).tolist()
    assert at_end == pytest.approx(0.75**3, abs=1e-6)
    assert beyond == 0


def test_below_the_table_is_not_a_number() -> None:
    model = PairTable(("O", "H"), tabulate(RIGHT, 2.0), 2.0)
    distance = torch.tensor([0.0999, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    energy = model.pair_energy(distance, torch.zeros(3, dtype=torch.int64))
    (slope,) = torch.autograd.grad([energy.sum()], [distance])
    assert energy.isnan().tolist() == slope.isnan().tolist() == [True, False, False]
    assert energy[1].item() == pytest.approx(RIGHT[0, 1])
    assert slope[1] == 0  # as DeePMD's splines begin


def test_a_table_that_ends_early_is_continued_smoothly() -> None:
    with pytest.warns(UserWarning, match=r"ends at 1.5 Å with energies up to 3.8e-01 eV: they are continued"):
        model = PairTable(("O", "H"), tabulate(RIGHT[:15], 2.5), 2.5)
    energy = energy_at(model, [1.5, 1.6, 2.0, 2.3, 2.39, 2.4, 2.45])
    assert energy[0] == pytest.approx(0.125)
    assert torch.equal(energy, energy.sort(descending=True).values)
    assert float(energy[4:].abs().max()) < 1e-4
    assert float(energy[5:].abs().max()) < 1e-12


def test_energy_and_forces_are_smooth_at_the_cutoff() -> None:
    model = small_table()
    cutoff = model.cutoff
    for delta in (1e-2, 1e-3):
        distance = torch.tensor([cutoff - delta], dtype=torch.float64, requires_grad=True)
        energy = model.pair_energy(distance, torch.zeros(1, dtype=torch.int64))
        (slope,) = torch.autograd.grad([energy.sum()], [distance])
        assert 0 < energy.item() < 1e-3 * delta
        assert 0 < -slope.item() < 1e-1 * delta


# -- files


def test_files(tmp_path: Path) -> None:
    model = PairTable.from_file(write(tmp_path / "table.txt", RIGHT), ["O", "H"])
    assert model.spec.cutoff == 2.0
    assert model.spec.type_map == ("O", "H")
    longer = PairTable.from_file(tmp_path / "table.txt", ["O", "H"], 6.0)
    assert longer.spec.cutoff == 6.0
    distances = [0.15, 0.99, 1.7]
    assert torch.allclose(energy_at(longer, distances, 1), energy_at(model, distances, 1), rtol=0, atol=1e-12)
    assert energy_at(longer, [2.0, 4.0, 6.0], 1).tolist() == [0.0, 0.0, 0.0]


def test_written_tables_are_read(tmp_path: Path) -> None:
    path = write_table(tmp_path / "table.txt", RIGHT, ["O", "H"], "a note")
    assert path.read_text(encoding="utf-8").splitlines()[:2] == ["# a note", "# r (Å), energies (eV) of O-O O-H H-H"]
    assert np.array_equal(read_table(path), RIGHT)
    with pytest.raises(InputError, match=r"3 columns of energies, not the pairs of \['O'\]"):
        write_table(path, RIGHT, ["O"])


def changed(row: int, column: int, value: float) -> np.ndarray:
    rows = RIGHT.copy()
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (RIGHT[:, :3], "has 2 columns of energies, which is no number of pairs"),
        (RIGHT[:, :2], r"has 1 columns of energies, the pairs of 1 types; type_map has 2, \['O', 'H'\], which make 3"),
        (RIGHT[:, :1], "20 rows and 1 columns"),
        (RIGHT[:1], "1 rows and 4 columns"),
        (RIGHT[::-1], "the first two distances are 2 and 1.9 Å: they must ascend"),
        (changed(0, 0, -0.1), "none negative"),
        (changed(7, 0, 0.81), r"row 7 is at 0.81 Å, expected 0.8: rows must be equally spaced, by the 0.1 Å between"),
        (np.delete(RIGHT, 5, axis=0), "row 5 is at 0.7 Å, expected 0.6"),
        (changed(3, 2, np.inf), "row 3, column 2 is inf: begin where all energies are finite"),
        (changed(4, 1, np.nan), "row 4, column 1 is nan"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    path = write(tmp_path / "table.txt", rows)
    with pytest.raises(InputError, match=message) as found:
        PairTable.from_file(path, ["O", "H"], 2.0)
    assert str(path) in str(found.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        PairTable.from_file(tmp_path / "absent.txt", ["O", "H"])
    (tmp_path / "words.txt").write_text("0.1 one\n0.2 two\n")
    (tmp_path / "ragged.txt").write_text("0.1 1 2 3\n0.2 1 2\n")
    for name in ("words.txt", "ragged.txt"):
        with pytest.raises(InputError, match=f"{name} is not a table of numbers"):
            PairTable.from_file(tmp_path / name, ["O", "H"])


def test_a_cutoff_before_the_first_row_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "table.txt", RIGHT)
    with pytest.raises(InputError, match=r"the cutoff, 0.1 Å, is not beyond the first row of .*table.txt, at 0.1 Å"):
        PairTable.from_file(path, ["O", "H"], 0.1)


def test_rounded_distances_are_taken(tmp_path: Path) -> None:
    """The last digit of a written distance may be off."""
    rows = RIGHT.copy()
    rows[:, 0] = np.round(rows[:, 0] + 3e-5, 4)
    assert len(read_table(write(tmp_path / "table.txt", rows))) == 20


# -- source


def test_the_source_dict_gives_the_model_back() -> None:
    model = small_table()
    model.rules.out_bias.copy_(torch.tensor([0.3, -0.2]))
    source = model_to_source(model)
    again = model_from_source(source)
    assert isinstance(again, PairTable)
    pair = AtomicData(np.array([[0, 0, 0], [0.0, 0.6, 0.8]]), [8, 1])
    first, second = (evaluate(EagerPotential(one), [pair])[0] for one in (model, again))
    assert first["energy"] == second["energy"]
    assert np.array_equal(first["forces"], second["forces"])
    assert first["energy"] > 0.1
    assert (source["@class"], source["type"]) == ("Model", "pairtab")
    assert source["tab"]["nspline"] == len(source["tab"]["@variables"]["vdata"]) - 1


def test_damaged_dicts() -> None:
    source = small_table().to_dict()
    short = source["tab"] | {"@variables": source["tab"]["@variables"] | {"tab_data": np.zeros(5)}}
    for changes, message in (
        ({"tab": short}, "5 coefficients, not those of 2 types and 199 splines: it is damaged"),
        ({"surprise": 1}, "'surprise', which carryall does not know"),
        ({"@version": 3}, "version 3, carryall reads 1 to 2"),
        ({"type_map": ["O", "H", "C"]}, "for 2 types, type_map has 3"),
        ({"atom_exclude_types": [2]}, "type 2 to exclude is not there"),
    ):
        with pytest.raises(InputError, match=message):
            model_from_source(source | changes)
    with pytest.raises(InputError, match="no field 'rcut'"):
        model_from_source({key: value for key, value in source.items() if key != "rcut"})


def test_exclusions() -> None:
    """Excluded pairs do not see each other; excluded atoms have no energy, but are seen."""
    table = small_table()
    source = table.to_dict()
    atoms = AtomicData(np.array([[0, 0, 0], [0.0, 0.6, 0.8], [1.0, 0, 0]]), [8, 1, 8])

    def energies(changes: dict[str, list]) -> np.ndarray:
        model = model_from_source(source | changes)
        return evaluate(EagerPotential(model), [atoms], ("energy", "atomic_energy"))[0]["atomic_energy"]  # type: ignore[arg-type]

    plain, without_pair, without_atom = (
        energies(changes) for changes in ({}, {"pair_exclude_types": [[0, 1]]}, {"atom_exclude_types": [1]})
    )
    assert without_pair[1] == 0
    assert without_pair[0] == pytest.approx(0.5 * float(energy_at(table, [1.0])), rel=1e-12)
    assert without_atom.tolist() == [plain[0], 0.0, plain[2]]
    assert plain[1] > 0
