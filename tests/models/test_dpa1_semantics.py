"""Graph and padded semantics: padding written out slot by slot, what differs and by how much, and who is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpa1_forms import padded_energy

from carryall import evaluate, load, pack
from carryall.data import AtomicData
from carryall.errors import InputError, SemanticsWarning
from carryall.graph import edge_vectors, graph_from_structures
from carryall.models import DPA1, EagerPotential, FittingConfig, LennardJones, model_from_source, model_to_source
from carryall.models.dpa1.semantics import semantics_note, with_method
from carryall.package.sources import write_source
from structures import CUTOFF, add_ghosts, small_dpa1, structure, structures

TYPES = ("O", "H")


def variant(davg: float = 0.0, **options: Any) -> DPA1:
    base, options = small_dpa1(), {"sel": (60,), **options}
    model = DPA1(
        TYPES,
        base.descriptor.config.model_copy(update=options),
        FittingConfig(neuron=(6, 6)),
        seed=9,
        neighbor_graph_method="legacy",
    )
    with torch.no_grad():
        model.descriptor.dstd.copy_(base.descriptor.dstd)
        model.descriptor.davg[:, 0] = davg * torch.tensor([1.0, -2.0])
        for layer in model.descriptor.attention:
            layer.norm.b.copy_(torch.linspace(-0.2, 0.3, len(layer.norm.b)))
            layer.out_proj.b.copy_(torch.linspace(-0.4, 0.5, len(layer.out_proj.b)))
    return model.eval()


OPTIONS: dict[str, dict[str, Any]] = {
    "smooth": {},
    "not smooth": {"smooth_type_embedding": False},
    "smooth, davg": {"davg": 0.03},
    "not smooth, davg": {"davg": 0.03, "smooth_type_embedding": False},
    "no attention, davg": {"davg": 0.03, "attn_layer": 0},
    "binding sel": {"sel": (5,)},
    "binding sel, davg": {"sel": (3, 4), "davg": 0.03},
    "one side, davg": {"type_one_side": True, "davg": 0.03},
    "strip, davg": {"tebd_input_mode": "strip", "davg": 0.03},
    "strip, not smooth, davg": {"tebd_input_mode": "strip", "smooth_type_embedding": False, "davg": 0.03},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["slab", "open", "ghosts", "masked"])
def test_legacy_equals_padding_written_out(name: str, kind: str) -> None:
    model = variant(**OPTIONS[name])
    graph = graph_from_structures([structure(kind if kind in ("slab", "open") else "tilted", TYPES)], CUTOFF, TYPES)
    if kind == "ghosts":
        graph = add_ghosts(graph)
    if kind == "masked":
        graph = graph.replace(edge_mask=torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(1)) < 0.8)
    vectors = edge_vectors(graph).requires_grad_()
    found, expected = model(graph, vectors), padded_energy(model, graph, vectors)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(energy.sum(), vectors)[0] for energy in (found, expected)]
    assert float(gradients[0].abs().max()) > 1e-3
    assert torch.allclose(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_two_semantics_differ_where_they_should_and_nowhere_else(name: str) -> None:
    items = [one for one in structures(TYPES) if one.n_atoms > 1]
    legacy, graph = (evaluate(EagerPotential(with_method(variant(**OPTIONS[name]), how)), items) for how in ("legacy", "graph"))
    effect = max(float(np.abs(a["energy"] - b["energy"])) for a, b in zip(legacy, graph, strict=True))
    assert effect < 1e-12 if name == "not smooth" else effect > 1e-7
    assert effect < 20


def swapped(one: AtomicData, i: int, j: int) -> AtomicData:
    order = np.arange(one.n_atoms)
    order[[i, j]] = order[[j, i]]
    return AtomicData(one.positions[order], one.atomic_numbers[order], one.cell, one.pbc)


def test_with_davg_padding_depends_on_the_order_of_atoms_and_the_graph_does_not() -> None:
    one = structure("tilted", TYPES)
    assert one.atomic_numbers[0] != one.atomic_numbers[1]
    for how, changes in (("legacy", True), ("graph", False)):
        pot = EagerPotential(with_method(variant(davg=0.03), how))
        a, b = evaluate(pot, [one, swapped(one, 0, 1)])
        assert (abs(float(a["energy"] - b["energy"])) > 1e-4) is changes
    legacy = EagerPotential(variant(davg=0.03, attn_layer=0))
    together = evaluate(legacy, [structure("open", TYPES), one])
    alone = [evaluate(legacy, item)[0] for item in (structure("open", TYPES), one)]
    for a, b in zip(together, alone, strict=True):  # each system of a batch has its own first atom
        assert np.allclose(a["forces"], b["forces"], rtol=0, atol=1e-12)


def test_legacy_packs_and_keeps_its_semantics(tmp_path: Path) -> None:
    model = variant(davg=0.03)
    path = pack(model, tmp_path / "legacy.pte")  # checked against eager on graphs of all kinds
    items = structures(TYPES)
    for a, b in zip(evaluate(load(path), items), evaluate(EagerPotential(model), items), strict=True):
        assert np.allclose(a["forces"], b["forces"], rtol=0, atol=1e-12)
    assert load(path, neighbor_graph_method="legacy").spec.block_edges is None  # energies depend on another atom
    with pytest.raises(InputError, match="packed with neighbor_graph_method 'legacy', not 'graph': pack it again"):
        load(path, neighbor_graph_method="graph")


def test_the_source_keeps_the_method() -> None:
    assert "neighbor_graph_method" not in model_to_source(small_dpa1())
    again = model_from_source(model_to_source(variant()))
    assert isinstance(again, DPA1)
    assert again.neighbor_graph_method == "legacy"


def test_only_dpa1_has_a_method() -> None:
    with pytest.raises(InputError, match="LennardJones has no neighbor_graph_method"):
        load("lj-argon", neighbor_graph_method="legacy")
    with pytest.raises(InputError, match="must be one of graph, legacy, got 'dense'"):
        with_method(small_dpa1(), "dense")
    assert isinstance(LennardJones.argon(), LennardJones)


# -- who is told


NOTES = {
    "smooth": "empty slots stay in the softmax",
    "smooth, davg": "davg is not zero",
    "binding sel": r"sel = 5 cuts \d+ neighbours",
    "not smooth": None,
}


@pytest.mark.parametrize("name", NOTES)
def test_a_model_for_which_it_matters_says_so(name: str, tmp_path: Path) -> None:
    model = with_method(variant(**OPTIONS[name]), "graph")
    assert isinstance(model, DPA1)
    note, expected = semantics_note(model), NOTES[name]
    assert model.neighbor_graph_method == "graph"
    path = write_source(tmp_path / "model.json", {"software": "deepmd-kit", "model": model_to_source(model)})
    if expected is None:
        assert note is None
        load(path)  # warnings are errors here
        return
    with pytest.warns(SemanticsWarning, match=expected):
        load(path)
    assert note is not None
    assert "differ by" in note
    assert "\n" not in note
    heard: list[str] = []
    load(path, notify=heard.append)
    assert heard == [f"{path}: {note}"]


def test_nobody_is_told_who_chose_or_who_trained_here(tmp_path: Path) -> None:
    source = model_to_source(with_method(variant(), "graph"))
    theirs = write_source(tmp_path / "theirs.json", {"software": "deepmd-kit", "model": source})
    own = write_source(tmp_path / "own.json", {"software": "carryall", "model": source})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(own)
        load(theirs, neighbor_graph_method="graph")
        load(theirs, neighbor_graph_method="legacy")


def test_the_size_in_the_note_is_the_difference_on_the_probe() -> None:
    model = with_method(variant(davg=0.03), "graph")
    assert isinstance(model, DPA1)
    from carryall.models.dpa1.semantics import probe

    graph = probe(model)
    energies = [float(EagerPotential(with_method(model, how))(graph)["energy"]) for how in ("legacy", "graph")]
    note = semantics_note(model)
    assert note is not None
    assert f"differ by {abs(energies[0] - energies[1]) / 32:.1e} eV/atom" in note
