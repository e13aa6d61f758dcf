"""Eight boxes of argon at eight temperatures, in one batch, with a hook of one's own."""

import torch

from carryall import load
from carryall.data import AtomicData, Batch
from carryall.dynamics import HookStageEnum, NVTLangevin, initialize_velocities


class HottestAtom:
    """Remembers the largest speed that any atom of the batch ever had."""

    stage = HookStageEnum.AFTER_STEP
    frequency = 5

    def __init__(self) -> None:
        self.speed = 0.0

    def __call__(self, batch: Batch, dynamics: NVTLangevin) -> None:
        self.speed = max(self.speed, float(batch.velocities.norm(dim=1).max()))


a = 5.26
cubic = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
shifts = torch.cartesian_prod(*[torch.arange(2, dtype=torch.float64)] * 3)
positions = (shifts[:, None] + cubic).reshape(-1, 3) * a
argon = AtomicData(positions=positions, atomic_numbers=[18] * len(positions), cell=torch.eye(3, dtype=torch.float64) * 2 * a)

temperatures = torch.linspace(20, 90, 8, dtype=torch.float64)
batch = Batch.from_data_list([argon] * len(temperatures))
initialize_velocities(batch, temperature=temperatures, seed=1)
hottest = HottestAtom()
dynamics = NVTLangevin(load("lj-argon"), timestep=5.0, temperature=temperatures, friction=1.0, seed=1, hooks=[hottest])
dynamics.run(batch, n_steps=50)
print(f"{batch.n_systems} systems, {batch.n_atoms} atoms, energies (eV): {[round(e, 3) for e in batch.energy.tolist()]}")
print(f"largest speed seen: {hottest.speed:.3f} Å per ASE time unit")
