"""Spins, and charge and spin state of a system, in every way to run a potential: evaluate, ASE, dynamics, graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from carryall import evaluate
from carryall.data import AtomicData, Batch
from carryall.dynamics import NVE
from carryall.errors import InputError
from carryall.graph import PotentialSpec, graph_from_batch
from carryall.graph.potential import with_defaults
from carryall.graph.skin import SkinNeighborList
from carryall.models import EagerPotential, evaluate_model
from carryall.models.spin import SpinModel
from spin_models import TYPES, ChargedSprings, small_spin, with_spins
from structures import CUTOFF, structure

NAMES = ("periodic", "open", "tilted")


def spin_items() -> list[AtomicData]:
    return [with_spins(structure(name, TYPES), seed) for seed, name in enumerate(NAMES)]


def charged(name: str, state: list[float] | None) -> AtomicData:
    return structure(name, TYPES).replace(system_extras={} if state is None else {"charge_spin": state})


def springs(data: AtomicData, state: list[float]) -> float:
    """What ChargedSprings has to give."""
    graph = graph_from_batch(Batch.from_data_list([data]), CUTOFF, TYPES)
    model = ChargedSprings()
    out = evaluate_model(model, graph.replace(charge_spin=torch.tensor([state], dtype=torch.float64)))
    return float(out["energy"][0])


# -- spins


def test_evaluate_takes_structures_and_ase_atoms() -> None:
    pytest.importorskip("ase")
    model, items = small_spin(), spin_items()
    wanted = ("energy", "magnetic_forces")
    found = evaluate(EagerPotential(model), items, wanted)
    assert [one["magnetic_forces"].shape for one in found] == [(one.n_atoms, 3) for one in items]
    as_moments = [one.to_ase() for one in items]
    as_arrays = [one.replace(spins=None).to_ase() for one in items]
    for atoms, one in zip(as_arrays, items, strict=True):
        assert one.spins is not None
        atoms.arrays["spin"] = one.spins.numpy()
    for other in (as_moments, as_arrays):
        for a, b in zip(evaluate(EagerPotential(model), other, wanted), found, strict=True):
            assert np.array_equal(a["energy"], b["energy"])
            assert np.array_equal(a["magnetic_forces"], b["magnetic_forces"])


def test_ase_calculator_sees_moments_and_their_changes() -> None:
    pytest.importorskip("ase")
    from ase.calculators.calculator import PropertyNotImplementedError

    from carryall.engines.ase import Calculator

    model, data = small_spin(), spin_items()[0]
    expected = evaluate(EagerPotential(model), data, ("energy", "forces", "magnetic_forces"))[0]
    atoms = data.to_ase()
    atoms.calc = Calculator(EagerPotential(model))
    assert atoms.get_potential_energy() == pytest.approx(float(expected["energy"]), abs=1e-11)
    np.testing.assert_allclose(atoms.calc.results["magnetic_forces"], expected["magnetic_forces"], rtol=0, atol=1e-11)
    assert np.array_equal(atoms.calc.get_property("magnetic_forces", atoms), atoms.calc.results["magnetic_forces"])
    assert atoms.calc.n_calls == 1
    moments = atoms.get_initial_magnetic_moments()
    moments[0] += 0.3
    atoms.set_initial_magnetic_moments(moments)
    assert atoms.get_potential_energy() != pytest.approx(float(expected["energy"]), abs=1e-6)
    assert atoms.calc.n_calls == 2
    atoms.info["note"] = "nothing that counts"
    atoms.get_forces()
    assert atoms.calc.n_calls == 2
    del atoms.arrays["initial_magmoms"]
    atoms.set_initial_magnetic_moments(np.ones(len(atoms)))
    with pytest.raises(InputError, match=r"spin is missing for atom 0, .*as vectors"):
        atoms.get_potential_energy()
    plain = data.to_ase()
    plain.calc = Calculator(EagerPotential(ChargedSprings((0.0, 1.0))))
    with pytest.raises(PropertyNotImplementedError):
        plain.calc.get_property("magnetic_forces", plain)


def test_dynamics_gives_every_atom_its_spin_and_magnetic_force() -> None:
    model = small_spin()
    batch = Batch.from_data_list(spin_items())
    NVE(EagerPotential(model), 0.1).run(batch, 3)
    found = evaluate(EagerPotential(model), batch.to_data_list(), ("energy", "magnetic_forces"))
    np.testing.assert_allclose(batch.energy.numpy(), [one["energy"] for one in found], rtol=0, atol=1e-10)
    magnetic = np.concatenate([one["magnetic_forces"] for one in found])
    np.testing.assert_allclose(batch.get("magnetic_forces").numpy(), magnetic, rtol=0, atol=1e-10)


def test_finished_systems_leave_the_call_with_their_spins() -> None:
    """Systems of a batch stop at different steps: the others keep their own spins and states."""
    from carryall.dynamics.forces import ForceEvaluator

    items = [one.replace(system_extras={"charge_spin": [0.1 * k, 1.0 + k]}) for k, one in enumerate(spin_items())]
    batch = Batch.from_data_list(items)
    model = EagerPotential(ChargedSprings(spin=True))
    NVE(model, 0.1).run(batch, 1)
    evaluator = ForceEvaluator(model, {"energy", "forces"}, "test", 0.5)
    evaluator.evaluate(batch, torch.tensor([False, True, False]))
    expected = evaluate(model, batch.to_data_list(), ("energy", "magnetic_forces"))
    assert float(batch.energy[1]) == pytest.approx(float(expected[1]["energy"]), abs=1e-10)


def test_a_skin_list_takes_the_spins_of_the_batch_it_is_given() -> None:
    neighbors, batch = SkinNeighborList(CUTOFF, TYPES), Batch.from_data_list(spin_items())
    neighbors.graph(batch)
    batch.spins = batch.spins + 1.0
    graph = neighbors.graph(batch)
    assert neighbors.n_searches == batch.n_systems
    assert graph.spin is not None
    assert torch.equal(graph.spin, batch.spins)
    batch.remove("spins")
    assert neighbors.graph(batch).spin is None


# -- charge and spin state of a system


def test_charge_spin_reaches_a_model() -> None:
    pytest.importorskip("ase")
    from carryall.engines.ase import Calculator

    states = [[0.0, 1.0], [-1.0, 2.0], [2.0, 3.0]]
    items = [charged(name, state) for name, state in zip(NAMES, states, strict=True)]
    potential = EagerPotential(ChargedSprings())
    assert potential.spec.extra_inputs == ("charge_spin",)
    expected = [springs(one, state) for one, state in zip(items, states, strict=True)]
    assert len({round(one, 3) for one in expected}) == 3
    for form in (items, [one.to_ase() for one in items]):
        found = [float(one["energy"]) for one in evaluate(potential, form)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    atoms = items[1].to_ase()
    assert list(atoms.info["charge_spin"]) == [-1.0, 2.0]
    atoms.calc = Calculator(potential)
    assert atoms.get_potential_energy() == pytest.approx(expected[1], rel=1e-12)
    atoms.info["charge_spin"] = [2.0, 1.0]
    assert atoms.get_potential_energy() == pytest.approx(springs(items[1], [2.0, 1.0]), rel=1e-12)
    batch = Batch.from_data_list(items)
    NVE(potential, 1e-6).run(batch, 1)
    np.testing.assert_allclose(batch.energy.numpy(), expected, rtol=1e-6)


def test_charge_spin_is_completed_or_missed() -> None:
    items = [charged("periodic", [1.0, 2.0]), charged("open", None)]
    found = evaluate(EagerPotential(ChargedSprings((0.0, 3.0))), items)
    assert float(found[0]["energy"]) == pytest.approx(springs(items[0], [1.0, 2.0]), rel=1e-12)
    assert float(found[1]["energy"]) == pytest.approx(springs(items[1], [0.0, 3.0]), rel=1e-12)
    with pytest.raises(InputError, match="charge_spin is missing for system 1: the potential needs 2 values for each system"):
        evaluate(EagerPotential(ChargedSprings()), items)
    with pytest.raises(InputError, match="charge_spin has 3 values for each system, the potential needs 2"):
        evaluate(EagerPotential(ChargedSprings()), charged("open", [1.0, 2.0, 3.0]))


# -- the spec


def test_specs_of_older_files_load() -> None:
    spec = small_spin(fitting={"numb_aparam": 1}).spec
    assert PotentialSpec.from_dict(spec.to_dict()) == spec
    assert spec.extra_inputs == ("aparam", "spin")
    old = {"cutoff": 4.0, "type_map": ["O", "H"], "dim_fparam": 1}
    assert PotentialSpec.from_dict(old).extra_inputs == ("fparam",)
    assert "magnetic_forces" not in PotentialSpec.from_dict(old).outputs
    every = PotentialSpec(4.0, TYPES, dim_fparam=1, dim_aparam=1, spin=True, dim_chg_spin=2, default_chg_spin=(0.0, 1.0))
    assert every.extra_inputs == ("fparam", "aparam", "spin", "charge_spin")
    assert PotentialSpec.from_dict(every.to_dict()) == every
    with pytest.raises(InputError, match="default_chg_spin has 1 values, dim_chg_spin is 2"):
        PotentialSpec(4.0, TYPES, dim_chg_spin=2, default_chg_spin=(1.0,))


def test_with_defaults_takes_what_is_there() -> None:
    model = small_spin()
    assert isinstance(model, SpinModel)
    graph = graph_from_batch(Batch.from_data_list(spin_items()), CUTOFF, TYPES)
    assert with_defaults(graph, model.spec).spin is graph.spin
    wrong = graph.replace(spin=torch.zeros(graph.n_atoms, 2, dtype=torch.float64))
    with pytest.raises(InputError, match="spin has 2 values for each atom, the potential needs 3"):
        with_defaults(wrong, model.spec)
