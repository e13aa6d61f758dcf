"""`carryall pack --target deepmd`: a `.pt2` that the stock deepmd-kit runs, in Python (`DeepPot`) and in LAMMPS.

The program has deepmd-kit's inputs and outputs (deepmd_program.py), the metadata the names that its readers look for, beside
ours. `model.json` is its form of the model, so that what looks into it works too; a model that it has no form of is kept in
`source.json` instead, and deepmd-kit then works from the metadata alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import edge_vectors
from carryall.models.combination import sel_of
from carryall.models.derivatives import EnergyModel
from carryall.models.dpa1.model import DPA1
from carryall.models.eager import EagerPotential
from carryall.package.arrays import as_list, to_json
from carryall.package.check import TOLERANCE, PackError, check_graphs
from carryall.package.compile import compile_program, compiler_version
from carryall.package.convert import for_deepmd, is_of_deepmd
from carryall.package.cpu import checked_level
from carryall.package.deepmd_program import OUTPUTS, deepmd_inputs, input_names, trace_for_deepmd
from carryall.package.export import kind_of, source_of
from carryall.package.facts import definition, metadata_of
from carryall.package.load import quiet_torch
from carryall.package.manifest import MODEL, append_facts, rewrite, seal
from carryall.package.sources import OWN_SOURCE

LOWER_KIND = "graph"
UNKNOWN_SEL = 200  # neighbours, where the model has no number: deepmd-kit wants one, and uses it for padded lists only
COMPARED = {
    "energy": "energy",
    "atom_energy": "atomic_energy",
    "force": "forces",
    "virial": "virial",
    "atom_virial": "atomic_virial",
}
DEFS: dict[str, tuple[str, list[str | int], str]] = {
    "atype": ("int64", ["n_nodes"], "index into type_map"),
    "n_node": ("int64", ["n_frames"], "nodes of a frame, owned ones first"),
    "n_local": ("int64", ["n_frames"], "owned nodes of a frame"),
    "edge_index": ("int64", [2, "n_edges"], "neighbour and centre, ascending by centre"),
    "edge_vec": ("float64", ["n_edges", 3], "angstrom, neighbour minus centre"),
    "edge_mask": ("bool", ["n_edges"], "false at the end: no edge"),
    "destination_order": ("int64", ["n_edges"], "not used"),
    "destination_row_ptr": ("int64", ["n_nodes + 1"], "edges of centre c are row_ptr[c] to row_ptr[c + 1]"),
    "source_order": ("int64", ["n_edges"], "not used"),
    "source_row_ptr": ("int64", ["n_nodes + 1"], "not used"),
    "fparam": ("float64", ["n_frames", "dim_fparam"], "parameters of a frame"),
    "aparam": ("float64", ["n_nodes", "dim_aparam"], "parameters of a node"),
    "charge_spin": ("float64", ["n_frames", "dim_chg_spin"], "total charge and spin of a frame"),
    "atom_energy": ("float64", ["n_nodes", 1], "eV, 0 for ghosts"),
    "energy": ("float64", ["n_frames", 1], "eV"),
    "force": ("float64", ["n_nodes", 3], "eV/angstrom"),
    "virial": ("float64", ["n_frames", 9], "eV, -dE/dstrain"),
    "atom_virial": ("float64", ["n_nodes", 9], "eV, an edge's term goes to its neighbour"),
    "mask": ("int32", ["n_nodes"], "1 for owned nodes"),
}
"""Type, shape and meaning of inputs and outputs."""


def pack_for_deepmd(
    model: nn.Module,
    path: str | Path,
    *,
    device: str = "cpu",
    cpu_level: str | None = None,
    source: dict[str, Any] | None = None,
    training_config: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    check: bool = True,
) -> Path:
    """Write `model` to a `.pt2` that deepmd-kit 3.2 runs, verified against eager before it gets its name; returns the path.

    Arguments as of `export_model`. InputError for a model with message passing or spins, for one whose energy depends on the
    order of atoms, and for another suffix.
    """
    path = Path(path)
    if kind_of(path) != "pt2":
        raise InputError(f"{path}: deepmd-kit runs .pt2 only here: give a name that ends in .pt2")
    check_model(model)
    level = checked_level(cpu_level)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry, text = source_entry(source or source_of(model))
    metadata = metadata_of(
        model.eval().to(device), "pt2", device, model_json=text, cpu_level=level, compiler=compiler_version(),
        facts={**(facts or {}), **deepmd_facts(model)},
    )  # fmt: skip
    program = trace_for_deepmd(model, device)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=path.parent) as folder:
        # deepmd-kit looks below `model/`, and torch names the root of the archive after the file
        part = Path(folder) / "model.pt2"
        with quiet_torch():
            compile_program(program, part, level)
        append_facts(part, metadata, text if entry == MODEL else "", training_config or {})
        if entry != MODEL:
            rewrite(part, {entry: text.encode()})
            seal(part)
        if check:
            check_program_against_eager(_runner(part, device), model)
        part.replace(path)
    return path


def check_model(model: nn.Module) -> None:
    """InputError for what deepmd-kit's graph form cannot carry."""
    spec = cast(EnergyModel, model).spec
    if spec.message_passing:
        raise InputError(f"a {type(model).__name__} passes messages: pack --target deepmd is for models without them as yet")
    if spec.spin:
        raise InputError(f"a {type(model).__name__} takes spins: pack --target deepmd is for models without them as yet")
    for part in model.modules():
        if isinstance(part, DPA1) and part.neighbor_graph_method == "legacy" and part.spec.block_edges is None:
            raise InputError(
                "the model has davg that is not zero and padded semantics: its energy depends on which atom comes first, which "
                "LAMMPS changes; pack it with --neighbor-graph-method graph"
            )


