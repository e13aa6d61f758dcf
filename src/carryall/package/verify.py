"""`carryall.verify`: the same structures through every engine on this machine, compared with the model from its source."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from carryall.data import AtomicData, write_structures
from carryall.errors import CarryallError, InputError, MissingDependencyError, SemanticsWarning, nearest
from carryall.graph.potential import Potential
from carryall.models.dpa1.compression import compress
from carryall.models.eager import EagerPotential
from carryall.package.check import TOLERANCE
from carryall.package.compile import require_compiler
from carryall.package.from_source import load_model, with_weight_dtype
from carryall.package.load import load_packed
from carryall.package.pack import pack
from carryall.package.rebuild import rebuild
from carryall.package.run import PackedPotential
from carryall.package.verify_engines import all_at_once, by_ase, by_dynamics, by_dynamics_alone, one_by_one
from carryall.package.verify_ranks import domain_command, lammps_command, plugin_path, run_single_points, untakeable
from carryall.package.verify_report import Results, Status, VerifyReport, VerifyRow, deviations, judged, not_finite
from carryall.package.verify_structures import made_structures, users_structures
from carryall.progress import progress_bar

ENGINES = {
    "torch": "plain torch, all in one call",
    "file": "the file itself",
    "other": "the other form, from the source",
    "ase": "ASE calculator",
    "dynamics": "dynamics, one batch",
    "single": "dynamics, one by one",
    "lammps": "LAMMPS driver",
    "plugin": "LAMMPS plugin",
    "domain": "domains (torchrun)",
}
"""Names and what they are, in the order of the table."""
LAUNCHED = ("lammps", "plugin", "domain")
MARGIN, LEAST = 10.0, 1e-6
"""Single precision: so many times what it costs plain torch, and never less."""
UNKNOWN = "its source is of a model class that is not known here"
Evaluate = Callable[[], Results]


class LeftOut(CarryallError):
    """An engine that cannot take this potential."""


@dataclass(frozen=True)
class Subject:
    """What is verified, and with what."""

    path: Path
    """A packed file."""
    potential: PackedPotential
    model: nn.Module | None
    """From the source inside, as the file has it; None where that is of a class that is not known here."""
    names: tuple[str, ...]
    structures: tuple[AtomicData, ...]
    data: Path
    """The structures as extended XYZ."""
    folder: Path
    """For files that are made on the way."""
    device: str
    quick: bool
    timeout: float

    @property
    def plain(self) -> Potential:
        """The model by plain torch, in the dtype of the file; LeftOut where there is none."""
        if self.model is None:
            raise LeftOut(UNKNOWN)
        return eager(self.model, self.device)

    def other(self) -> Path:
        """The other form of the file, made from its source when it is first asked for."""
        if self.model is None:
            raise LeftOut(UNKNOWN)
        suffix = ".pte" if self.path.suffix == ".pt2" else ".pt2"
        path = self.folder / f"other{suffix}"
        if path.exists():
            return path
        if suffix == ".pt2" and self.quick:
            raise LeftOut("a .pt2 of its source would have to be compiled: leave out --quick")
        if suffix == ".pt2":
            require_compiler()
        return rebuild(self.path, path, device=self.device, check=False, notify=lambda _: None)


def verify(
    path: str | Path,
    structures: Any = None,
    *,
    engines: Sequence[str] | None = None,
    ranks: Sequence[int] = (1, 2),
    tolerance: float | None = None,
    quick: bool = False,
    most_structures: int = 8,
    seed: int = 0,
    timeout: float = 600.0,
    device: str = "cpu",
    progress: bool = True,
) -> VerifyReport:
    """Compare every engine with the reference, on structures made for the potential and on `structures`.

    `path`: a packed file, or a checkpoint, source file or built-in name, which is packed into a temporary folder first.
    `structures`: a file, or ase.Atoms or AtomicData, one or many, of which at most `most_structures` are taken. The
    reference is the model from the source inside the file, run by plain torch in float64; the file itself where the source is
    of a class that is not known here.
    `engines`: names in `ENGINES`, None for all; `ranks`: of LAMMPS and domains. `tolerance` t: differences may be
    t (1 + largest value of the quantity in the structure), in eV per atom, eV/Å and eV; None: 1e-10 in float64, in float32 ten
    times what plain torch loses by it on these structures, between 1e-6 and 2e-4. `quick` compiles nothing; `timeout` in
    seconds for each run of LAMMPS and of domains. An engine that is absent is a row that says so. InputError for unusable
    input, a file that is damaged or does not fit this machine, or an element that the potential does not know.
    """
    wanted = _wanted(engines, ranks, tolerance)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="carryall-verify-")))
        advance = stack.enter_context(progress_bar("verify", len(wanted) + 1)) if progress else None
        tell = advance or (lambda steps, note: None)
        tell(0, "reading")
        subject = _subject(Path(path), structures, folder, most_structures, seed, device, quick, timeout)
        reference, what, dtype = _reference(subject)
        problem = not_finite(reference, subject.names)
        if tolerance is None:
            tolerance, why = _tolerance(subject, reference, dtype)
        else:
            why = "as asked for"
        tell(1, "")
        rows = [] if problem is None else [VerifyRow("reference", what, 1, "failed", {}, problem, 0.0)]
        for engine, count in wanted:
            tell(0, _title(subject, engine, count))
            rows.append(_row(subject, engine, count, reference, tolerance))
            tell(1, "")
        sizes = {name: one.n_atoms for name, one in zip(subject.names, subject.structures, strict=True)}
        return VerifyReport(str(path), what, subject.potential.spec.dtype, tolerance, why, sizes, tuple(rows))


def eager(model: nn.Module, device: str) -> Potential:
    """A model by plain torch."""
    model.eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return EagerPotential(model, device)  # type: ignore[arg-type]


def _wanted(engines: Sequence[str] | None, ranks: Sequence[int], tolerance: float | None) -> list[tuple[str, int]]:
    """Engines and ranks in the order of the table."""
    for name in engines or ():
        if name not in ENGINES:
            raise InputError(f"unknown engine {name!r}{nearest(name, ENGINES)}: known are {', '.join(ENGINES)}")
    if engines is not None and not engines:
        raise InputError(f"no engines: name some of {', '.join(ENGINES)}, or none for all")
    if not ranks or any(type(count) is not int or count < 1 for count in ranks):
        raise InputError(f"ranks must be positive numbers, got {list(ranks)}")
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"tolerance must be positive, got {tolerance}")
    chosen = [name for name in ENGINES if engines is None or name in engines]
    counts = sorted(set(ranks))
    # one domain is the plain call
    several = [count for count in counts if count > 1] or counts
    of = {"lammps": counts, "plugin": counts, "domain": several}
    return [(name, count) for name in chosen for count in of.get(name, [1])]


def _subject(
    path: Path, structures: Any, folder: Path, most: int, seed: int, device: str, quick: bool, timeout: float
) -> Subject:
    if path.suffix not in (".pt2", ".pte"):
        path = _packed(path, folder, quick, device)
    potential = load_packed(path, device)
    chosen = made_structures(potential.spec, seed)
    if structures is not None:
        chosen |= users_structures(structures, potential.spec, most)
    data = folder / "structures.extxyz"
    write_structures(data, list(chosen.values()))
    facts, items = potential.facts, tuple(chosen.values())
    try:
        model: nn.Module | None = _model(path, facts.dtype, facts.compressed, facts.compression_tolerance)
    except InputError:
        model = None
    return Subject(path, potential, model, tuple(chosen), items, data, folder, device, quick, timeout)


def _packed(path: Path, folder: Path, quick: bool, device: str) -> Path:
    """A file of what is none yet, compiled where that can be done."""
    suffix = ".pte"
    if not quick:
        try:
            require_compiler()
            suffix = ".pt2"
        except MissingDependencyError:
            pass
    return pack(path, folder / f"model{suffix}", dtype=None, device=device, notify=lambda _: None)


def _model(path: Path, dtype: str, compressed: bool, compression_tolerance: float | None) -> nn.Module:
    """The model from the source inside a file; where the file has tables in place of nets, with the same tables."""
    model = with_weight_dtype(load_model(path, notify=lambda _: None), dtype)
    return compress(model, tolerance=compression_tolerance)[0] if compressed else model


def _reference(subject: Subject) -> tuple[Results, str, str]:
    """What all is compared with, what that is in words, and its dtype."""
    facts = subject.potential.facts
    potential: Potential = subject.potential
    text = f"the file itself in plain calls: {UNKNOWN}"
    if subject.model is not None:
        potential = eager(_model(subject.path, "float64", facts.compressed, facts.compression_tolerance), subject.device)
        tables = ", with its tables" if facts.compressed else ""
        text = f"the source inside the file, plain torch, {potential.spec.dtype}{tables}, structure by structure"
    try:
        return one_by_one(potential, subject.structures), text, potential.spec.dtype
    except CarryallError:
        raise
    except Exception as error:
        raise CarryallError(f"nothing to compare with: {text}: {type(error).__name__}: {_first_line(error)}") from error


def _tolerance(subject: Subject, reference: Results, reference_dtype: str) -> tuple[float, str]:
    """Of the file's dtype, and where it comes from."""
    dtype = subject.potential.spec.dtype
    if reference_dtype == dtype:
        return TOLERANCE[dtype], f"the default of {dtype}"
    lost = deviations(one_by_one(subject.plain, subject.structures), reference, subject.names)
    most = max(one.scaled for one in lost.values())
    return min(max(MARGIN * most, LEAST), TOLERANCE[dtype]), f"{MARGIN:g} × {most:.1e}, what {dtype} costs plain torch here"


