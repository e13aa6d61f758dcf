"""The functions that people call."""

import dataclasses

import ase.units
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE as AseFIRE
from ase.optimize import LBFGS as AseLBFGS
from ase.stress import voigt_6_to_full_3x3_stress
from dynamics_samples import LennardJones, argon, batch_of, cluster

from carryall.data import AtomicData, read_structures
from carryall.dynamics import FixAtoms, HookStageEnum, Ramp, md, read_csv_log, read_trajectory, relax
from carryall.dynamics.samplers import Unreadable
from carryall.dynamics.structures import Sourced
from carryall.errors import InputError
from carryall.graph import PotentialSpec

BAD = {
    "atom 1 is Au": Atoms("ArAu", [[0, 0, 0], [0, 0, 4]]),
    "positions of atom 0": Atoms("Ar", [[np.nan, 0, 0]]),
    "coincide": Atoms("Ar2", [[0, 0, 0], [0, 0, 0]]),
    "no volume": Atoms("Ar", [[0, 0, 0]], cell=[[5, 0, 0], [5, 0, 0], [0, 0, 5]], pbc=True),
    "has no atoms": Atoms(),
    "expected AtomicData or ase.Atoms, got int": 7,
}


def test_results_come_in_input_order_and_equal_ase():
    structures = [argon(1, rattle=0.2), cluster(7, 2), cluster(3, 1).to_ase(), cluster(5, 4)]
    seen = []
    results = relax(structures, LennardJones(), fmax=0.002, max_atoms_per_batch=10, on_result=seen.append)
    assert [one.index for one in results] == [0, 1, 2, 3]
    assert sorted(one.index for one in seen) == [0, 1, 2, 3]
    assert all(one is results[one.index] for one in seen)
    for result, given in zip(results, structures, strict=True):
        atoms = given.copy() if isinstance(given, Atoms) else given.to_ase()
        atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=8.5)
        reference = AseFIRE(atoms, logfile=None)
        reference.run(fmax=0.002, steps=500)
        assert result.outcome == "converged"
        assert result.steps == reference.nsteps
        assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert result.fmax <= 0.002
        np.testing.assert_allclose(result.structure.positions, atoms.positions, atol=1e-7)
        assert float(result.structure.energy) == result.energy
    assert results[0].structure.stress is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        results[0].energy = 0.0


@pytest.mark.parametrize("cell_filter", [None, "frechet"])
@pytest.mark.parametrize("optimizer", ["fire", "lbfgs"])
def test_steps_and_results_do_not_depend_on_the_batch(optimizer, cell_filter):
    sizes = (3, 7, 4, 6)
    structures = [cluster(n, n) if cell_filter is None else argon(1, rattle=0.05 * n, seed=n) for n in sizes]
    settings = {"fmax": 0.001, "max_steps": 12, "optimizer": optimizer, "cell_filter": cell_filter}
    alone = [relax(one, LennardJones(), **settings)[0] for one in structures]
    for most, refill in ((500, 5), (12, 1)):
        together = relax(structures, LennardJones(), max_atoms_per_batch=most, refill_frequency=refill, **settings)
        assert [(one.steps, one.energy, one.fmax) for one in together] == [(one.steps, one.energy, one.fmax) for one in alone]
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a.structure.positions, b.structure.positions)
            assert torch.equal(a.structure.forces, b.structure.forces)
    assert {one.outcome for one in alone} <= {"converged", "step_budget"}


def test_a_generator_is_read_only_as_far_as_it_is_needed():
    given = []

    def endless():
        while True:
            given.append(len(given))
            yield cluster(3, seed=len(given))

    def stop(result):
        if result.index >= 30:
            raise StopIteration(result.index)

    with pytest.raises(StopIteration):
        relax(endless(), LennardJones(), fmax=0.05, max_atoms_per_batch=30, on_result=stop)
    # what is looked at first, what the sampler looks ahead, and the batch
    assert len(given) <= 64 + 256 + 60


