"""Training with parameters of structures and atoms, precisions of parts, and frozen parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carryall import write_structures
from carryall.data import AtomicData
from carryall.errors import InputError
from carryall.models import DPA1, DescriptorConfig, FittingConfig
from carryall.package.from_source import load_model
from carryall.training import checkpoint, train
from carryall.training.samples import collate, make_samples
from carryall.training.statistics import energy_bias, parameter_statistics, set_statistics
from structures import fcc

TYPES = ("O", "H")


def items(n: int = 6, lacking: tuple[int, ...] = ()) -> list[AtomicData]:
    """Crystals whose energies rise with fparam and whose atoms have aparam; those in `lacking` have neither."""
    found = []
    for index in range(n):
        positions, cell = fcc((1, 1, 1), a=3.7, jitter=0.12, seed=index)
        fparam, aparam = [0.1 * index, 5.0 - index], np.arange(4.0)[:, None] + index
        extras = {} if index in lacking else {"system_extras": {"fparam": fparam}, "atom_extras": {"aparam": aparam}}
        found.append(AtomicData(positions, [8, 1, 1, 8], cell, energy=-3.0 + 0.2 * index, forces=np.zeros((4, 3)), **extras))
    return found


def config(tmp_path: Path, structures: list[AtomicData], **changes: Any) -> dict[str, Any]:
    write_structures(tmp_path / "data.extxyz", structures)
    small = {"rcut": 4.0, "rcut_smth": 1.0, "neuron": [4, 8], "axis_neuron": 3, "tebd_dim": 3, "attn": 6, "attn_layer": 1}
    descriptor, fitting = small | changes.pop("descriptor", {}), {"neuron": [6, 6], **changes.pop("fitting", {})}
    values = {
        "data": {"train": [str(tmp_path / "data.extxyz")], "validation_fraction": 0.0},
        "out": str(tmp_path / "run"),
        "model": {"descriptor": descriptor, "fitting": fitting},
        "n_steps": 3,
        "dtype": "float64",
        "validate_every": 3,
        "checkpoint_every": 3,
    }
    return values | changes


def load_dpa1(path: Path) -> DPA1:
    model = load_model(path)
    assert isinstance(model, DPA1)
    return model


def test_a_model_learns_with_parameters_and_keeps_their_statistics(tmp_path: Path) -> None:
    structures = items()
    result = train(config(tmp_path, structures, fitting={"numb_fparam": 2, "numb_aparam": 1}))
    fitting = load_dpa1(result.checkpoint).fitting
    fparam = np.array([one.system_extras["fparam"].numpy() for one in structures])
    aparam = np.concatenate([one.atom_extras["aparam"].numpy() for one in structures])
    for name, values in (("fparam", fparam), ("aparam", aparam)):
        assert np.allclose(getattr(fitting, f"{name}_avg").numpy(), values.mean(0), rtol=0, atol=1e-14)
        assert np.allclose(getattr(fitting, f"{name}_inv_std").numpy(), 1 / values.std(0), rtol=1e-13, atol=0)
    first = load_dpa1(result.checkpoint).fitting.nets[0][0].w  # type: ignore[index]
    assert first.shape[0] == fitting.dim_descrpt + 3
    samples = make_samples(structures, 4.0, TYPES, fitting.config)
    batch = collate(samples[1:4]).graph
    assert batch.fparam is not None
    assert batch.aparam is not None
    assert np.array_equal(batch.fparam.numpy(), fparam[1:4])
    assert np.array_equal(batch.aparam.numpy(), aparam[4:16])


def test_a_parameter_that_never_changes_gets_the_smallest_deviation() -> None:
    mean, std = parameter_statistics(torch.tensor([[300.0, 1.0], [300.0, 2.0]], dtype=torch.float64))
    assert (mean.tolist(), std.tolist()) == ([300.0, 1.5], [1e-2, 0.5])


def test_structures_without_a_parameter(tmp_path: Path) -> None:
    mixed = items(lacking=(2, 4))
    with pytest.raises(InputError, match=r"structure 2: fparam is missing .*: the potential needs 2 values"):
        train(config(tmp_path, mixed, fitting={"numb_fparam": 2}))
    with pytest.raises(InputError, match="structure 2: aparam is missing for atom 0, 1, 2, 3: the potential needs 1 value"):
        train(config(tmp_path, mixed, fitting={"numb_aparam": 1}))
    with pytest.raises(InputError, match="structure 0: fparam has 2 values for each system, the potential needs 3"):
        train(config(tmp_path, mixed, fitting={"numb_fparam": 3}))
    fitting = FittingConfig(numb_fparam=2, default_fparam=(7.0, 8.0))
    samples = make_samples(mixed, 4.0, TYPES, fitting)
    assert [one.graph.fparam.tolist() for one in samples[1:3]] == [[[0.1, 4.0]], [[7.0, 8.0]]]  # type: ignore[union-attr]
    result = train(config(tmp_path, mixed, fitting={"numb_fparam": 2, "default_fparam": [7.0, 8.0]}))
    average = load_dpa1(result.checkpoint).fitting.fparam_avg
    assert average is not None
    assert np.allclose(average.numpy(), [(0.1 + 0.3 + 0.5 + 2 * 7) / 6, (5 + 4 + 2 + 0 + 2 * 8) / 6], rtol=0, atol=1e-14)


def test_parameters_that_no_part_takes_are_left_aside(tmp_path: Path) -> None:
    samples = make_samples(items(), 4.0, TYPES, FittingConfig(numb_aparam=1, use_aparam_as_mask=True))
    assert samples[0].graph.fparam is None
    assert samples[0].graph.aparam is None
    train(config(tmp_path, items(lacking=(1,))))


def test_known_energies_of_elements_are_kept() -> None:
    structures = [
        AtomicData([[0.0, 0, 3.0 * i] for i in range(n + 2)], [8] * n + [1] * 2, energy=3.0 * n - 2.5) for n in (1, 2, 4)
    ]
    samples = make_samples(structures, 4.0, TYPES)
    assert torch.allclose(energy_bias(samples, 2), torch.tensor([3.0, -1.25], dtype=torch.float64), rtol=0, atol=1e-12)
    kept = energy_bias(samples, 2, (None, -1.0))
    counts, energies = np.array([1.0, 2.0, 4.0]), np.array([3.0 * n - 2.5 + 2.0 for n in (1, 2, 4)])
    assert kept[1] == -1.0
    assert abs(float(kept[0]) - counts @ energies / (counts @ counts)) < 1e-12
    assert energy_bias(samples, 2, (2.0, -1.0)).tolist() == [2.0, -1.0]
    assert float(energy_bias(samples, 2, rcond=0.5).abs().max()) < 2.0  # only the larger singular value is left


def test_statistics_lie_on_the_grid_of_the_precision() -> None:
    """Otherwise a model would not be what its file says."""
    model = DPA1(TYPES, DescriptorConfig(rcut=4.0, precision="float32"), FittingConfig(numb_fparam=2, precision="single"))
    set_statistics(model, make_samples(items(), 4.0, TYPES, model.fitting_config))
    for value in (model.descriptor.davg, model.descriptor.dstd, model.fitting.fparam_avg, model.fitting.fparam_inv_std):
        assert value is not None
        assert value.dtype == torch.float64
        assert torch.equal(value, value.float().double())


@pytest.mark.parametrize(
    ("descriptor", "fitting", "dtype", "expected"),
    [
        ({}, {}, "float32", ("float32", "float32")),
        ({}, {}, "float64", ("float64", "float64")),
        ({"precision": "single"}, {}, "float64", ("float32", "float64")),
        ({}, {"precision": "double"}, "float32", ("float32", "float64")),
    ],
)
def test_a_parts_precision_comes_before_that_of_the_run(
    tmp_path: Path, descriptor: dict[str, Any], fitting: dict[str, Any], dtype: str, expected: tuple[str, str]
) -> None:
    result = train(config(tmp_path, items(), descriptor=descriptor, fitting=fitting, dtype=dtype))
    model = load_dpa1(result.checkpoint)
    assert (model.descriptor.config.precision, model.fitting.config.precision) == expected
    assert model.fitting.dtype == getattr(torch, expected[1])


def test_float16_trains_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float16 holds a trained model, it cannot train one"):
        train(config(tmp_path, items(), descriptor={"precision": "half"}))


def test_frozen_parts_do_not_move(tmp_path: Path) -> None:
    changed = config(tmp_path, items(), descriptor={"trainable": False}, fitting={"trainable": [False, True, True]})
    model = load_dpa1(train(changed).checkpoint)
    start = DPA1(TYPES, model.descriptor.config, model.fitting.config)
    first, now = dict(start.named_parameters()), dict(model.named_parameters())
    # elements of the data are sorted by atomic number: H, O
    moved = {name for name in now if not torch.equal(first[name], now[name])} - {"fitting.nets.0.2.b"}
    assert moved == {f"fitting.nets.0.{layer}.{name}" for layer, name in ((1, "w"), (1, "b"), (1, "idt"), (2, "w"))}
    frozen = {"trainable": False}
    with pytest.raises(InputError, match="nothing is left to train"):
        train(config(tmp_path, items(), descriptor=frozen, fitting=frozen, out=str(tmp_path / "none")))


def test_a_run_of_before_an_option_goes_on(tmp_path: Path) -> None:
    values = config(tmp_path, items())
    path = train(values).checkpoint.parent / "checkpoint.pt"
    content = checkpoint.read(path)
    for part, names in {"descriptor": ("type", "lmax", "use_econf_tebd"), "fitting": ("numb_fparam", "mixed_types")}.items():
        for name in names:
            del content["config"]["model"][part][name]
    content = {name: checkpoint.to_tensors(value) if "model" in name else value for name, value in content.items()}
    checkpoint.write(path, content)
    assert train(values | {"n_steps": 5}).steps == 5
    with pytest.raises(InputError, match="was made with another model"):
        train(config(tmp_path, items(), fitting={"dim_case_embd": 1}))
