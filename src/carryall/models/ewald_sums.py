"""Ewald sums for charges of any origin, as energies of atoms: all that electrostatics needs, whoever gives the charges.

    E_i = 1/2 q_i phi_i = f q_i [ 1/2 sum_j q_j erfc(g r_ij) / r_ij                                      over neighbours
                                + 1/2 4 pi / V sum_k exp(-k^2 / 4 g^2) / k^2 Re(exp(-i k r_i) S(k))      over k != 0
                                - g q_i / sqrt(pi)  -  pi Q / (2 V g^2) ],       S(k) = sum_j q_j exp(i k r_j),  Q = sum_j q_j

P. P. Ewald, Ann. Phys. 369, 253 (1921); the last term is the uniform background of a charged cell. f = 14.39964 eV Å / e^2.
Surroundings conduct at infinity ("tinfoil"). Both sums end smoothly, so that energies have no step where a neighbour or a k
vector enters: the first by a switch over the last tenth of the cutoff, the second by one over the last twentieth of its radius.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from carryall.data.units import Bohr, Hartree
from carryall.errors import InputError
from carryall.exchange import all_reduce
from carryall.graph.edge_terms import with_virial
from carryall.graph.neighbor_graph import NeighborGraph, local_index
from carryall.graph.reciprocal import with_reciprocal
from carryall.graph.segments import segment_sum
from carryall.models.pair import smooth_cutoff

COULOMB = Hartree * Bohr
"""1 / (4 pi epsilon_0), eV Å / e^2."""
SWITCH_START, K_SWITCH_START = 0.9, 0.95
CHUNK = 1 << 22
"""Atoms times k vectors, of which phases are kept at once where a model is not traced."""
# columns of energy xx yy zz yz xz xy that make a matrix
VOIGT = (1, 6, 5, 6, 2, 4, 5, 4, 3)


@dataclass(frozen=True)
class EwaldSettings:
    """How the sum is divided: `splitting` g (1/Å), neighbours up to `cutoff` (Å), k vectors up to `k_cutoff` (1/Å)."""

    cutoff: float
    splitting: float
    k_cutoff: float


def ewald_settings(cutoff: float, accuracy: float) -> EwaldSettings:
    """Settings by which erfc(g r) and exp(-k^2 / 4 g^2) are `accuracy` where the switches of the two sums begin.

    A longer cutoff costs more neighbours and saves k vectors, whose number goes as volume / cutoff^3.
    """
    if not 0 < cutoff < math.inf:
        raise InputError(f"cutoff must be positive (Å), got {cutoff}")
    if not 1e-14 <= accuracy <= 0.1:
        raise InputError(f"accuracy is relative, from 1e-14 to 0.1, got {accuracy}")
    low, high = 0.0, 8.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if math.erfc(middle) > accuracy else (low, middle)
    splitting = high / (SWITCH_START * cutoff)
    return EwaldSettings(float(cutoff), splitting, 2 * splitting * math.sqrt(-math.log(accuracy)) / K_SWITCH_START)


def ewald_energy(graph: NeighborGraph, edge_vec: Tensor, charges: Tensor, settings: EwaldSettings) -> Tensor:
    """(n_local,) energies, eV, of `charges` (n_atoms,), e, those of ghosts too; edge_vec (n_edges, 3) Å.

    Differentiable in charges, edge vectors and graph.positions, to any order; for a model whose spec says `long_range`,
    `message_passing` and `k_cutoff`. InputError for a system that is not periodic along all three axes.
    """
    return short_range(graph, edge_vec, charges, settings) + far_range(graph, charges, settings)


def short_range(graph: NeighborGraph, edge_vec: Tensor, charges: Tensor, settings: EwaldSettings) -> Tensor:
    """(n_local,) energies, eV, of charges with those of their neighbours, each screened by a Gaussian."""
    inside = torch.where(graph.edge_mask, edge_vec.square().sum(1), settings.cutoff**2)
    distance = inside.sqrt()
    screened = torch.special.erfc(settings.splitting * distance) / distance
    kernel = screened * smooth_cutoff(distance, SWITCH_START * settings.cutoff, settings.cutoff)
    pair = charges.index_select(0, graph.edge_center) * charges.index_select(0, graph.edge_neighbor) * kernel
    return 0.5 * COULOMB * segment_sum(pair, graph.edge_center, graph.n_local, graph.edge_mask)


def far_range(graph: NeighborGraph, charges: Tensor, settings: EwaldSettings) -> Tensor:
    """(n_local,) energies, eV, of the Gaussians: over k vectors, less their own, with the background of a charged cell.

    The virial of an atom is the strain derivative of its own energy at fixed charges, as in LAMMPS: of each k its energy times
    1 - 2 (1 / k^2 + 1 / 4 g^2) k k^T (and the switch's share), and of the background its energy times 1. Phases k r do not
    change with strain.
    """
    if graph.k_index is None or graph.place is None or graph.places is None:
        graph = with_reciprocal(graph, settings.k_cutoff)
    assert graph.place is not None
    assert graph.places is not None
    local, n_systems, width = local_index(graph), graph.cell.shape[0], graph.places.shape[0]
    q, system = charges.index_select(0, local), graph.system.index_select(0, local)
    inverse, volume = inverse_and_volume(graph.cell.detach().to(q.dtype))
    # atoms of a system side by side, so that sums over them are matrix products; an empty slot has no charge
    slot = system * width + graph.place
    rows = torch.cat([graph.positions.index_select(0, local).to(q.dtype), q.unsqueeze(1)], 1)
    laid_out = rows.new_zeros(n_systems * width, 4).index_copy(0, slot, rows).reshape(n_systems, width, 4)
    fractional = torch.bmm(laid_out.narrow(2, 0, 3), inverse)
    fractional = fractional - fractional.detach().round()  # far from the origin phases would lose digits
    charge = laid_out.narrow(2, 3, 1)
    potential, total = reciprocal_sums(graph, fractional, charge, k_weights(graph, inverse, volume, settings))
    energy_and_virial = (charge * potential).reshape(n_systems * width, 7).index_select(0, slot)
    background = -0.5 * COULOMB * math.pi / settings.splitting**2 * (total / volume).index_select(0, system) * q
    self_energy = -COULOMB * settings.splitting / math.sqrt(math.pi) * q.square()
    energy = energy_and_virial.select(1, 0) + background
    if graph.strain is None:
        return energy + self_energy
    change = energy_and_virial.index_select(1, constant(VOIGT, q)).reshape(q.shape[0], 3, 3)
    virial = change + energy.reshape(q.shape[0], 1, 1) * torch.eye(3, dtype=q.dtype, device=q.device)
    return with_virial(energy + self_energy, virial, graph)


def constant(values: Sequence[int], like: Tensor) -> Tensor:
    """Indices where `like` is."""
    return torch.tensor(values, device=like.device)


def inverse_and_volume(cell: Tensor) -> tuple[Tensor, Tensor]:
    """(n_systems, 3, 3) inverses and (n_systems,) volumes of cells (n_systems, 3, 3); finite for one without volume, too."""
    second, third = cell.index_select(1, constant((1, 2, 0), cell)), cell.index_select(1, constant((2, 0, 1), cell))
    products = torch.linalg.cross(second, third)
    signed = (cell * products).sum(2).select(1, 0)
    signed = torch.where(signed == 0, 1.0, signed)
    return products.transpose(1, 2) / signed.reshape(cell.shape[0], 1, 1), signed.abs()


def k_weights(graph: NeighborGraph, inverse: Tensor, volume: Tensor, settings: EwaldSettings) -> Tensor:
    """(n_systems, n_k, 7): what turns S(k) into potentials, eV / e^2, then xx yy zz yz xz xy of what multiplies k k^T, with it.

    Each k stands for -k, too. Those beyond the cutoff have the weight 0.
    """
    assert graph.k_index is not None
    k = 2 * math.pi * torch.matmul(graph.k_index.to(inverse.dtype), inverse.transpose(1, 2))
    squared = k.square().sum(2)
    real = squared > 0
    squared = torch.where(real, squared, 1.0)
    length = squared.sqrt()
    start, end = K_SWITCH_START * settings.k_cutoff, settings.k_cutoff
    u = ((length - start) / (end - start)).clamp(0.0, 1.0)
    switch = smooth_cutoff(length, start, end) * real
    slope = -30 / (end - start) * (u * (1 - u)).square()  # of the switch
    decay = 1 / (4 * settings.splitting**2)
    weight = torch.exp(-decay * squared) / squared * (4 * math.pi * COULOMB / volume).unsqueeze(1)
    # derivative of weight * switch in k^2, times 2; k k^T is 0 where k is
    twice = weight * (slope / length - 2 * (1 / squared + decay) * switch)
    outer = k.index_select(2, constant((0, 1, 2, 1, 0, 0), k)) * k.index_select(2, constant((0, 1, 2, 2, 2, 1), k))
    return torch.cat([(weight * switch).unsqueeze(2), twice.unsqueeze(2) * outer], 2)


def reciprocal_sums(graph: NeighborGraph, x: Tensor, charge: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(n_systems, width, 7) sums over k of Re(exp(-i k r) S(k)) `weights` (n_systems, n_k, 7), and charges Q (n_systems,).

    Fractional coordinates x (n_systems, width, 3) and charge (n_systems, width, 1) of local atoms; S(k) and Q are of all ranks,
    which is the one exchange.
    """
    assert graph.k_index is not None
    n_systems, width, n_k = x.shape[0], x.shape[1], graph.k_index.shape[0]
    triples, row = graph.k_index.to(x.dtype), charge.transpose(1, 2)
    parts = list(chunks(n_systems * width, n_k))
    factors = [in_little_memory(structure_factors, len(parts), x, part(triples, k, 0), row) for k in parts]
    # Q goes along, so that there is one exchange
    own = torch.cat([charge.sum(1, keepdim=True).expand(n_systems, 2, 1), *factors], 2)
    total = all_reduce(own, graph)
    sums = total.narrow(2, 1, n_k).unsqueeze(3) * weights.unsqueeze(1)
    cosine, sine = sums.select(1, 0), sums.select(1, 1)
    potential = [
        in_little_memory(potentials, len(parts), x, part(triples, k, 0), part(cosine, k, 1), part(sine, k, 1)) for k in parts
    ]
    return torch.stack(potential).sum(0) if len(parts) > 1 else potential[0], total.select(2, 0).select(1, 0)


def part(values: Tensor, rows: tuple[int, int] | None, axis: int) -> Tensor:
    """Rows begin:end of an axis, or all."""
    return values if rows is None else values.narrow(axis, rows[0], rows[1] - rows[0])


def chunks(n_rows: int, n_k: int) -> Iterator[tuple[int, int] | None]:
    """Ranges of k vectors, each with at most CHUNK phases; None: all, as always where sizes are traced."""
    size = max(1, CHUNK // max(1, n_rows)) if type(n_rows) is int and type(n_k) is int else None
    if size is None or size >= n_k:
        yield None
    else:
        yield from ((begin, min(begin + size, n_k)) for begin in range(0, n_k, size))


def in_little_memory(function: Callable[..., Tensor], n_parts: int, *arguments: Tensor) -> Tensor:
    """`function` of the arguments; where there are several parts, computed again for derivatives instead of kept."""
    if n_parts == 1:
        return function(*arguments)
    found: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return found


def phases(x: Tensor, triples: Tensor) -> Tensor:
    """(n_systems, width, n_k) of fractional coordinates x (n_systems, width, 3) and triples (n_k, 3)."""
    return 2 * math.pi * torch.matmul(x, triples.T)


def structure_factors(x: Tensor, triples: Tensor, q: Tensor) -> Tensor:
    """(n_systems, 2, n_k) real and imaginary parts of S(k), of charges q (n_systems, 1, width)."""
    angle = phases(x, triples)
    return torch.cat([torch.bmm(q, angle.cos()), torch.bmm(q, angle.sin())], 1)


def potentials(x: Tensor, triples: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(n_systems, width, 7) sums over k of cos(k r) `cosine` + sin(k r) `sine`, both (n_systems, n_k, 7)."""
    angle = phases(x, triples)
    return torch.bmm(angle.cos(), cosine) + torch.bmm(angle.sin(), sine)