def test_a_bad_structure_of_a_generator_is_an_error_when_it_comes():
    seen = []
    with pytest.raises(InputError, match="structure 2: the structure has no atoms"):
        relax(iter([cluster(3), cluster(2), Atoms()]), LennardJones(), max_atoms_per_batch=3, on_result=seen.append)
    items = [
        cluster(3),
        Unreadable("the disk is gone"),
        Sourced(None, "a.cif", 4, "no such file"),
        Sourced(cluster(2), "b.cif", 1),
    ]
    found = relax(iter(items), LennardJones(), errors="set_aside")
    assert [one.outcome for one in found] == ["converged", "failed", "failed", "converged"]
    assert [(one.source, one.frame, one.reason) for one in found[1:]] == [
        (None, None, "the disk is gone"),
        ("a.cif", 4, "no such file"),
        ("b.cif", 1, None),
    ]


def test_a_structure_without_what_the_potential_takes_is_set_aside():
    class Charged(LennardJones):
        def __init__(self):
            super().__init__()
            self.spec = PotentialSpec(8.5, ("Ar",), dim_fparam=2)

        def __call__(self, graph, *, atomic_virial=False):
            assert torch.isfinite(graph.fparam).all()
            return super().__call__(graph)

    given = cluster(3).replace(system_extras={"fparam": torch.tensor([0.5, 1.0])})
    found = relax([given, cluster(4), given], Charged(), errors="set_aside")
    assert [one.outcome for one in found] == ["converged", "failed", "converged"]
    assert "fparam is missing" in found[1].reason
    with pytest.raises(InputError, match="structure 1: fparam is missing"):
        relax([given, cluster(4)], Charged())
    with pytest.raises(InputError, match="structure 0: fparam is missing"):
        md(cluster(4), Charged(), n_steps=1)


def test_data_sets_with_an_index_are_taken():
    class Folder:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("unreadable sector")
            return cluster(3 + index)

    found = relax(Folder(), LennardJones(), errors="set_aside")
    assert [one.outcome for one in found] == ["converged", "failed", "converged"]
    assert found[1].reason == "OSError: unreadable sector"
    with pytest.raises(InputError, match="structure 1: OSError: unreadable sector"):
        relax(Folder(), LennardJones())


def test_the_cell_relaxes_as_in_ase():
    crystals = [argon(1, rattle=0.05, seed=1, a=5.1), argon(1, rattle=0.05, seed=2, a=5.5)]
    pressures = [0.0, 0.3]
    results = relax(crystals, LennardJones(), 1e-3, 300, optimizer="lbfgs", cell_filter="frechet", pressure=pressures)
    for result, atoms, pressure in zip(results, crystals, pressures, strict=True):
        atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=8.5)
        reference = AseLBFGS(FrechetCellFilter(atoms, scalar_pressure=pressure * ase.units.GPa), logfile=None)
        reference.run(fmax=1e-3, steps=300)
        assert (result.outcome, result.steps) == ("converged", reference.nsteps)
        np.testing.assert_allclose(result.structure.cell, atoms.cell.array, atol=1e-6)
        np.testing.assert_allclose(result.structure.stress, voigt_6_to_full_3x3_stress(atoms.get_stress()), atol=1e-7)
        assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert results[1].structure.volume < results[0].structure.volume


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": "fires"},
            "optimizer must be one of fire, lbfgs, gradient_descent, got 'fires', perhaps you meant 'fire'",
        ),
        ({"cell_filter": "unitcell"}, "perhaps you meant 'unit_cell'"),
        ({"pressure": 1.0}, "pressure has no effect at fixed cell"),
        ({"max_edges_per_batch": 0}, "max_edges_per_batch must be a positive integer"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must be 0 or more"),
        ({"max_steps": -1}, "n_steps must be a non-negative integer"),
        ({"refill_frequency": 0}, "refill_frequency"),
        ({"constraints": [FixAtoms(indices=[7])]}, "structure 0: "),
    ],
)
def test_relax_refuses_what_makes_no_sense(change, message):
    potential = LennardJones()
    with pytest.raises(InputError, match=message):
        relax(cluster(3), potential, **change)
    assert potential.n_calls == 0


def test_the_step_budget_is_told_from_convergence():
    results = relax([cluster(7, 2), AtomicData([[0, 0, 0]], [18])], LennardJones(), fmax=1e-4, max_steps=3)
    assert [(one.outcome, one.steps) for one in results] == [("step_budget", 3), ("converged", 0)]
    assert results[0].fmax > 1e-4
    assert results[1].fmax == 0.0


