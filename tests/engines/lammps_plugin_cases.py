"""What test_lammps_plugin.py has LAMMPS do: cases for the peer, and inputs for `lmp`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from carryall import pack
from carryall.package.manifest import METADATA, append_facts, open_packed, read_json
from message_passing import small_message_passing
from structures import fcc

ELEMENTS = {"tangled": ("Cu", "Au"), "dpa1": ("O", "H")}

Case = dict[str, Any]


def crystal(repeats: tuple[int, int, int] = (3, 2, 2)) -> Case:
    positions, cell = fcc(repeats, seed=1)
    inside = positions % np.diag(cell)
    return {"positions": inside.tolist(), "cell": cell.tolist(), "types": [1 + k % 2 for k in range(len(inside))]}


def tilted() -> Case:
    flat = crystal((2, 2, 2))
    cell = np.array([[7.2, 0, 0], [1.1, 7.3, 0], [-0.7, 0.6, 7.5]])
    inside = np.array(flat["positions"]) @ np.linalg.inv(np.array(flat["cell"])) @ cell
    return {**flat, "positions": inside.tolist(), "cell": cell.tolist()}


def geometries() -> dict[str, Case]:
    base = crystal()
    box = np.diag(base["cell"])
    return {
        "crystal": base,
        "tilted": tilted(),
        "slab": {**base, "boundary": "p p f", "low": [0, 0, -3.0], "cell": np.diag(box + np.array([0, 0, 9.0])).tolist()},
        # all atoms in one corner: of several ranks all but one have none, and most of those no ghosts either
        "cluster": {**base, "boundary": "f f f", "low": [-1.0] * 3, "cell": (np.eye(3) * 90.0).tolist()},
        "tiny": {"positions": [[0.3, 0.2, 0.9]], "types": [2], "cell": [[3.1, 0, 0], [0.2, 3.3, 0], [0.1, -0.3, 3.2]]},
    }


def cases(models: dict[str, Path]) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for model, elements in ELEMENTS.items():
        style = [f"pair_style carryall {models[model]}", f"pair_coeff * * {' '.join(elements)}"]
        for name, geometry in geometries().items():
            found[f"{model}, {name}"] = {**geometry, "style": style}
        for name in ("crystal", "tilted"):
            found[f"{model}, {name}, newton off"] = {**found[f"{model}, {name}"], "newton": "off"}
        found[f"{model}, crystal, tiled"] = {
            **found[f"{model}, crystal"],
            "early": ["comm_style tiled"],
            "late": ["balance 1.0 rcb"],
        }
        found[f"{model}, crystal, real"] = {**found[f"{model}, crystal"], "units": "real"}
    one, two = models.values()
    both = [
        f"pair_style hybrid/overlay carryall {one} carryall {two}",
        f"pair_coeff * * carryall 1 {' '.join(ELEMENTS['tangled'])}",
        f"pair_coeff * * carryall 2 {' '.join(ELEMENTS['dpa1'])}",
    ]
    return {**found, "both, crystal": {**crystal(), "style": both}}


def moving(models: dict[str, Path]) -> dict[str, Case]:
    """Runs whose atoms change ranks, which end alike on any number of them."""
    start = {**crystal(), "style": [f"pair_style carryall {models['tangled']}", "pair_coeff * * Cu Au"]}
    # velocities by id, or they would depend on the number of ranks
    hot = ["velocity all create 3000.0 4711 loop all", "timestep 0.002"]
    return {
        "nve": {**start, "late": [*hot, "fix 1 all nve"], "run": "run 100 post no"},
        "nve, newton off": {**start, "newton": "off", "late": [*hot, "fix 1 all nve"], "run": "run 100 post no"},
        "nve, balanced": {
            **start,
            "early": ["comm_style tiled"],
            "late": [*hot, "fix 1 all nve", "fix 2 all balance 10 1.0 rcb"],
            "run": "run 100 post no",
        },
        "npt": {**start, "late": [*hot, "fix 1 all npt temp 300 300 0.1 aniso 0 0 1.0"], "run": "run 30 post no"},
        "minimize": {**start, "late": ["min_style cg"], "run": "minimize 0.0 1e-3 20 40"},
    }


def script(plugin: Path, case: Case, *end: str) -> str:
    """An input for `lmp`."""
    box = np.diag(case["cell"])
    atoms = [
        f"{k + 1} {kind} {' '.join(map(repr, row))}"
        for k, (kind, row) in enumerate(zip(case["types"], case["positions"], strict=True))
    ]
    bounds = [f"0.0 {float(box[k])!r} {axis}lo {axis}hi" for k, axis in enumerate("xyz")]
    data = [
        "made by a test",
        "",
        f"{len(atoms)} atoms",
        "2 atom types",
        *bounds,
        "",
        "Masses",
        "",
        "1 64.0",
        "2 197.0",
        "",
        "Atoms",
    ]
    lines = [
        f"plugin load {plugin}",
        "units metal",
        "read_data atoms.data",
        "neighbor 0.5 bin",
        *case["style"],
        "compute e all pe/atom",
        "dump d all custom 1 out.txt id fx fy fz c_e",
        'dump_modify d format float "%.17g"',
        *end,
    ]
    return "\n".join([*data, "", *atoms, ""]) + "\0" + "\n".join([*lines, ""])


def resealed(model: Path, path: Path, **changes: Any) -> Path:
    """A copy with other facts."""
    shutil.copy(model, path)
    with open_packed(path) as packed:
        model_json = packed.read("model/extra/model.json").decode()
    append_facts(path, {**read_json(path, METADATA), **changes}, model_json, {})
    return path


def damaged(model: Path, path: Path) -> Path:
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def wrong_inputs(models: dict[str, Path], folder: Path) -> dict[str, tuple[Case, str]]:
    """Cases, and what LAMMPS has to say to them."""
    tangled, dpa1 = models.values()
    junk = folder / "junk.pt2"
    junk.write_text("no archive")
    pte = pack(small_message_passing(), folder / "model.pte", check=False)

    def of(file: Path, elements: str = "Cu Au", **changes: Any) -> Case:
        return {**crystal((2, 1, 1)), "style": [f"pair_style carryall {file}", f"pair_coeff * * {elements}"], **changes}

    def styled(*lines: str) -> Case:
        return of(tangled, style=[f"pair_style carryall {tangled}", "pair_coeff * * Cu Au", *lines])

    apart = crystal((2, 1, 1))
    apart["positions"][1] = apart["positions"][0]
    return {
        "element": (of(tangled, "Cu Xx"), "does not know the element Xx; it knows Cu Au"),
        "count": (of(tangled, "Cu"), "one element for each of the 2 atom types, as in `pair_coeff * * Cu Au`, got 1 elements"),
        "null": (of(tangled, "Cu NULL"), "passes messages between all atoms: give every atom type an element"),
        "pte": (of(pte), "is a portable program (.pte), and the pair style runs compiled ones: carryall rebuild"),
        "absent": (of(folder / "absent.pt2"), "absent.pt2 cannot be read"),
        "junk": (of(junk), "junk.pt2 is no packed potential"),
        "damaged": (of(damaged(tangled, folder / "damaged.pt2")), "does not match the manifest; the file is damaged"),
        "cuda": (of(resealed(tangled, folder / "cuda.pt2", device="cuda")), "compiled for cuda"),
        "cpu": (of(resealed(tangled, folder / "cpu.pt2", machine="riscv64")), "it is for riscv64 and this machine is"),
        "torch": (of(resealed(tangled, folder / "torch.pt2", torch_version="1.9.0")), "compiled under torch 1.9.0 and this is"),
        "spin": (of(resealed(tangled, folder / "spin.pt2", extra_inputs=["fparam", "spin"])), "it takes fparam, spin, which"),
        "long": (of(resealed(tangled, folder / "long.pt2", long_range=True)), "(long range)"),
        "deepmd": (of(resealed(tangled, folder / "deepmd.pt2", target="deepmd")), "packed for deepmd"),
        "format": (of(resealed(tangled, folder / "format.pt2", format_version=1)), "of an old format"),
        "units": (of(tangled, units="electron"), "units electron, but it knows those of metal and real"),
        "dimension": (of(tangled, early=["dimension 2"], low=[0, 0, -1.0]), "dimension 2, but its models"),
        "exclude": (styled("neigh_modify exclude type 1 1"), "neigh_modify exclude takes pairs out"),
        "tail": (styled("pair_modify tail yes"), "tail and shift"),
        "words": (of(tangled, style=["pair_style carryall"]), "expected one word, the file"),
        "numbers": (of(tangled, **apart), "the energy or force of atom 1 at step 0 is no finite number"),
        "numbers in a block": (of(dpa1, "O H", **apart), "the energy or force of atom 1 at step 0 is no finite number"),
    }
