"""`carryall train`: a training run from a YAML file and flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_data, show_files, show_settings, show_table
from carryall.cli.inputs import notify
from carryall.errors import MissingDependencyError

if TYPE_CHECKING:
    from carryall.training import TrainConfig, TrainResult

FILES = {
    "config.yaml": "the resolved configuration: train again with it",
    "learning_curve.csv": "errors and learning rate against steps",
    "learning_curve.png": "the same as a picture",
    "best.pt": "the best model by validation: pack this one",
    "checkpoint.pt": "the last state: a run goes on from here by itself",
}
YAML = (".yaml", ".yml")


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = read_arguments(list(argv))
    from carryall.training.loop import read_data

    structures, held_out = read_data(config)
    show_settings(config.model_dump(mode="json"))
    show_data({"training": structures, **({"validation": held_out} if held_out else {})})
    show_files(config.out, FILES)
    result = train_and_plot(config)
    show_result(result)
    console().print(f"next: carryall pack {result.checkpoint} model.pt2")
    return 0


def read_arguments(argv: list[str]) -> TrainConfig:
    """The YAML file, if one is named, with the flags over it."""
    from carryall.training.config import TrainConfig, read_config

    files = [one for one in argv if one.endswith(YAML)] or [one for one in argv[:1] if not one.startswith("-")]
    default = read_config(Path(files[0])) if files else None
    rest = [one for one in argv if not files or one != files[0]]
    return parse(TrainConfig, "train [config.yaml]", rest, default)


def train_and_plot(config: TrainConfig) -> TrainResult:
    """Train; the configuration lies beside the results as YAML, the learning curve as a picture where matplotlib is present."""
    from carryall.training.loop import train

    result = train(config)
    write_yaml(config.out / FILES_CONFIG, config)
    try:
        from carryall.properties.plots import plot_learning_curve

        plot_learning_curve(result.learning_curve, config.out / "learning_curve.png")
    except MissingDependencyError as missing:
        notify(f"no learning_curve.png: {missing}")
    return result


FILES_CONFIG = "config.yaml"


def write_yaml(path: Path, config: TrainConfig) -> None:
    """The configuration as a file that `carryall train` reads."""
    import yaml

    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    part.replace(path)


def show_result(result: TrainResult) -> None:
    """Errors of the kept model."""
    kept = result.validation
    rows = [("energy", f"{kept.rmse_energy:.2f} meV/atom"), ("forces", f"{kept.rmse_forces:.1f} meV/Å")]
    show_table(("validation, best model", "RMSE"), rows)
    console().print(f"{result.steps} steps in {result.seconds:.0f} s; model in {result.checkpoint}")
