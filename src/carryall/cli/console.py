"""What a run prints: configuration, data table, output tree, step headers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from carryall.data import AtomicData

LABELS = ("energy", "forces", "stress")


def console() -> Console:
    """Standard output; 110 columns where it is not a terminal, so that logs do not wrap early."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=110)


def show_settings(settings: Mapping[str, Any]) -> None:
    """Resolved configuration: one line a key, one paragraph a group of keys."""
    rows = dict(_paragraphs(settings))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows.items():
        grid.add_row(key, Text(value))
    console().print(grid)


def _paragraphs(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            if not prefix:
                yield key, _shown(value)
            continue
        inside = [f"{name} = {_shown(one)}" for name, one in value.items() if not isinstance(one, Mapping)]
        if inside:
            yield f"{prefix}{key}", "; ".join(inside)
        yield from _paragraphs(value, f"{prefix}{key}.")


def show_data(sets: Mapping[str, Sequence[AtomicData]]) -> None:
    """A table with one row for each set of structures."""
    from carryall.data import summary

    table = Table(title="data", title_justify="left", title_style="bold")
    for name in ("set", "frames", "atoms a frame", "elements", "energy, eV/atom", "force rms, eV/Å", "labels", "periodic"):
        table.add_column(name)
    for name, structures in sets.items():
        facts = summary(structures)
        sizes = facts["atoms_min"], facts["atoms_max"]
        labels = [_label(label, facts[f"with_{label}"], facts["frames"]) for label in LABELS]
        mean, std, rms = (facts[key] for key in ("energy_per_atom_mean", "energy_per_atom_std", "force_rms"))
        table.add_row(
            name,
            str(facts["frames"]),
            str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}",
            " ".join(facts["elements"]),
            "" if mean is None else f"{mean:.4f} ± {std:.4f}",
            "" if rms is None else f"{rms:.3f}",
            " ".join(filter(None, labels)) or "none",
            "all" if facts["periodic"] == facts["frames"] else str(facts["periodic"]),
        )
    console().print(table)


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A plain table."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def show_files(folder: Path, comments: Mapping[str, str], title: str = "") -> None:
    """A tree of output files, `name -> one comment`; a name may have folders in it."""
    tree = Tree(Text(f"{folder}/", style="bold") + Text(f"  {title}" if title else "", style="dim"))
    branches: dict[str, Tree] = {"": tree}
    width = max((len(name.rsplit("/", 1)[-1]) for name in comments), default=0)
    for name, comment in comments.items():
        parent, _, leaf = name.rpartition("/")
        if parent not in branches:
            branches[parent] = tree.add(Text(f"{parent}/", style="bold"))
        branches[parent].add(Text(f"{leaf:<{width}}  ") + Text(comment, style="dim"))
    console().print(tree)


@dataclass(frozen=True)
class Steps:
    """Numbered headers with the time since the start."""

    total: int
    began: float = field(default_factory=time.monotonic)

    def header(self, number: int, title: str) -> None:
        """Announce a step."""
        console().print(
            Text(f"\n[{number}/{self.total}] {title}", style="bold green") + Text(f"  {self.elapsed:.0f} s", style="dim")
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began


def _label(name: str, count: int, frames: int) -> str:
    return "" if count == 0 else name if count == frames else f"{name} ({count})"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)
