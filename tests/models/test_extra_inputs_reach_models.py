"""fparam and aparam of structures in every way to run a potential: evaluate, packed file, ASE, dynamics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from carryall import evaluate, load, pack
from carryall.data import AtomicData, Batch
from carryall.dynamics import NVE
from carryall.errors import InputError
from carryall.graph import edge_vectors, graph_from_structures
from carryall.graph.skin import SkinNeighborList
from carryall.models import DPA1, DescriptorConfig, EagerPotential, FittingConfig
from structures import CUTOFF, structure

TYPES = ("O", "H")
NAMES = ("periodic", "open", "tilted")


def model(**fitting: object) -> DPA1:
    small = DescriptorConfig(rcut=CUTOFF, rcut_smth=1.0, sel=(20,), neuron=(4, 8), axis_neuron=3, tebd_dim=3, attn_layer=0)
    options = {"numb_fparam": 2, "numb_aparam": 1, "neuron": (6, 6), **fitting}
    made = DPA1(TYPES, small, FittingConfig(**options), seed=1).eval()  # type: ignore[arg-type]
    made.descriptor.dstd.fill_(0.1)
    return made


def items(*, lacking: tuple[int, ...] = ()) -> list[AtomicData]:
    found = []
    for index, name in enumerate(NAMES):
        bare = structure(name, TYPES)
        aparam = torch.linspace(0, 1 + index, bare.n_atoms, dtype=torch.float64)
        system = {} if index in lacking else {"fparam": [0.3 * index, 1.0]}
        found.append(bare.replace(system_extras=system, atom_extras={"aparam": aparam}))
    return found


def direct(potential: DPA1, data: AtomicData, fparam: list[float] | None = None) -> float:
    graph = graph_from_structures([data], CUTOFF, TYPES)
    values = torch.tensor([fparam], dtype=torch.float64) if fparam else data.system_extras["fparam"][None].double()
    graph = graph.replace(fparam=values, aparam=data.atom_extras["aparam"][:, None])
    return float(potential(graph, edge_vectors(graph)).detach().sum())


def test_evaluate_packed_and_eager(tmp_path: Path) -> None:
    made, structures = model(), items()
    expected = [direct(made, one) for one in structures]
    for potential in (EagerPotential(made), load(pack(made, tmp_path / "model.pte"))):
        assert potential.spec.extra_inputs == ("fparam", "aparam")
        found = evaluate(potential, structures)
        assert np.allclose([one["energy"] for one in found], expected, rtol=0, atol=1e-11)
        atoms = [one.to_ase() for one in structures]
        assert np.allclose([one["energy"] for one in evaluate(potential, atoms)], expected, rtol=0, atol=1e-11)


def test_a_default_fills_what_some_structures_lack() -> None:
    made, structures = model(default_fparam=(0.5, -0.5)), items(lacking=(1,))
    found = [float(one["energy"]) for one in evaluate(EagerPotential(made), structures)]
    expected = [direct(made, structures[0]), direct(made, structures[1], [0.5, -0.5]), direct(made, structures[2])]
    assert np.allclose(found, expected, rtol=0, atol=1e-11)
    assert abs(expected[1] - direct(made, items()[1])) > 1e-4


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"fparam is missing for system 1: the potential needs 2 values for each system"):
        evaluate(EagerPotential(model()), items(lacking=(1,)))
    with pytest.raises(InputError, match="fparam is missing for system 0"):
        evaluate(EagerPotential(model()), structure("open", TYPES))


def test_a_skin_list_takes_the_parameters_of_the_batch_it_is_given() -> None:
    neighbors = SkinNeighborList(CUTOFF, TYPES)
    batch = Batch.from_data_list(items())
    neighbors.graph(batch)
    batch.set("fparam", batch.fparam + 1.0)
    graph = neighbors.graph(batch)
    assert neighbors.n_searches == batch.n_systems
    assert graph.fparam is not None
    assert torch.equal(graph.fparam, batch.fparam)
    batch.remove("fparam")
    assert neighbors.graph(batch).fparam is None


def test_ase_calculator_sees_parameters_and_their_changes() -> None:
    pytest.importorskip("ase")
    from carryall.engines.ase import Calculator

    made = model()
    atoms = items()[0].to_ase()
    atoms.calc = Calculator(EagerPotential(made))
    first = atoms.get_potential_energy()
    assert abs(first - direct(made, items()[0])) < 1e-11
    assert atoms.get_potential_energy() == first
    assert atoms.calc.n_calls == 1
    atoms.info["fparam"] = [2.0, 2.0]
    assert abs(atoms.get_potential_energy() - direct(made, items()[0], [2.0, 2.0])) < 1e-11
    atoms.arrays["aparam"][0] += 0.5
    assert atoms.get_potential_energy() != first
    assert atoms.calc.n_calls == 3
    del atoms.info["fparam"]
    with pytest.raises(InputError, match="fparam is missing"):
        atoms.get_potential_energy()


def test_dynamics_gives_every_system_its_own() -> None:
    made = model()
    batch = Batch.from_data_list(items())
    NVE(EagerPotential(made), 0.1).run(batch, 2)
    expected = [direct(made, one) for one in batch.to_data_list()]
    assert np.allclose(batch.energy.numpy(), expected, rtol=0, atol=1e-9)


def test_loading_a_dict_says_how_semantics_matter(tmp_path: Path) -> None:
    from carryall.package.export import source_of
    from carryall.package.sources import write_source

    path = write_source(tmp_path / "model.json", source_of(model()))
    assert load(path).spec.dim_fparam == 2
