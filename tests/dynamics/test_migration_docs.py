"""The code of docs/migration.md runs as it stands, and the names that it gives for here are there."""

import re
from pathlib import Path

import carryall
from carryall.data import AtomicData, Batch
from carryall.dynamics import BaseDynamics, FusedStage, constraints, hooks, integrators, optimizers, samplers, sinks
from carryall.dynamics.hooks import ase

TEXT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
ROOMS = (carryall, carryall.dynamics, integrators, optimizers, hooks, ase, constraints, samplers, sinks)
NAMES = (
    "HookStageEnum ConvergenceHook FusedStage SizeAwareSampler Ramp relax md evaluate load size_bins",
    "FIRE LBFGS GradientDescent NVE NVTLangevin NVTNoseHoover NVTVelocityRescaling NPT NPH NPTStochasticCellRescaling",
    "MemorySink HDF5Sink DataSink read_hdf5 FixAtoms FixCenterOfMass FixSymmetry FreezeAtoms StageTiming Profiler",
    "CSVLog LogTable ProgressBar HDF5Trajectory ExtXYZTrajectory ASETrajectory read_trajectory Checkpoint save_checkpoint",
    "load_checkpoint MaxForceClamp ForceGuard EnergyDriftMonitor WrapPositions AlignCell BiasPotential",
)
OF_BATCH = (
    "n_systems n_atoms n_edges system ptr set get joined index_select append put zero empty trim atom_counts to_data_list"
)


def test_the_names_are_there():
    for name in " ".join(NAMES).split():
        assert name in TEXT, name
        assert any(hasattr(room, name) for room in ROOMS), name
    for name in ("from_ase", "masses"):
        assert hasattr(AtomicData, name) or name in AtomicData.__annotations__
    for name in OF_BATCH.split():
        assert hasattr(Batch, name), name
    for name in ("conserved_energy", "state_defaults", "step", "register_hook"):
        assert hasattr(BaseDynamics, name), name
    assert hasattr(FusedStage, "register_fused_hook")


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, "migration.md", "exec"), names)
    assert names["results"].n_systems == 6
    assert capsys.readouterr().out.count("CONVERGED") == 6
    assert [one.outcome for one in names["relaxed"]] == ["converged"] * 6
