"""Training: configuration, statistics, loss, loop, checkpoints, on a data set labelled by Lennard-Jones."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from carryall import evaluate, load, pack, write_structures
from carryall.data import AtomicData, read_structures
from carryall.errors import CarryallError, InputError
from carryall.graph import edge_vectors, graph_from_structures
from carryall.models import DPA1, EagerPotential, evaluate_model
from carryall.package.from_source import load_model
from carryall.training import LossConfig, TrainConfig, TrainResult, checkpoint, loop, read_config, train
from carryall.training.config import LearningRateConfig
from carryall.training.loss import Errors, learning_rate, loss_and_errors
from carryall.training.samples import batch_indices, collate, largest_degree, make_samples
from carryall.training.statistics import energy_bias, environment_statistics, set_statistics
from structures import fcc, small_dpa1, small_lj, structure

TYPES = ("O", "H")


def labelled(n: int, seed: int = 0, symbols: tuple[str, ...] = TYPES) -> list[AtomicData]:
    """Crystals and clusters with the energy, forces and stress of a Lennard-Jones potential, and one energy an element."""
    pot = EagerPotential(small_lj())
    items = []
    for index in range(n):
        positions, cell = fcc((1, 1, 1), a=3.7, jitter=0.12, seed=seed + index)
        bare = AtomicData(positions, [8, 1, 1, 8 if index % 3 else 1], cell if index % 4 else None)
        (found,) = evaluate(pot, bare, ("energy", "forces", "virial"))
        shift = 3.0 * int((bare.atomic_numbers == 8).sum()) - 1.5 * int((bare.atomic_numbers == 1).sum())
        stress = None if bare.cell is None else -found["virial"] / bare.volume
        items.append(bare.replace(energy=float(found["energy"]) + shift, forces=found["forces"], stress=stress))
    return items


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.extxyz"
    write_structures(path, labelled(12))
    return path


def config(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    small = {"rcut": 4.0, "rcut_smth": 1.0, "neuron": [4, 8], "axis_neuron": 3, "tebd_dim": 3, "attn": 6, "attn_layer": 1}
    values = {
        "data": {"train": [str(data)], "validation_fraction": 0.25},
        "out": str(out),
        "model": {"descriptor": {**small, "set_davg_zero": True}, "fitting": {"neuron": [8, 8]}},
        "learning_rate": {"start": 5e-3, "stop": 1e-4},
        "n_steps": 12,
        "batch_size": 3,
        "dtype": "float64",
        "validate_every": 6,
        "checkpoint_every": 6,
        "average": 0.9,
    }
    return values | changes


# -- configuration

UNKNOWN = {
    "top": ({"n_step": 3}, "unknown key 'n_step', perhaps you meant 'n_steps'"),
    "nested": ({"model": {"descriptor": {"rcutt": 3}}}, r"unknown key 'model\.descriptor\.rcutt', perhaps you meant 'rcut'"),
    "far": ({"zzz": 1}, r"unknown key 'zzz' \(known: data, out"),
    "type": ({"n_steps": "many"}, "n_steps: Input should be a valid integer"),
    "range": ({"batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
    "choice": ({"dtype": "half"}, "dtype: Input should be 'float32' or 'float64'"),
    "model": ({"model": {"descriptor": {"rcut_smth": 9.0}}}, "model.descriptor: .*rcut_smth must lie between 0 and rcut"),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_bad_configuration_names_key_and_nearest(name: str, as_file: bool, tmp_path: Path) -> None:
    change, message = UNKNOWN[name]
    source: Any = {"data": {"train": ["x.extxyz"]}, **change}
    if as_file:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(source))
        source, message = path, rf"config\.yaml: .*{message}"
    with pytest.raises(InputError, match=message):
        read_config(source)


def test_configuration_from_file_equals_that_from_dict(tmp_path: Path) -> None:
    values = config(Path("a.extxyz"), tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    parsed = read_config(tmp_path / "config.yaml")
    assert parsed == read_config(values) == read_config(parsed)
    assert TrainConfig.model_validate(parsed.model_dump(mode="json")) == parsed


def test_files_that_hold_no_configuration(tmp_path: Path) -> None:
    for name, text, message in (
        ("list.yaml", "- 1", "must hold a mapping"),
        ("empty.yaml", "", "must hold a mapping"),
        ("bad.yaml", "a: [1", "is not valid YAML"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r"data\.train: Field required|data: Field required"):
        read_config({})


# -- samples


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    start=st.integers(0, 5),
)
def test_each_epoch_uses_each_sample_once(n: int, batch_size: int, epochs: int, seed: int, start: int) -> None:
    batch = min(batch_size, n)
    steps = range(math.ceil((start + epochs) * n / batch) + 1)
    stream = [index for step in steps for index in batch_indices(n, batch_size, step, seed)]
    assert all(len(batch_indices(n, batch_size, step, seed)) == batch for step in steps[:3])
    for epoch in range(start, start + epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(batch_indices(20, 20, step, seed)) for step in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_labels_become_tensors() -> None:
    items = labelled(5)
    items[2] = items[2].replace(forces=None)
    batch = collate(make_samples(items, 4.0, TYPES))
    assert batch.n_atoms.tolist() == [4.0] * 5
    assert batch.energy.tolist() == [float(one.energy) for one in items]  # type: ignore[arg-type]
    assert batch.has_forces.reshape(5, 4).all(1).tolist() == [True, True, False, True, True]
    assert batch.has_virial.tolist() == [one.stress is not None for one in items] == [False, True, True, True, False]
    virials = [
        np.zeros((3, 3)) if one.stress is None else evaluate(EagerPotential(small_lj()), one, ("virial",))[0]["virial"]
        for one in items
    ]
    assert np.allclose(batch.virial.numpy(), virials, rtol=0, atol=1e-12)


def test_structures_that_cannot_be_used_are_named() -> None:
    items = labelled(3)
    with pytest.raises(InputError, match="structure 1 has no energy label"):
        make_samples([items[0], items[1].replace(energy=None)], 4.0, TYPES)
    with pytest.raises(InputError, match="structure 2: atom 0 is O"):
        make_samples([*[structure("open", ("H",)).replace(energy=0.0)] * 2, items[0]], 4.0, ("H",))


# -- statistics


def test_environment_statistics_equal_a_slow_loop() -> None:
    model = small_dpa1()
    c = model.descriptor.config
    items = labelled(4)
    davg, dstd = environment_statistics(model, make_samples(items, c.rcut, TYPES))
    rows: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for one in items:
        graph = graph_from_structures([one], c.rcut, TYPES)
        vectors = edge_vectors(graph).numpy()
        for atom in range(one.n_atoms):
            slots = np.zeros((sum(c.sel), 4))
            neighbors = vectors[graph.edge_center.numpy() == atom]
            assert len(neighbors) <= 60  # more than sel would not fit into slots
            slots = np.zeros((max(sum(c.sel), len(neighbors)), 4))
            for k, r in enumerate(neighbors):
                d = np.linalg.norm(r)
                u = min(max((d - c.rcut_smth) / (c.rcut - c.rcut_smth), 0), 1)
                s = (u**3 * (-6 * u**2 + 15 * u - 10) + 1) / d
                slots[k] = [s, *(s * r / d)]
            rows[int(graph.atom_types[atom])].append(slots)
    for kind, slots_of_kind in rows.items():
        n_slots = len(slots_of_kind) * sum(c.sel)
        everything = np.concatenate(slots_of_kind)
        radial, angular = everything[:, 0], everything[:, 1:]
        mean, mean_angular = radial.sum() / n_slots, angular.sum() / (3 * n_slots)
        std = math.sqrt((radial**2).sum() / n_slots - mean**2)
        std_angular = math.sqrt((angular**2).sum() / (3 * n_slots) - mean_angular**2)
        assert davg[kind].numpy() == pytest.approx([mean, 0, 0, 0], abs=1e-12)
        assert dstd[kind].numpy() == pytest.approx([max(std, 1e-2)] + [max(std_angular, 1e-2)] * 3, abs=1e-12)
    assert float(dstd.min()) > 0.02


def test_an_element_that_is_not_in_the_data() -> None:
    model = small_dpa1(("O", "H", "C"))
    samples = make_samples(labelled(2), 4.0, ("O", "H", "C"))
    davg, dstd = environment_statistics(model, samples)
    assert (davg[2].tolist(), dstd[2].tolist()) == ([0.0] * 4, [0.1] * 4)
    assert float(energy_bias(samples, 3)[2]) == pytest.approx(0, abs=1e-12)


def test_energy_bias_is_the_least_squares_solution() -> None:
    samples = make_samples(labelled(7), 4.0, TYPES)
    bias = energy_bias(samples, 2).numpy()
    counts = np.array([np.bincount(one.graph.atom_types.numpy(), minlength=2) for one in samples], dtype=float)
    energies = np.array([float(one.energy) for one in samples])
    residual = counts.T @ (counts @ bias - energies)  # zero where the sum of squares is least
    assert np.abs(residual).max() < 1e-9
    assert bias == pytest.approx([3.0, -1.5], abs=0.5)
    for shift in np.eye(2) * 1e-3:
        assert ((counts @ (bias + shift) - energies) ** 2).sum() > ((counts @ bias - energies) ** 2).sum()


def test_energy_bias_of_one_composition_is_shared() -> None:
    """Water only: any split fits, the shortest is taken."""
    one = structure("two_atoms", ("O", "H"))
    samples = make_samples([one.replace(energy=-6.0), one.replace(energy=-6.0)], 4.0, TYPES)
    assert energy_bias(samples, 2).tolist() == pytest.approx([-3.0, -3.0])


@pytest.mark.parametrize("zero", [True, False])
def test_statistics_reach_the_model(zero: bool) -> None:
    base = small_dpa1()
    model = DPA1(TYPES, base.descriptor.config.model_copy(update={"set_davg_zero": zero}), base.fitting_config)
    samples = make_samples(labelled(4), 4.0, TYPES)
    set_statistics(model, samples)
    davg, dstd = environment_statistics(model, samples)
    assert torch.equal(model.descriptor.davg, torch.zeros_like(davg) if zero else davg)
    assert torch.equal(model.descriptor.dstd, dstd)
    assert torch.equal(model.out_bias, energy_bias(samples, 2))
    assert largest_degree(samples) == max(int((one.graph.ptr[1:] - one.graph.ptr[:-1]).max()) for one in samples) > 10


# -- loss


def test_loss_against_the_formula() -> None:
    """Against a loop in numpy; the virial's part too."""
    settings = LossConfig(
        start_pref_e=0.5, limit_pref_e=2.0, start_pref_f=7.0, limit_pref_f=1.0, start_pref_v=0.3, limit_pref_v=0.1
    )
    items = labelled(5)
    items[1] = items[1].replace(forces=None)
    batch = collate(make_samples(items, 4.0, TYPES))
    out = evaluate_model(small_dpa1(), batch.graph)
    found, errors = loss_and_errors(settings, out, batch, 0.25)
    e, f, v = (limit * 0.75 + start * 0.25 for start, limit in ((0.5, 2.0), (7.0, 1.0), (0.3, 0.1)))
    de = out["energy"].numpy() - [float(one.energy) for one in items]  # type: ignore[arg-type]
    df = np.concatenate(
        [out["forces"].numpy()[4 * k : 4 * k + 4] - one.forces.numpy() for k, one in enumerate(items) if one.forces is not None]
    )
    dv = np.array(
        [out["virial"].numpy()[k] + one.stress.numpy() * one.volume for k, one in enumerate(items) if one.stress is not None]
    )
    expected = e * (de**2 / 4).mean() + f * (df**2).mean() + v * (dv**2 / 4).mean()
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert errors.rmse_energy == pytest.approx(1e3 * math.sqrt(((de / 4) ** 2).mean()), rel=1e-12)
    assert errors.rmse_forces == pytest.approx(1e3 * math.sqrt((df**2).mean()), rel=1e-12)
    assert errors.rmse_virial == pytest.approx(1e3 * math.sqrt(((dv / 4) ** 2).mean()), rel=1e-12)
    doubled = errors + errors
    assert doubled.rmse_forces == pytest.approx(errors.rmse_forces)
    assert math.isnan(Errors().rmse_energy)


