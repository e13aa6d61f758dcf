"""The functions that people call."""

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.optimize import FIRE as AseFIRE
from dynamics_samples import LennardJones, argon, batch_of, cluster

from carryall.data import AtomicData, read_structures
from carryall.dynamics import md, read_csv_log, read_trajectory, relax
from carryall.errors import InputError

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
    results = relax(
        structures, LennardJones(), fmax=0.002, max_atoms_per_batch=10, on_batch=lambda part: seen.append(len(part))
    )
    assert [one.index for one in results] == [0, 1, 2, 3]
    assert seen == [1, 2, 1]
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


def test_steps_and_results_do_not_depend_on_the_batch():
    structures = [cluster(n, n) for n in (3, 5, 7, 4, 6)]
    together = relax(structures, LennardJones(), fmax=0.001)
    alone = [relax(one, LennardJones(), fmax=0.001)[0] for one in structures]
    assert [one.steps for one in together] == [one.steps for one in alone]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.structure.positions, b.structure.positions, atol=1e-10, rtol=0)


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
    assert relax([], LennardJones()) == []
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
        ({"trajectory": "run.traj"}, "a trajectory is written as one of"),
        ({"structures": []}, "no structures"),
    ],
)
def test_md_refuses_what_makes_no_sense(change, message):
    arguments = {"structures": cluster(3), "potential": LennardJones(), "n_steps": 1, **change}
    with pytest.raises(InputError, match=message):
        md(**arguments)
