"""The training loop: read, prepare, step, validate, checkpoint; it goes on where a run of the same configuration stopped."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from carryall.data.atomic_data import AtomicData
from carryall.data.dataset import check_structures, split_structures
from carryall.data.elements import symbol_of
from carryall.data.readers import read_structures
from carryall.errors import CarryallError, InputError
from carryall.interrupt import stop_between_steps
from carryall.models.derivatives import evaluate_model
from carryall.models.dpa1.model import DPA1, Config, with_precision
from carryall.models.registry import model_from_source, model_to_source
from carryall.progress import progress_bar
from carryall.training import checkpoint
from carryall.training.config import TrainConfig, read_config
from carryall.training.loss import Errors, learning_rate, loss_and_errors
from carryall.training.samples import Sample, batch_indices, collate, largest_degree, make_samples
from carryall.training.statistics import set_statistics

CURVE = "learning_curve.csv"
COLUMNS = {
    "step": "1", "learning_rate": "1", "loss": "1", "train_rmse_energy": "meV/atom", "train_rmse_forces": "meV/angstrom",
    "validation_rmse_energy": "meV/atom", "validation_rmse_forces": "meV/angstrom", "time": "s",
}  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """Where the run left its files, and how good the kept model is."""

    checkpoint: Path
    """The best model by validation (by training errors without validation data)."""
    learning_curve: Path
    steps: int
    validation: Errors
    seconds: float


@dataclass(frozen=True, eq=False)
class Run:
    """What the loop works on."""

    config: TrainConfig
    model: DPA1
    averaged: DPA1
    optimizer: torch.optim.Optimizer
    train: list[Sample]
    validation: list[Sample]


def train(config: TrainConfig | dict[str, Any] | str | Path) -> TrainResult:
    """Train as `config` says; resumes by itself from `out/checkpoint.pt` when it was made with the same configuration."""
    config = read_config(config)
    structures, held_out = read_data(config)
    config.out.mkdir(parents=True, exist_ok=True)
    last = config.out / "checkpoint.pt"
    state = checkpoint.read(last) if last.exists() else None
    if state is not None:
        _refuse_changes(last, state["config"], config)
    run = prepare(config, structures, held_out, state)
    return _loop(run, state)


def read_data(config: TrainConfig) -> tuple[list[AtomicData], list[AtomicData]]:
    """Training and validation structures, checked."""
    keys = {name: getattr(config.data, name) for name in ("energy_key", "forces_key", "stress_key")}

    def read(paths: Sequence[Path]) -> list[AtomicData]:
        found = [one for path in paths for one in read_structures(path, **keys)]
        check_structures(found)
        return found

    structures = read(config.data.train)
    if config.data.validation:
        return structures, read(config.data.validation)
    if config.data.validation_fraction == 0 or len(structures) < 2:
        return structures, []
    fraction = config.data.validation_fraction
    kept, held_out = split_structures(structures, (1 - fraction, fraction), seed=config.seed)
    return kept, held_out


def prepare(
    config: TrainConfig, structures: Sequence[AtomicData], held_out: Sequence[AtomicData], state: dict[str, Any] | None = None
) -> Run:
    """Graphs, model with statistics (or the state's), optimizer."""
    numbers = torch.cat([one.atomic_numbers for one in structures]).unique().tolist()
    type_map = config.model.type_map or tuple(symbol_of(number) for number in numbers)
    descriptor = in_run_precision(config.model.descriptor, config.dtype)
    fitting = in_run_precision(config.model.fitting, config.dtype)
    train_samples = make_samples(structures, descriptor.rcut, type_map, fitting)
    validation = make_samples(held_out, descriptor.rcut, type_map, fitting)
    if state is None:
        if config.model.auto_sel:
            sel = 4 * math.ceil(1.1 * largest_degree(train_samples) / 4)
            descriptor = descriptor.model_copy(update={"sel": (max(4, sel),)})
        model = DPA1(type_map, descriptor, fitting, seed=config.seed)
        with torch.no_grad():
            for net in model.fitting.nets:
                list(net.children())[-1].b.zero_()  # type: ignore[operator]
        set_statistics(model, train_samples)
        averaged = model_from_source(model_to_source(model))
    else:
        model = model_from_source(state["raw_model"])  # type: ignore[assignment]
        averaged = model_from_source(state["model"])
    assert isinstance(averaged, DPA1)
    model, averaged = model.to(config.device), averaged.to(config.device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("nothing is left to train: set model.descriptor.trainable or model.fitting.trainable")
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate.start)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    return Run(config, model, averaged, optimizer, train_samples, validation)


def in_run_precision(config: Config, dtype: str) -> Config:
    """The configuration with the run's dtype where its precision is "default"."""
    if config.precision == "float16":
        raise InputError("precision float16 holds a trained model, it cannot train one: use float32 or float64")
    return with_precision(config, dtype) if config.precision == "default" else config


def _loop(run: Run, state: dict[str, Any] | None) -> TrainResult:
    config = run.config
    first = 0 if state is None else state["step"]
    best = math.inf if state is None else state["best"]
    spent = 0.0 if state is None else state["seconds"]
    began = time.monotonic()
    curve = config.out / CURVE
    _trim_curve(curve, first)
    recent = Errors()
    validation = Errors() if state is None else Errors(**state["errors"])
    with stop_between_steps() as stop, progress_bar("training", config.n_steps, first) as advance:
        for step in range(first, config.n_steps):
            loss, errors, rate = train_step(run, step)
            recent = recent + errors
            done = step + 1
            if done % config.validate_every == 0 or done == config.n_steps:
                validation = measure(run.averaged, run.validation or run.train, config.device)
                _append_curve(curve, done, rate, loss, recent, validation, spent + time.monotonic() - began)
                score = score_of(validation)
                if score < best:
                    best = score
                    _save(run, config.out / "best.pt", done, best, spent + time.monotonic() - began, validation)
                advance(0, f"validation {validation.rmse_energy:.1f} meV/atom, {validation.rmse_forces:.0f} meV/Å")
                recent = Errors()
            if done % config.checkpoint_every == 0 or done == config.n_steps or stop():
                _save(run, config.out / "checkpoint.pt", done, best, spent + time.monotonic() - began, validation)
            advance(1, None)
            if stop():
                raise KeyboardInterrupt
    final = checkpoint.read(config.out / "best.pt") if (config.out / "best.pt").exists() else None
    kept = Errors(**final["errors"]) if final is not None else validation
    return TrainResult(config.out / "best.pt", curve, config.n_steps, kept, spent + time.monotonic() - began)


def score_of(errors: Errors) -> float:
    """What the best model is chosen by: forces (meV/Å) plus ten times the energy per atom (meV)."""
    parts = [value for value in (errors.rmse_forces, 10 * errors.rmse_energy) if not math.isnan(value)]
    return sum(parts) if parts else math.inf


def train_step(run: Run, step: int) -> tuple[float, Errors, float]:
    """One optimizer step: loss, errors of its batch, learning rate. A loss that is not finite ends the run."""
    config = run.config
    rate = learning_rate(config.learning_rate, step, config.n_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batch = collate([run.train[i] for i in batch_indices(len(run.train), config.batch_size, step, config.seed)], config.device)
    run.optimizer.zero_grad(set_to_none=True)
    out = evaluate_model(run.model, batch.graph, create_graph=True)
    loss, errors = loss_and_errors(config.loss, out, batch, rate / config.learning_rate.start)
    if not bool(torch.isfinite(loss)):
        raise CarryallError(
            f"the loss is {loss.item()} at step {step}: lower learning_rate.start, or check the labels with carryall eval"
        )
    loss.backward()
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    run.optimizer.step()
    # early steps are forgotten faster, so that the average does not drag the random start along
    decay = min(config.average, (step + 1) / (step + 10)) if config.average else 0.0
    with torch.no_grad():
        for kept, new in zip(run.averaged.parameters(), run.model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)
    return float(loss.detach()), errors, rate


def measure(model: DPA1, samples: Sequence[Sample], device: str = "cpu", batch_size: int = 8) -> Errors:
    """Errors over samples."""
    total = Errors()
    zero = TrainConfig.model_fields["loss"].default
    for first in range(0, len(samples), batch_size):
        batch = collate(samples[first : first + batch_size], device)
        total = total + loss_and_errors(zero, evaluate_model(model, batch.graph), batch, 0.0)[1]
    return total


def _save(run: Run, path: Path, step: int, best: float, seconds: float, errors: Errors) -> None:
    content = {
        "model": checkpoint.to_tensors(model_to_source(run.averaged)),
        "raw_model": checkpoint.to_tensors(model_to_source(run.model)),
        "optimizer": run.optimizer.state_dict(),
        "config": run.config.model_dump(mode="json"),
        "step": step,
        "best": best,
        "seconds": seconds,
        "errors": vars(errors),
    }
    checkpoint.write(path, content)


def _refuse_changes(path: Path, old: dict[str, Any], config: TrainConfig) -> None:
    new = config.model_dump(mode="json")
    with contextlib.suppress(ValidationError):
        old = TrainConfig.model_validate(old).model_dump(mode="json")  # with the options that later versions added
    free = {"out", "n_steps", "device", "validate_every", "checkpoint_every"}
    changed = sorted(key for key in new if key not in free and new[key] != old.get(key))
    if changed:
        raise InputError(
            f"{path} was made with another {', '.join(changed)}: train into another folder, or remove it to start again"
        )


def _trim_curve(path: Path, last_step: int) -> None:
    """Start the table, or drop the rows that the run about to resume will write again."""
    if path.exists() and last_step:
        rows = path.read_text().splitlines()
        kept = rows[:2] + [row for row in rows[2:] if int(row.split(",")[0]) <= last_step]
        path.write_text("\n".join(kept) + "\n")
        return
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(COLUMNS.values()) + "\n")


def _append_curve(
    path: Path, step: int, rate: float, loss: float, train_errors: Errors, validation: Errors, seconds: float
) -> None:
    values = (
        step,
        rate,
        loss,
        train_errors.rmse_energy,
        train_errors.rmse_forces,
        validation.rmse_energy,
        validation.rmse_forces,
        seconds,
    )
    with path.open("a", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerow([f"{value:.6g}" for value in values])
