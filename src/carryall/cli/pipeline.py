"""`carryall pipeline`: structures through stages, one behind the other or each on ranks of torchrun; a kill loses none."""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_files, show_settings, show_table
from carryall.cli.inputs import FrameStream, load_potential, notify
from carryall.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from carryall.dynamics import RelaxResult
    from carryall.dynamics.pipeline.config import PipelineConfig
    from carryall.dynamics.structures import Sourced
    from carryall.graph import Potential

CONFIG = "pipeline.yaml"
FILES = {
    "finished.extxyz": "structures that passed all stages, with energy, forces and what each stage made of them",
    "results.csv": "outcome, steps, energy, largest force and reason of every input, in input order",
    CONFIG: "the resolved configuration",
    "ledger.sqlite": "all of it as it comes, and what is on its way: --resume goes on from here",
}
ANALYSIS = {
    "analysis.csv": "numbers of every stage for every input",
    "rdf.csv": "radial distribution of the finished structures",
    "analysis.png": "the same as a picture",
}
INTERRUPTED = 130
TOLD = 5
"""Kinds of failures that are told at the end."""


@dataclass(frozen=True)
class PipelineArguments:
    """Structures through stages that a YAML file describes: relax, md, analysis; a run that was killed goes on with --resume.

    Under torchrun (torchrun --nproc-per-node 2 -m carryall pipeline ...) each stage has ranks of its own; without, one process
    works through all stages in turn.
    """

    config: Positional[Path]
    """The YAML file."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for the results; None: that of the file."""
    resume: bool = False
    """Go on with the run in the folder, or begin one."""
    dry_run: bool = False
    """Print what would be done, and end."""
    rebuild: bool = False
    """Compile a .pt2 that does not fit this machine from its source, once, into the cache."""


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of all files, with their number, which is counted once."""

    stream: FrameStream
    count: int

    def __iter__(self) -> Iterator[Sourced]:
        return iter(self.stream)

    def __len__(self) -> int:
        return self.count


def run(argv: Sequence[str]) -> int:
    """The verb; exit code 0 when at least one structure passed all stages."""
    arguments = parse(PipelineArguments, "pipeline", argv)
    from carryall.dynamics.pipeline.config import read_pipeline_config

    config = read_pipeline_config(arguments.config)
    if arguments.out is not None:
        config = config.model_copy(update={"out": arguments.out})
    paths = input_files(config.inputs)
    leads = int(os.environ.get("RANK", "0")) == 0
    if leads:
        check_folder(config, arguments.resume)
    if arguments.dry_run:
        if leads:
            show_plan(config, paths, None)
        return 0
    potentials = load_all(config, leads, arguments.rebuild)
    try:
        return work(config, arguments, paths, potentials, leads)
    except KeyboardInterrupt:
        # every rank is asked to stop; the one that keeps the ledger says what has become of the run
        if leads:
            notify(f"interrupted, everything is saved in {config.out}/: the same command with --resume goes on")
        return INTERRUPTED


def work(
    config: PipelineConfig,
    arguments: PipelineArguments,
    paths: Sequence[Path],
    potentials: Mapping[str, Potential],
    leads: bool,
) -> int:
    """Run the pipeline; on the rank that leads, say what it does and what became of it."""
    from carryall.cli.pipeline_stages import stages_of
    from carryall.dynamics import DistributedPipeline
    from carryall.dynamics.pipeline.config import HOW

    settings = {name: getattr(config, name) for name in HOW if name != "checkpoint_seconds"}
    pipeline = DistributedPipeline(stages_of(config, potentials), **settings)
    frames = None
    if leads:
        frames = Frames(FrameStream(paths), len(FrameStream(paths)))
        show_plan(config, paths, frames.count)
        keep_config(config)
    began = time.monotonic()
    results = pipeline.run(
        frames,
        out=config.out,
        resume=arguments.resume,
        checkpoint_seconds=config.checkpoint_seconds,
        progress=sys.stderr.isatty(),
    )
    if results is None:
        return 0
    if config.analysis is not None:
        analyse(config, results)
    return show_outcome(config, results, time.monotonic() - began)


def input_files(inputs: Sequence[str]) -> list[Path]:
    """Files of all inputs; of a folder all in it by name, without hidden ones, unless the folder is one of DeePMD.

    InputError for an input that names nothing.
    """
    found: list[Path] = []
    for one in inputs:
        path = Path(one)
        if path.is_dir():
            found += _of_folder(path)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(one):
            matches = sorted(glob.glob(one, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            if not matches:
                raise InputError(f"inputs: no file matches {one!r}")
            found += map(Path, matches)
        else:
            raise InputError(f"inputs: no such file or folder: {one}")
    return found


def _of_folder(path: Path) -> list[Path]:
    if (path / "type.raw").exists() or any(path.glob("set.*")):
        return [path]
    files = sorted(one for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
    if not files:
        raise InputError(f"inputs: the folder {path} holds no files")
    return files


def check_folder(config: PipelineConfig, resume: bool) -> None:
    """InputError where the folder has a run and none is to be resumed, or one with other settings."""
    from carryall.dynamics.ledger import differing, holds_run
    from carryall.dynamics.pipeline.config import read_pipeline_config

    if not holds_run(config.out):
        return
    if not resume:
        raise InputError(f"{config.out} holds a run already: go on with --resume, or write elsewhere with -o")
    kept = config.out / CONFIG
    if not kept.exists():
        return
    for name, (then, now) in differing(read_pipeline_config(kept).fixed(), config.fixed()).items():
        raise InputError(
            f"{config.out} was begun with {name} = {then}, this run has {name} = {now}: "
            "give the same, or write elsewhere with -o"
        )


def keep_config(config: PipelineConfig) -> None:
    """The configuration as a file that this verb reads."""
    import yaml

    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / CONFIG
    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    part.replace(path)


def load_all(config: PipelineConfig, leads: bool, rebuild: bool) -> dict[str, Potential]:
    """Each potential once; one rank of all says what takes long."""
    from carryall.package.open import load

    names = dict.fromkeys(str(one.model or config.model) for _, one in config.work)
    if leads:
        return {name: load_potential(name, config.device, rebuild) for name in names}
    return {name: load(name, config.device, rebuild=rebuild, notify=lambda text: None) for name in names}


def show_plan(config: PipelineConfig, paths: Sequence[Path], n_frames: int | None) -> None:
    """What is going to be done."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    needed = sum(one.ranks for _, one in config.work)
    where = f"{started} ranks" if started > 1 else "one process, stage by stage in turn"
    if started == 1 and needed > 1:
        where += f" (for a rank each: torchrun --nproc-per-node {needed} -m carryall pipeline ...)"
    frames = "" if n_frames is None else f", {n_frames} structures"
    files = f"{len(paths)} file{'' if len(paths) == 1 else 's'}"
    how = "helping" if config.helping else "not helping"
    show_settings(
        {"inputs": f"{files}{frames}", "runs on": where, "ranks": f"{config.comm_mode}, {how}", "out": f"{config.out}/"}
    )
    rows = []
    for place, (name, one) in enumerate(config.work):
        set_by_user = {
            key: value for key, value in one.model_dump(exclude_unset=True).items() if key not in ("name", "model", "ranks")
        }
        words = ", ".join(f"{key} {value}" for key, value in set_by_user.items()) or "defaults"
        rows.append((f"{place} {name}", str(one.ranks), str(one.model or config.model), words))
    if config.analysis is not None:
        rows.append(("  analysis", "at the end", "", ", ".join(f"{key} {value}" for key, value in config.analysis)))
    show_table(("stage", "ranks", "potential", "settings"), rows)
    show_files(config.out, FILES | (ANALYSIS if config.analysis is not None else {}))