@pytest.mark.parametrize("message", BAD)
def test_a_bad_structure_is_an_error_with_its_index_before_any_work(message):
    potential = LennardJones()
    with pytest.raises(InputError, match=rf"structure 1: .*{message}"):
        relax([cluster(3), BAD[message]], potential)
    assert potential.n_calls == 0


def test_bad_structures_can_be_set_aside():
    structures = [cluster(3), *BAD.values(), cluster(4)]
    results = relax(structures, LennardJones(), errors="set_aside")
    assert [one.outcome for one in results] == ["converged"] + ["failed"] * len(BAD) + ["converged"]
    for result, message in zip(results[1:-1], BAD, strict=True):
        assert message in result.reason
        assert (result.energy, result.fmax, result.steps) == (None, None, 0)
    with pytest.raises(InputError, match="errors must be one of"):
        relax(structures, LennardJones(), errors="ignore")


def test_a_system_that_fails_under_way_does_not_stop_the_others():
    class Brittle(LennardJones):
        def __call__(self, graph, *, atomic_virial=False):
            out = super().__call__(graph)
            sick = torch.bincount(graph.system) == 5
            bad = torch.nan if self.n_calls > 3 else 0.0
            return {**out, "energy": torch.where(sick, out["energy"] + bad, out["energy"])}

    good, bad, other = relax([cluster(4), cluster(5), cluster(6)], Brittle(), fmax=0.01)
    assert (good.outcome, bad.outcome, other.outcome) == ("converged", "failed", "converged")
    assert bad.reason == "energy or forces are not finite"
    assert bad.structure.energy is None
    assert bad.steps == 2


def test_what_relax_takes_as_structures():
    assert len(relax(cluster(3), LennardJones())) == 1
    assert len(relax(batch_of(cluster(3), cluster(2)), LennardJones())) == 2
    assert len(relax((one for one in [cluster(3)]), LennardJones())) == 1
    for nonsense in ("water.xyz", 5):
        with pytest.raises(InputError, match="structures must be AtomicData"):
            relax(nonsense, LennardJones())
    with pytest.raises(InputError, match="max_atoms_per_batch"):
        relax(cluster(3), LennardJones(), max_atoms_per_batch=0)
    with pytest.raises(InputError, match="fmax must be positive"):
        relax(cluster(3), LennardJones(), fmax=0.0)


def test_everything_else_of_a_structure_survives():
    data = cluster(3).replace(info={"name": "trimer"}, atom_extras={"tag": [1, 2, 3]}, velocities=torch.ones(3, 3))
    found = relax([data, cluster(2)], LennardJones())[0].structure
    assert found.info == {"name": "trimer"}
    assert found.atom_extras["tag"].tolist() == [1, 2, 3]
    assert torch.equal(found.velocities, data.velocities)
    assert found.system_extras == {}
    assert sorted(found.atom_extras) == ["tag"]


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_md_writes_its_files_and_resumes_bit_for_bit(ensemble, tmp_path):
    structures = [argon(1), argon(1, seed=2).copy()]
    settings = {"ensemble": ensemble, "temperature": [30.0, 60.0], "timestep": 2.0, "seed": 5, "log_interval": 5}
    whole = md(structures, LennardJones(), n_steps=30, log=tmp_path / "whole.csv", **settings)
    files = {"log": tmp_path / "a.csv", "trajectory": tmp_path / "a.h5", "checkpoint": tmp_path / "a.ckpt"}
    md(structures, LennardJones(), n_steps=12, **files, checkpoint_interval=5, **settings)
    parts = md(structures, LennardJones(), n_steps=30, **files, resume=True, **settings)
    assert parts.steps == whole.steps == 30
    for a, b in zip(whole.structures, parts.structures, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.velocities, b.velocities)
    assert [one.outcome for one in parts.systems] == ["step_budget"] * 2
    assert parts.systems[1].time == pytest.approx(60.0)
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert read_csv_log(parts.log)["step"].tolist() == [step for step in range(0, 31, 5) for _ in range(2)]
    assert read_trajectory(parts.trajectory).step.tolist() == [0, 10, 20, 30]
    again = md(structures, LennardJones(), n_steps=30, checkpoint=tmp_path / "a.ckpt", resume=True, **settings)
    assert torch.equal(again.structures[0].positions, parts.structures[0].positions)
    with pytest.raises(InputError, match=r"saved with timestep=2\.0"):
        md(structures, LennardJones(), n_steps=30, checkpoint=tmp_path / "a.ckpt", resume=True, **{**settings, "timestep": 1.0})
    with pytest.raises(InputError, match="holds other structures"):
        md([argon(1), cluster(2)], LennardJones(), n_steps=30, checkpoint=tmp_path / "a.ckpt", resume=True, **settings)