def test_learning_rate_schedule() -> None:
    settings = LearningRateConfig(start=1e-2, stop=1e-4, warmup_steps=4)
    rates = [learning_rate(settings, step, 25) for step in range(25)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert rates[4] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-4)
    ratios = np.array(rates[5:]) / rates[4:-1]
    assert np.allclose(ratios, ratios[0])
    assert learning_rate(LearningRateConfig(), 0, 1) == 1e-3


# -- the loop


def rows_of(result: TrainResult) -> list[dict[str, str]]:
    with result.learning_curve.open() as stream:
        return list(csv.DictReader(stream))


def test_the_loss_falls_and_files_are_where_the_result_says(data: Path, tmp_path: Path) -> None:
    faster = {"learning_rate": {"start": 2e-2, "stop": 1e-3}, "validate_every": 8, "checkpoint_every": 20}
    result = train(config(data, tmp_path / "run", n_steps=40, **faster))
    units, *rows = rows_of(result)
    assert units["train_rmse_forces"] == "meV/angstrom"
    assert [int(row["step"]) for row in rows] == [8, 16, 24, 32, 40]
    first, last = (float(rows[k]["train_rmse_forces"]) for k in (0, -1))
    assert last < 0.7 * first
    assert float(rows[-1]["loss"]) < 0.3 * float(rows[0]["loss"])
    assert float(rows[-1]["learning_rate"]) == pytest.approx(1e-3)
    assert result.steps == 40
    best = min(rows, key=lambda row: float(row["validation_rmse_forces"]) + 10 * float(row["validation_rmse_energy"]))
    assert result.validation.rmse_forces == pytest.approx(float(best["validation_rmse_forces"]), rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best.pt", "checkpoint.pt", "learning_curve.csv"]
    # the kept model has the errors that the result states, on the structures held out
    held_out = loop.read_data(read_config(config(data, tmp_path)))[1]
    assert len(held_out) == 3
    found = evaluate(load(result.checkpoint), held_out, ("forces",))
    squares = np.concatenate([(a["forces"] - b.forces.numpy()).ravel() ** 2 for a, b in zip(found, held_out, strict=True)])  # type: ignore[union-attr]
    assert 1e3 * math.sqrt(squares.mean()) == pytest.approx(result.validation.rmse_forces, rel=1e-9)


class Interrupted(Exception):
    pass


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(path).state_dict())