def _row(subject: Subject, engine: str, ranks: int, reference: Results, tolerance: float) -> VerifyRow:
    began, title = time.monotonic(), _title(subject, engine, ranks)

    def row(status: Status, found: Mapping[str, Any], note: str) -> VerifyRow:
        return VerifyRow(engine, title, ranks, status, found, note, time.monotonic() - began)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SemanticsWarning)
            found = deviations(_evaluation(subject, engine, ranks)(), reference, subject.names)
    except MissingDependencyError as error:
        return row("absent", {}, _first_line(error))
    except LeftOut as error:
        return row("left out", {}, _first_line(error))
    # whatever an engine raises is a finding about that engine
    except Exception as error:
        kind = "" if isinstance(error, CarryallError) else f"{type(error).__name__}: "
        return row("failed", {}, kind + _first_line(error))
    status, note = judged(found, tolerance)
    return row(status, found, note)


def _evaluation(subject: Subject, engine: str, ranks: int) -> Evaluate:
    """What runs an engine; raises where it cannot."""
    items, device = subject.structures, subject.device
    if engine == "torch":
        return partial(all_at_once, subject.plain, items)
    if engine == "other":
        return lambda: one_by_one(load_packed(subject.other(), device), items)
    if engine in LAUNCHED:
        return _launched(subject, engine, ranks)
    if engine in ("dynamics", "single"):
        return partial(by_dynamics if engine == "dynamics" else by_dynamics_alone, subject.potential, items, device)
    return partial(by_ase if engine == "ase" else one_by_one, subject.potential, items)


def _launched(subject: Subject, engine: str, ranks: int) -> Evaluate:
    if names := untakeable(engine, subject.potential.spec, subject.structures):
        raise LeftOut(f"it has no {names} to give to the potential")
    if subject.device != "cpu":
        raise LeftOut(f"it runs on the CPU here, not on {subject.device}")
    if engine == "domain":
        command = domain_command(ranks)
    else:
        command = lammps_command(ranks, plugin_path(subject.timeout) if engine == "plugin" else None)
    # the plugin runs compiled code only
    model = subject.other() if engine == "plugin" and subject.path.suffix == ".pte" else subject.path
    return lambda: run_single_points(command, model, subject.data, subject.structures, ranks, subject.timeout)


def _title(subject: Subject, engine: str, ranks: int) -> str:
    suffix = subject.path.suffix
    other = {".pt2": ".pte", ".pte": ".pt2"}[suffix]
    if engine == "file":
        return f"the {suffix} itself"
    if engine == "other":
        return f"{other} of the source"
    made = f" ({other})" if engine == "plugin" and suffix == ".pte" else ""
    shared = f", {ranks} rank{'s' if ranks > 1 else ''}" if engine in LAUNCHED else ""
    return f"{ENGINES[engine]}{made}{shared}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