def test_md_starts_from_the_velocities_that_are_there():
    given = cluster(3).replace(velocities=torch.zeros(3, 3))
    result = md([given, cluster(3)], LennardJones(), "nve", temperature=100.0, n_steps=0)
    assert not result.structures[0].velocities.any()
    assert result.structures[1].velocities.abs().max() > 0
    assert result.systems[0].temperature == 0.0


def test_md_sets_aside_what_it_cannot_run(tmp_path):
    close = AtomicData([[0, 0, 0], [0, 0, 0.9]], [18, 18])
    structures = [BAD["atom 1 is Au"], cluster(3), close]
    result = md(
        structures,
        LennardJones(),
        temperature=[1.0, 2.0, 3.0],
        n_steps=5,
        errors="set_aside",
        trajectory=tmp_path / "a.extxyz",
        trajectory_interval=5,
    )
    assert [one.outcome for one in result.systems] == ["failed", "step_budget", "failed"]
    assert "atom 1 is Au" in result.systems[0].reason
    assert "exceeds the limit" in result.systems[2].reason
    assert [one.info["system_id"] for one in read_structures(tmp_path / "a.extxyz")] == [1, 1]
    with pytest.raises(InputError, match="structure 0: atom 1 is Au"):
        md(structures, LennardJones(), n_steps=5)
    assert md(structures[0], LennardJones(), n_steps=5, errors="set_aside").systems[0].outcome == "failed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble": "ntv"}, "perhaps you meant 'nvt'"),
        ({"n_steps": -1}, "n_steps must be"),
        ({"resume": True}, "resume=True needs checkpoint="),
        ({"temperature": [1.0, 2.0]}, "temperature has 2 values for 1 structures"),
        ({"timestep": 0.0}, "timestep must be positive"),
        ({"trajectory": "run.dcd"}, "a trajectory is written as one of"),
        ({"structures": []}, "no structures"),
        ({"thermostat": "langevine"}, "perhaps you meant 'langevin'"),
        ({"thermostat": "langevin", "ensemble": "nve"}, 'ensemble "nve" has no thermostat'),
        ({"barostat": "mtk"}, 'ensemble "nvt" has no barostat'),
        ({"ensemble": "nph", "barostat": "stochastic_cell_rescaling"}, 'takes barostat "mtk"'),
        ({"ensemble": "npt", "thermostat": "langevin"}, 'comes with thermostat "velocity_rescaling"'),
        ({"cell_mode": "cubic"}, "cell_mode must be one of isotropic, anisotropic, triclinic"),
        ({"max_atoms_per_batch": 0}, "max_atoms_per_batch must be a positive integer"),
        ({"ensemble": "npt", "pressure": [1.0, 2.0]}, "pressure has 2 values for 1 structures"),
    ],
)
def test_md_refuses_what_makes_no_sense(change, message):
    arguments = {"structures": cluster(3), "potential": LennardJones(), "n_steps": 1, **change}
    with pytest.raises(InputError, match=message):
        md(**arguments)