def source_entry(root: dict[str, Any]) -> tuple[str, str]:
    """Name and text of the entry that keeps the source: deepmd-kit's form in `model.json`, or ours in `source.json`."""
    if is_of_deepmd(root):
        written = for_deepmd(root)
        del written["model_def_script"]
        return MODEL, to_json(written, as_list)
    return OWN_SOURCE, to_json(root)


def deepmd_facts(model: nn.Module) -> dict[str, Any]:
    """The metadata that deepmd-kit's readers in Python and C++ look at, and what differs of ours."""
    spec = cast(EnergyModel, model).spec
    sel = sel_of(model) or UNKNOWN_SEL
    return {
        "target": "deepmd",
        "rcut": spec.cutoff,
        "sel": [sel],
        "nnei": sel,
        "mixed_types": True,
        "has_default_fparam": spec.default_fparam is not None,
        "has_chg_spin_ebd": bool(spec.dim_chg_spin),
        "has_default_chg_spin": spec.default_chg_spin is not None,
        "chg_spin_table_ranges": None,
        "fitting_output_defs": output_definitions(),
        "sel_type": [],
        "is_spin": False,
        "has_comm_artifact": False,
        "has_message_passing": False,
        "lower_input_kind": LOWER_KIND,
        "graph_edge_dtype": "float64",
        "pair_exclude_types": [],  # the program leaves them out itself
        "do_atomic_virial": True,
        "input_keys": list(input_names(spec)),
        "output_keys": list(OUTPUTS),
        "input_defs": [definition(name, *DEFS[name]) for name in input_names(spec)],
        "output_defs": [definition(name, *DEFS[name]) for name in OUTPUTS],
    }


def output_definitions() -> list[dict[str, Any]]:
    """deepmd-kit's description of an energy model."""
    shared = {"shape": [1], "atomic": True, "r_hessian": False, "magnetic": False, "intensive": False, "category": 0}
    energy = {"name": "energy", **shared, "reducible": True, "r_differentiable": True, "c_differentiable": True}
    mask = {"name": "mask", **shared, "reducible": False, "r_differentiable": False, "c_differentiable": False}
    return [energy, mask]


def check_program_against_eager(run: Callable[..., Sequence[Tensor]], model: nn.Module) -> float:
    """The largest relative deviation over graphs of all kinds; PackError when it is beyond the tolerance of the dtype."""
    potential = cast(EnergyModel, model)
    spec, eager = potential.spec, EagerPotential(potential)
    worst, where = 0.0, "nothing"
    graphs = check_graphs(spec)
    for index, graph in enumerate(graphs):
        found = dict(zip(OUTPUTS, run(*deepmd_inputs(graph, edge_vectors(graph), spec)), strict=True))
        expected = eager(graph, atomic_virial=True)
        for name, own in COMPARED.items():
            value = expected[own].reshape(expected[own].shape[0], -1)
            error = relative(found[name][: len(value)], value)
            if error > worst:
                worst, where = error, f"{name} of graph {index}"
    if not worst <= TOLERANCE[spec.dtype]:
        raise PackError(f"the program differs from the model by {worst:.1e} in {where}, more than {TOLERANCE[spec.dtype]:.0e}")
    return worst


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest deviation by max(1, size of the value); infinity for NaN."""
    if not expected.numel():
        return 0.0
    return float(((found - expected).abs() / expected.abs().clamp_min(1.0)).nan_to_num(torch.inf).max().detach())


def _runner(path: Path, device: str) -> Callable[..., Sequence[Tensor]]:
    index = -1 if torch.device(device).index is None else torch.device(device).index
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
    return lambda *inputs: loader.run(list(inputs))