@pytest.mark.parametrize(("dtype", "stop"), [("float64", 8), ("float32", 6)])
def test_an_interrupted_run_goes_on_bit_by_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, stop: int
) -> None:
    """Interrupted at step 8 after the checkpoint of step 6 (the steps between are done again), or right at it."""
    whole = train(config(data, tmp_path / "whole", dtype=dtype))
    step = loop.train_step

    def interrupt(run: Any, number: int) -> Any:
        if number == stop:
            raise Interrupted
        return step(run, number)

    monkeypatch.setattr(loop, "train_step", interrupt)
    with pytest.raises(Interrupted):
        train(config(data, tmp_path / "parts", dtype=dtype))
    monkeypatch.setattr(loop, "train_step", step)
    assert checkpoint.read(tmp_path / "parts" / "checkpoint.pt")["step"] == 6
    parts = train(config(data, tmp_path / "parts", dtype=dtype))
    for name in ("checkpoint.pt", "best.pt"):
        first, second = (checkpoint.read(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert (first["step"], first["best"], first["errors"]) == (second["step"], second["best"], second["errors"])
        a, b = state_of(tmp_path / "whole" / name), state_of(tmp_path / "parts" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
        moments = [one["optimizer"]["state"] for one in (first, second)]
        assert all(torch.equal(moments[0][k]["exp_avg"], moments[1][k]["exp_avg"]) for k in moments[0])
    assert [{**row, "time": ""} for row in rows_of(whole)] == [{**row, "time": ""} for row in rows_of(parts)]
    assert whole.validation == parts.validation


def test_a_finished_run_is_not_run_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(config(data, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(loop, "train_step", lambda *_: 1 / 0)
    again = train(config(data, tmp_path / "run"))
    assert again.validation == first.validation
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_the_seed_decides_everything(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    train(config(data, tmp_path / "a", n_steps=3))
    torch.manual_seed(2)
    train(config(data, tmp_path / "b", n_steps=3))
    train(config(data, tmp_path / "c", n_steps=3, seed=1))
    a, b, c = (state_of(tmp_path / name / "checkpoint.pt") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["fitting.nets.0.0.w"], c["fitting.nets.0.0.w"])


def test_a_changed_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "run", n_steps=2))
    changed = config(data, tmp_path / "run", n_steps=2, batch_size=2, learning_rate={"start": 1e-3})
    with pytest.raises(
        InputError, match=r"checkpoint\.pt was made with another batch_size, learning_rate: train into another folder"
    ):
        train(changed)
    assert train(config(data, tmp_path / "run", n_steps=3)).steps == 3


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, {"model": {}, "step": 1})

    def half(_: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    save = torch.save
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {"model": {}, "step": 2})
    monkeypatch.setattr(torch, "save", save)
    assert checkpoint.read(path)["step"] == 1
    checkpoint.write(path, {"model": {}, "step": 3})
    assert checkpoint.read(path)["step"] == 3
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint.pt"]


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("carryall-was-here"),))


def test_what_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, other, newer, evil = (tmp_path / f"{name}.pt" for name in ("text", "other", "newer", "evil"))
    text.write_text("hello")
    torch.save({"weights": torch.zeros(2)}, other)
    torch.save({"model": {}, "format_version": 99}, newer)
    torch.save({"model": Payload(), "format_version": 1}, evil)
    for path, message in (
        (text, "is not a checkpoint of carryall or is damaged"),
        (other, "is not a checkpoint of carryall"),
        (newer, "checkpoint version 99, newer than 1: update carryall"),
        (evil, "is not a checkpoint of carryall or is damaged"),
        (tmp_path / "absent.pt", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint.read(path)
    assert not (tmp_path / "carryall-was-here").exists()


def test_bad_data_is_named_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    forces = lines[2].split()  # the first atom of the first structure
    (tmp_path / "nan.extxyz").write_text("\n".join([*lines[:2], " ".join([*forces[:-1], "nan"]), *lines[3:]]) + "\n")
    bare = [one.replace(energy=None) for one in labelled(2)]
    write_structures(tmp_path / "bare.extxyz", bare)
    for name, message in (
        ("nan.extxyz", r"(?i)(structure|frame) 0.*forces.*atom 0"),
        ("bare.extxyz", "structure 0 has no energy label"),
        ("absent.extxyz", "absent.extxyz"),
    ):
        with pytest.raises(InputError, match=message):
            train(config(tmp_path / name, tmp_path / "run"))
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "loss_and_errors", lambda *_: (torch.tensor(float("nan"), requires_grad=True), Errors()))
    with pytest.raises(CarryallError, match=r"the loss is nan at step 0: lower learning_rate.start"):
        train(config(data, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_validation_data_of_its_own_and_none_at_all(data: Path, tmp_path: Path) -> None:
    write_structures(tmp_path / "validation.extxyz", labelled(3, seed=50))
    own = config(data, tmp_path / "own", n_steps=2)
    own["data"] = {"train": [str(data)], "validation": [str(tmp_path / "validation.extxyz")]}
    train_set, held_out = loop.read_data(read_config(own))
    assert (len(train_set), len(held_out)) == (12, 3)
    none = config(data, tmp_path / "none", n_steps=2)
    none["data"] = {"train": [str(data)], "validation_fraction": 0.0}
    assert [len(part) for part in loop.read_data(read_config(none))] == [12, 0]
    assert train(none).validation.n_energy == 12
    assert len(read_structures(data)) == 12


def test_a_checkpoint_packs_with_its_configuration(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def export_model(model: DPA1, path: Path, **settings: Any) -> Path:
        seen.update(settings, model=model)
        return path

    monkeypatch.setattr("carryall.package.pack.export_model", export_model)
    result = train(config(data, tmp_path / "run", n_steps=2, dtype="float32"))
    pack(result.checkpoint, tmp_path / "model.pte")
    assert seen["training_config"]["n_steps"] == 2
    assert seen["model"].spec.type_map == ("H", "O")
    assert (seen["model"].spec.dtype, load_model(result.checkpoint).spec.dtype) == ("float64", "float32")  # type: ignore[union-attr]
