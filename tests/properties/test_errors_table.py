"""Errors against labels, against numpy."""

import numpy as np
import pytest

from carryall.data import AtomicData
from carryall.data.units import GPa
from carryall.errors import InputError
from carryall.models import EagerPotential, LennardJones
from carryall.properties import error_table, evaluate, predict
from carryall.properties.errors_table import as_text, write_errors, write_structure_errors
from carryall.properties.plots import read_columns


def labelled(seed: int = 0) -> list[AtomicData]:
    """Argon boxes of two sizes with labels that are off by known amounts; the last has an energy only."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3) * 4.0
    frames = [AtomicData(grid[:n] + 0.1 * rng.standard_normal((n, 3)), [18] * n, np.eye(3) * 12.0) for n in (27, 9, 9)]
    exact = evaluate(argon(), frames, ("energy", "forces", "stress"))
    out = []
    for index, (frame, found) in enumerate(zip(frames, exact, strict=True)):
        labels = {"energy": found["energy"] + 0.01 * (index + 1)}
        if index < 2:
            labels["forces"] = found["forces"] + 0.002 * rng.standard_normal(found["forces"].shape)
            labels["stress"] = found["stress"] + 1e-4
        out.append(frame.replace(**labels))
    return out


def argon() -> EagerPotential:
    return EagerPotential(LennardJones.argon())


def test_rows_against_numpy():
    frames = labelled()
    predictions = predict(argon(), frames)
    rows = {row.quantity: row for row in error_table(frames, predictions)}
    per_atom = np.array([0.01 / 27, 0.02 / 9, 0.03 / 9]) * 1e3
    assert rows["energy"].count == 3
    assert rows["energy"].rmse == pytest.approx(np.sqrt(np.mean(per_atom**2)))
    assert rows["energy"].mae == pytest.approx(per_atom.mean())
    assert rows["energy"].largest == pytest.approx(per_atom.max())
    pairs = zip(frames[:2], predictions[:2], strict=True)
    error = 1e3 * np.concatenate([(found["forces"] - one.forces.numpy()).ravel() for one, found in pairs])
    assert rows["forces"].count == 3 * (27 + 9)
    assert rows["forces"].rmse == pytest.approx(np.sqrt(np.mean(error**2)))
    assert rows["forces"].mae == pytest.approx(np.abs(error).mean())
    assert rows["stress"].count == 12
    assert rows["stress"].rmse == pytest.approx(1e-4 / GPa)


def test_no_labels():
    frames = [one.replace(energy=None, forces=None, stress=None) for one in labelled()]
    with pytest.raises(InputError, match="no labels"):
        error_table(frames, predict(argon(), frames))


def test_files(tmp_path):
    frames = labelled()
    predictions = predict(argon(), frames)
    rows = error_table(frames, predictions)
    write_errors(tmp_path / "errors.csv", rows)
    lines = (tmp_path / "errors.csv").read_text().splitlines()
    assert lines[0].startswith("quantity,unit")
    assert [line.split(",")[0] for line in lines[2:]] == ["energy", "forces", "stress"]
    write_structure_errors(tmp_path / "structures.csv", frames[:2], predictions[:2])
    columns = read_columns(tmp_path / "structures.csv")
    assert columns["atoms"].tolist() == [27, 9]
    assert columns["reference_energy"][0] - columns["predicted_energy"][0] == pytest.approx(0.01, abs=1e-7)
    header, text = as_text(rows)
    assert len(header) == len(text[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.csv", "structures.csv"]