def test_many_structures_run_in_several_batches_and_resume(tmp_path):
    structures = [cluster(n, n) for n in (5, 3, 7, 4, 8, 2)]
    settings = {
        "temperature": [5.0, 10, 15, 20, 25, 30],
        "timestep": 2.0,
        "seed": 5,
        "log_interval": 5,
        "max_atoms_per_batch": 10,
    }
    whole = md(structures, LennardJones(), n_steps=20, **{**settings, "max_atoms_per_batch": None})
    files = {"log": tmp_path / "a.csv", "trajectory": tmp_path / "a.h5", "checkpoint": tmp_path / "a.ckpt"}
    stop = StopInBatch(1, 7)
    with pytest.raises(Stop):
        md(structures, LennardJones(), n_steps=20, checkpoint_interval=3, hooks=[stop], **files, **settings)
    parts = md(structures, LennardJones(), n_steps=20, resume=True, **files, **{**settings, "max_atoms_per_batch": None})
    assert [one.index for one in parts.systems] == list(range(6))
    for a, b in zip(whole.systems, parts.systems, strict=True):
        assert (a.steps, a.temperature, a.potential_energy) == (b.steps, b.temperature, b.potential_energy)
        assert torch.equal(a.structure.velocities, b.structure.velocities)
    assert [path.name for path in parts.logs] == ["a-0.csv", "a-1.csv", "a-2.csv"]
    ids = [sorted(set(read_csv_log(path)["system_id"].tolist())) for path in parts.logs]
    assert sorted(one for group in ids for one in group) == list(range(6))
    assert all(sum(structures[i].n_atoms for i in group) <= 10 for group in ids if len(group) > 1)
    assert all(read_csv_log(path)["step"].tolist() == sorted(read_csv_log(path)["step"].tolist()) for path in parts.logs)
    assert all(read_trajectory(path).step.tolist() == [0, 10, 20] for path in parts.trajectories)
    with pytest.raises(InputError, match="is of a run with max_atoms_per_batch=10, got 11"):
        md(structures, LennardJones(), n_steps=20, resume=True, **files, **{**settings, "max_atoms_per_batch": 11})


class Stop(Exception):
    """Stands for the end of the process."""


class StopInBatch:
    """Ends a run in the middle of a step of one of its batches."""

    stage = HookStageEnum.AFTER_COMPUTE
    frequency = 1

    def __init__(self, batch, step):
        self.batch, self.step, self.seen = batch, step, []

    def __call__(self, batch, dynamics):
        if dynamics not in self.seen:
            self.seen.append(dynamics)
        if (len(self.seen) - 1, dynamics.step_count) == (self.batch, self.step):
            raise Stop


ENSEMBLES = [
    {"ensemble": "nve"},
    {"thermostat": "nose_hoover", "tau": 50.0},
    {"thermostat": "velocity_rescaling", "tau": 50.0},
    {"ensemble": "npt", "pressure": [0.0, 0.05, 0.1], "compressibility": 0.3},
    {"ensemble": "npt", "barostat": "mtk", "cell_mode": "triclinic"},
    {"ensemble": "nph", "pressure": 0.05, "cell_mode": "anisotropic"},
    {"ensemble": "npt", "temperature": Ramp((0, 12), (20.0, [40.0, 60.0, 80.0])), "pressure": Ramp((0, 12), (0.0, 0.1))},
]


@pytest.mark.parametrize("conditions", ENSEMBLES, ids=lambda one: "-".join(map(str, one))[:40])
def test_every_ensemble_runs_and_resumes_bit_for_bit_in_any_batch(conditions, tmp_path):
    crystals = [argon(1, seed=seed, a=5.3 + 0.1 * seed) for seed in range(3)]
    settings = {"temperature": 40.0, "timestep": 2.0, "seed": 5, **conditions}
    whole = md(crystals, LennardJones(), n_steps=12, **settings)
    file = tmp_path / "a.ckpt"
    md(crystals, LennardJones(), n_steps=7, checkpoint=file, max_atoms_per_batch=4, **settings)
    parts = md(crystals, LennardJones(), n_steps=12, checkpoint=file, resume=True, **settings)
    assert len(parts.checkpoints) == 3
    for a, b in zip(whole.systems, parts.systems, strict=True):
        assert (a.outcome, a.reason, a.steps, b.steps) == ("step_budget", None, 12, 12)
        for name in ("positions", "velocities", "cell", "forces", "stress"):
            assert torch.equal(getattr(a.structure, name), getattr(b.structure, name)), name
        assert a.temperature == b.temperature
    moved = not torch.equal(whole.structures[0].cell, AtomicData.from_ase(crystals[0]).cell)
    assert moved == (settings.get("ensemble") in ("npt", "nph"))


@pytest.mark.parametrize("nothing", [[], iter(())])
def test_relax_asks_for_a_structure(nothing):
    with pytest.raises(InputError, match="no structures: give at least one"):
        relax(nothing, LennardJones())
