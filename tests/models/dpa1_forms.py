"""DPA-1 written out from its formulae, the references of the blocked code: on the pair axis, and padded slot by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from carryall.graph import NeighborGraph, center_edge_pairs, segment_softmax, segment_sum
from carryall.models import DPA1
from carryall.models.dpa1.environment import environment_rows, switch


def flat_energy(model: DPA1, graph: NeighborGraph, vectors: Tensor) -> Tensor:
    """Per-atom energies from the formulae, edge by edge and pair by pair; masked edges are dropped first."""
    config, descriptor = model.descriptor.config, model.descriptor
    n, kept = graph.n_local, graph.edge_mask
    center, types = graph.edge_center, graph.atom_types
    r = torch.where(kept[:, None], vectors, torch.tensor([config.rcut, 0.0, 0.0], dtype=torch.float64))
    distance = r.norm(dim=1, keepdim=True)
    u = ((distance - config.rcut_smth) / (config.rcut - config.rcut_smth)).clamp(0, 1)
    sw = torch.where(kept[:, None], u**3 * (-6 * u**2 + 15 * u - 10) + 1, 0.0)
    rows = torch.cat([sw / (distance + config.env_protection), sw * r / (distance + config.env_protection) ** 2], dim=1)
    rows = (rows - descriptor.davg[types[center]]) / descriptor.dstd[types[center]]
    table = descriptor.type_embedding()
    ends = torch.cat([table[types[graph.edge_neighbor]]] + ([] if config.type_one_side else [table[types[center]]]), dim=1)
    if descriptor.embedding_strip is None:
        g = descriptor.embedding(torch.cat([rows[:, :1], ends], dim=1))
    else:
        g = descriptor.embedding(rows[:, :1])
        g = g + g * descriptor.embedding_strip(ends) * (sw if config.smooth_type_embedding else 1)
    query_edge, key_edge, pair_mask = center_edge_pairs(graph)
    assert pair_mask.all()
    unit = rows[:, 1:] / rows[:, 1:].norm(dim=1, keepdim=True).clamp_min(1e-12)
    for layer in descriptor.attention:
        q, k, v = (layer.in_proj.w.T @ g.T).T.add(layer.in_proj.b).split(config.attn, dim=1)
        if config.normalize:
            q, k, v = (torch.nn.functional.normalize(x, dim=1) for x in (q, k, v))
        scale = (config.attn * config.scaling_factor) ** -0.5 if config.temperature is None else config.temperature
        logit = (q[query_edge] * k[key_edge]).sum(1) * scale
        both = sw[query_edge, 0] * sw[key_edge, 0]
        if config.smooth_type_embedding:
            logit = (logit + 20) * both - 20
        weight = segment_softmax(logit, query_edge, graph.n_edges)
        if config.smooth_type_embedding:
            weight = weight * both
        if config.attn_dotr:
            weight = weight * (unit[query_edge] * unit[key_edge]).sum(1)
        mixed = g + layer.out_proj(segment_sum(weight[:, None] * v[key_edge], query_edge, graph.n_edges))
        mean = mixed.mean(1, keepdim=True)
        variance = (mixed - mean).square().mean(1, keepdim=True)
        g = (mixed - mean) / (variance + config.ln_eps).sqrt() * layer.norm.w + layer.norm.b
    outer = segment_sum(g[:, :, None] * rows[:, None, :], center, n, kept)
    out = torch.einsum("nia,nja->nij", outer, outer[:, : config.axis_neuron])
    for degree in range(2, config.lmax + 1):
        # the moments of a degree meet only in this sum over pairs, a Legendre polynomial of the angle between them
        size = sw[:, 0] / (distance[:, 0] + config.env_protection) / descriptor.dstd[types[center], 0]
        length = (distance[:, 0] / (distance[:, 0] + config.env_protection)) ** degree
        cosine = (r[query_edge] * r[key_edge]).sum(1) / (distance[query_edge, 0] * distance[key_edge, 0])
        kernel = (size * length)[query_edge] * (size * length)[key_edge] * legendre(degree, cosine)
        product = g[query_edge, :, None] * g[key_edge, None, : config.axis_neuron] * kernel[:, None, None]
        gain = descriptor.get_parameter("degree_gain_raw")[degree - 2]
        out = out + gain**2 * segment_sum(product, center[query_edge], n)
    out = (out / sum(config.sel) ** 2).reshape(n, -1)
    if config.concat_output_tebd:
        out = torch.cat([out, table[types[:n]]], dim=1)
    return model.fitting.nets[0](out)[:, 0] + (model.out_bias + model.bias_atom_e)[types[:n]]


def legendre(degree: int, x: Tensor) -> Tensor:
    """P_l by Bonnet's recursion."""
    before, here = torch.ones_like(x), x
    for k in range(1, degree):
        before, here = here, ((2 * k + 1) * x * here - k * before) / (k + 1)
    return here


def padded_energy(model: DPA1, graph: NeighborGraph, vectors: Tensor) -> Tensor:
    """One system, centre by centre, each with sum(sel) rows that are really there; no gradient is lost on the way."""
    descriptor, config = model.descriptor, model.descriptor.config
    sel, types, table = sum(config.sel), graph.atom_types, model.descriptor.type_embedding()
    energies = []
    for center in range(graph.n_local):
        edges = torch.arange(int(graph.ptr[center]), int(graph.ptr[center + 1]))
        edges = edges[graph.edge_mask[edges]]
        edges = edges[vectors[edges].detach().norm(dim=1).argsort(stable=True)][:sel]
        real = torch.arange(sel) < len(edges)
        r = torch.cat([vectors[edges], torch.tensor([[config.rcut, 0.0, 0.0]]).double().expand(sel - len(edges), 3)])
        distance = r.norm(dim=1)
        sw = switch(distance, config.rcut_smth, config.rcut) * real
        kind = torch.cat([types[graph.edge_neighbor[edges]], types[0].expand(sel - len(edges))])
        rows = environment_rows(r, sw, distance, config.env_protection)
        rows = (rows - descriptor.davg[types[center]]) / descriptor.dstd[types[center]]
        ends = torch.cat([table[kind], *([] if config.type_one_side else [table[types[center]].expand(sel, -1)])], dim=1)
        if descriptor.embedding_strip is None:
            g = descriptor.embedding(torch.cat([rows[:, :1], ends], dim=1))
        else:
            by_type = descriptor.embedding_strip(ends) * (sw[:, None] if config.smooth_type_embedding else 1)
            g = descriptor.embedding(rows[:, :1]) * (1 + by_type)
        unit = rows[:, 1:] / rows[:, 1:].norm(dim=1, keepdim=True).clamp_min(1e-12)
        for layer in descriptor.attention:
            q, k, v = layer.in_proj(g).split(config.attn, dim=1)
            q, k, v = (torch.nn.functional.normalize(x, dim=1) for x in (q, k, v))
            logit = q @ k.T * config.attn**-0.5
            if config.smooth_type_embedding:
                weight = torch.softmax((logit + 20) * sw[:, None] * sw - 20, dim=1) * sw[:, None] * sw
            else:
                weight = torch.softmax(logit.masked_fill(~real, -torch.inf), dim=1)
            weight = torch.where(real[:, None], weight, 0.0) * (unit @ unit.T)
            g = layer.norm(g + layer.out_proj(weight @ v))
        moments = g.T @ rows / sel
        out = (moments @ moments[: config.axis_neuron].T).flatten()
        energies.append(torch.cat([out, table[types[center]]]))
    return model.fitting(torch.stack(energies), graph) + model.out_bias[types[: graph.n_local]]
