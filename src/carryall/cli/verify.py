"""`carryall verify`: the same numbers from every engine on this machine, as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console, show_settings
from carryall.errors import InputError

if TYPE_CHECKING:
    from carryall.package.verify_report import VerifyReport

DEVIATES = 3
"""Exit code when an engine deviates or fails; 2 is input that cannot be used."""


@dataclass(frozen=True)
class VerifyConfig:
    """Run the same structures through every engine on this machine and compare the numbers. Exit code 3 when some differ."""

    model: Positional[str]
    """Packed file (.pt2, .pte); a checkpoint, source file or built-in name is packed into a temporary folder first."""
    structures: Path | None = None
    """Structures of your own, beside those that are made: extended XYZ, a DeePMD folder, or what ASE reads."""
    most_structures: int = 8
    """Take at most so many of them, spread evenly."""
    engines: str = ""
    """Only these, separated by commas: torch, file, other, ase, dynamics, single, lammps, plugin, domain."""
    ranks: str = "1,2"
    """Ranks of LAMMPS and of domains, separated by commas."""
    tolerance: float | None = None
    """t: differences may be t (1 + largest value), eV and Å; left out: 1e-10, in float32 ten times what plain torch loses."""
    quick: bool = False
    """Compile nothing."""
    timeout: float = 600.0
    """Seconds for each run of LAMMPS and of domains."""
    seed: int = 0
    """Of the structures that are made."""
    device: str = "cpu"
    """Where to run what runs in one process."""
    json: Path | None = None
    """Write the report to this file too."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(VerifyConfig, "verify", argv)
    engines, ranks = _names(config.engines), _numbers(config.ranks)
    from carryall.package.verify import verify

    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    show_settings({**settings, "engines": engines or "all", "structures": settings["structures"] or "made ones only"})
    report = verify(
        config.model,
        config.structures,
        engines=engines,
        ranks=ranks,
        tolerance=config.tolerance,
        quick=config.quick,
        most_structures=config.most_structures,
        seed=config.seed,
        timeout=config.timeout,
        device=config.device,
    )
    show_report(report)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return 0 if report.ok else DEVIATES


def show_report(report: VerifyReport) -> None:
    """The table, what it is about, and the verdict."""
    from rich.table import Table
    from rich.text import Text

    from carryall.package.verify_report import QUANTITIES

    out = console()
    sizes = ", ".join(f"{name} ({count})" for name, count in report.structures.items())
    for label, text in (
        ("reference", report.reference),
        ("structures (atoms)", sizes),
        ("tolerance", f"{report.tolerance:.1e} × (1 + largest value), {report.why}"),
    ):
        out.print(Text(f"{label}: ", style="cyan") + Text(text))
    present = [name for name in QUANTITIES if any(name in row.deviations for row in report.rows)]
    table = Table(title=f"largest deviations, {report.path}", title_justify="left", title_style="bold")
    table.add_column("engine")
    for name in present:
        table.add_column(f"{HEADS.get(name, name)}\n{QUANTITIES[name]}", justify="right")
    table.add_column("result", overflow="fold")
    for row in report.rows:
        cells = [f"{row.deviations[name].largest:.1e}" if name in row.deviations else "" for name in present]
        table.add_row(row.title, *cells, Text(_result(row.status, row.note), style=STYLES[row.status]))
    out.print(table)
    out.print(_verdict(report))


HEADS = {"atomic_energy": "of an atom", "magnetic_forces": "magnetic"}
STYLES = {"within": "green", "deviates": "bold red", "failed": "bold red", "absent": "dim", "left out": "dim"}


def _result(status: str, note: str) -> str:
    if not note or status == "absent":  # whose note says it
        return note or status
    return f"{status.upper() if _bad(status) else status}: {note}"


def _bad(status: str) -> bool:
    return status in ("deviates", "failed")


def _verdict(report: VerifyReport) -> str:
    compared = sum(row.status == "within" for row in report.rows)
    bad = [row.title for row in report.rows if _bad(row.status)]
    if bad:
        return f"do not trust {report.path} here: {'; '.join(bad)}"
    if not compared:
        return "nothing was compared: none of these engines is there"
    return f"{compared} engine{'s' if compared > 1 else ''} within the tolerance, none beyond"


def _names(text: str) -> list[str] | None:
    names = [one.strip() for one in text.split(",") if one.strip()]
    return names or None


def _numbers(text: str) -> list[int]:
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise InputError(f"--ranks {text}: expected whole numbers separated by commas, such as 1,2") from None
