"""The energy fitting net: descriptors, and what else a structure brings along, to energies of atoms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.graph.neighbor_graph import NeighborGraph, local_index, local_types
from carryall.models.dpa1.config import FittingConfig
from carryall.models.networks import fitting_net

STATISTICS = ("fparam_avg", "fparam_inv_std", "aparam_avg", "aparam_inv_std", "case_embd")


class EnergyFitting(nn.Module):
    """E = net(descriptor, fparam, aparam, case_embd) + bias_atom_e of the type, for one net or one for each type.

    fparam and aparam enter as (value - avg) * inv_std. With `atom_ener`, net(0, fparam, ...) is subtracted: from every type
    when types share the net, otherwise from those whose energy in vacuum is given.
    """

    bias_atom_e: Tensor
    fparam_avg: Tensor | None
    fparam_inv_std: Tensor | None
    aparam_avg: Tensor | None
    aparam_inv_std: Tensor | None
    case_embd: Tensor | None
    default_fparam: Tensor | None

    def __init__(self, config: FittingConfig, n_types: int, dim_descrpt: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.atom_ener is not None and len(config.atom_ener) != n_types:
            raise InputError(f"atom_ener has {len(config.atom_ener)} values for {n_types} types: give one, or None, for each")
        self.config, self.dim_descrpt = config, dim_descrpt
        n_in = dim_descrpt + config.numb_fparam + config.aparam_inputs + config.dim_case_embd
        self.nets = nn.ModuleList(
            fitting_net(
                n_in,
                config.neuron,
                activation_function=config.activation_function,
                resnet_dt=config.resnet_dt,
                generator=generator,
            )
            for _ in range(1 if config.mixed_types else n_types)
        )
        for net in self.nets:
            for layer, flag in zip(net.children(), config.layers_trainable, strict=True):
                layer.requires_grad_(flag)
        given = [energy is not None for energy in config.atom_ener or ()]
        self.vacuum = tuple(any(given) if config.mixed_types else one for one in given) if any(given) else (False,) * n_types
        self.register_buffer("bias_atom_e", torch.zeros(n_types, dtype=torch.float64))
        for name, width in zip(("fparam", "aparam"), (config.numb_fparam, config.numb_aparam), strict=True):
            self.register_buffer(f"{name}_avg", torch.zeros(width, dtype=torch.float64) if width else None)
            self.register_buffer(f"{name}_inv_std", torch.ones(width, dtype=torch.float64) if width else None)
        case = config.dim_case_embd
        self.register_buffer("case_embd", torch.zeros(case, dtype=torch.float64) if case else None)
        default = None if config.default_fparam is None else torch.tensor(config.default_fparam, dtype=torch.float64)
        self.register_buffer("default_fparam", default, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, descriptor: Tensor, graph: NeighborGraph) -> Tensor:
        """(n_local,) float64 energies, eV, of descriptors (n_local, dim_descrpt) in any floating-point dtype."""
        types = local_types(graph)
        extra = self._extra_columns(graph)
        energy = self._of_types(torch.cat([descriptor.to(self.dtype), *extra], dim=-1), types)
        if any(self.vacuum):
            nothing = torch.cat([torch.zeros_like(descriptor, dtype=self.dtype), *extra], dim=-1)
            energy = energy - self._of_types(nothing, types, self.vacuum)
        return energy.to(torch.float64) + self.bias_atom_e.index_select(0, types)

    def _of_types(self, inputs: Tensor, types: Tensor, which: tuple[bool, ...] | None = None) -> Tensor:
        """(n_local,) output of each atom's net; 0 for types that `which` leaves out."""
        if self.config.mixed_types:
            return self.nets[0](inputs).squeeze(-1)
        total = inputs.new_zeros(inputs.shape[0])
        for kind, net in enumerate(self.nets):
            if which is None or which[kind]:
                total = torch.where(types == kind, net(inputs).squeeze(-1), total)
        return total

    def _extra_columns(self, graph: NeighborGraph) -> list[Tensor]:
        """What the net takes beside the descriptor, each (n_local, width)."""
        config, columns = self.config, []
        if config.numb_fparam:
            assert self.fparam_avg is not None
            assert self.fparam_inv_std is not None
            default = None if self.default_fparam is None else self.default_fparam.expand(graph.cell.shape[0], -1)
            values = checked("fparam", graph.fparam if graph.fparam is not None else default, config.numb_fparam)
            scaled = (values - self.fparam_avg) * self.fparam_inv_std
            columns.append(scaled.index_select(0, graph.system.index_select(0, local_index(graph))))
        if config.aparam_inputs:
            assert self.aparam_avg is not None
            assert self.aparam_inv_std is not None
            values = checked("aparam", graph.aparam, config.numb_aparam)
            columns.append((values.index_select(0, local_index(graph)) - self.aparam_avg) * self.aparam_inv_std)
        if self.case_embd is not None:
            columns.append(self.case_embd.expand(local_index(graph).shape[0], -1))
        return [column.to(self.dtype) for column in columns]


def checked(name: str, values: Tensor | None, width: int) -> Tensor:
    """`values`; InputError where they are missing or of another width."""
    needed = f"{width} value{'s' if width > 1 else ''} for each {'structure' if name == 'fparam' else 'atom'}"
    if values is None:
        raise InputError(f"this potential needs {name}, {needed}: the graph has none")
    if values.shape[1] != width:
        raise InputError(f"this potential needs {name}, {needed}, got {values.shape[1]}")
    return values