def analyse(config: PipelineConfig, results: Sequence[RelaxResult]) -> None:
    """Numbers of the finished structures, read from the ledger one after the other."""
    from carryall.dynamics.pipeline.config import MDConfig
    from carryall.properties.analysis import PICTURE, plot_analysis
    from carryall.properties.analysis import analyse as analyse_results

    assert config.analysis is not None
    stages = {name: isinstance(one, MDConfig) for name, one in config.work}
    found = analyse_results(results, stages, config.out, r_max=config.analysis.r_max, n_bins=config.analysis.n_bins)
    held = {
        name: float(one.temperature)
        for name, one in config.work
        if isinstance(one, MDConfig) and one.ensemble in ("nvt", "npt") and ":" not in one.temperature
    }
    try:
        plot_analysis(found, config.out / PICTURE, targets=held)
    except MissingDependencyError as missing:
        notify(f"no {PICTURE}: {missing}")


def show_outcome(config: PipelineConfig, results: Sequence[RelaxResult], seconds: float) -> int:
    """What became of the inputs; the exit code."""
    from carryall.dynamics.folder_status import folder_status
    from carryall.dynamics.pipeline.report import span

    found = folder_status(config.out)
    rows: list[tuple[Any, ...]] = [(one["name"], str(one["done"]), str(one["failed"])) for one in found.stages]
    show_table(("stage", "passed", "failed"), rows)
    for one in found.failures[:TOLD]:
        notify(f"{one.count} failed: {one.reason} (input {one.index}; all in {config.out / 'results.csv'})")
    if not found.finished:
        first = next((one.reason for one in found.failures), "there was none")
        raise InputError(
            f"none of {len(results)} structures finished; the first: {first} (all reasons in {config.out / 'results.csv'})"
        )
    console().print(f"{found.finished} finished, {found.failed} failed in {span(seconds)}; written to {config.out}/")
    return 0
