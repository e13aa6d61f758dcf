"""A pair potential of one's own: write the energy, and evaluate, relax and run it like any other."""

import torch
from torch import Tensor, nn

import carryall
from carryall.data import AtomicData
from carryall.graph import NeighborGraph, PotentialSpec, segment_sum
from carryall.models import EagerPotential


class Morse(nn.Module):
    """E = sum over pairs of D ((1 - exp(-a (r - r0)))^2 - 1), times a switch to zero at the cutoff."""

    def __init__(self, depth: float, width: float, r0: float, cutoff: float) -> None:
        super().__init__()
        self.depth, self.width, self.r0, self.cutoff = depth, width, r0, cutoff

    @property
    def spec(self) -> PotentialSpec:
        return PotentialSpec(cutoff=self.cutoff, type_map=("Cu",))

    def forward(self, graph: NeighborGraph, edge_vec: Tensor) -> Tensor:
        r = edge_vec.norm(dim=1)
        well = self.depth * ((1 - torch.exp(-self.width * (r - self.r0))) ** 2 - 1)
        x = (r / self.cutoff).clamp_max(1.0)
        switch = 1 - x**3 * (6 * x**2 - 15 * x + 10)
        # each pair has two edges: half of its energy belongs to each
        return segment_sum(0.5 * well * switch, graph.edge_center, graph.n_local, graph.edge_mask)


potential = EagerPotential(Morse(depth=0.3429, width=1.3588, r0=2.866, cutoff=7.0))

a = 3.7
fcc = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], dtype=torch.float64) * a
copper = AtomicData(
    positions=fcc + 0.05 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    atomic_numbers=[29] * 4,
    cell=torch.eye(3) * a,
)

out = carryall.evaluate(potential, copper, properties=("energy", "forces", "stress"))[0]
print(f"energy {float(out['energy']):.4f} eV, largest force {abs(out['forces']).max():.3f} eV/Å")

relaxed = carryall.relax([copper], potential, fmax=0.001)[0]
print(f"{relaxed.outcome} after {relaxed.steps} steps: {relaxed.energy:.4f} eV")
