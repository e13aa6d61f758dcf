"""DPA-1 to DeePMD's nested dict, with the fields of deepmd-kit 3: `Model` 2, `Descriptor` 2 (4 with `lmax`), `Fitting` 4."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from carryall.models.dpa1.attention import GatedAttentionLayer
from carryall.models.dpa1.config import DescriptorConfig
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.dpa1.fitting import STATISTICS
from carryall.models.dpa1.model import DPA1
from carryall.models.networks import Layer

Source = dict[str, Any]
FIXED_BY_V2 = ("tebd_input_mode", "smooth_type_embedding")


def to_source(model: DPA1) -> Source:
    """The model's nested dict; arrays are numpy arrays in the precision of their part (biases float64)."""
    n_types = len(model.type_map)
    source = {
        "@class": "Model",
        "type": "standard",
        "@version": 2,
        "type_map": list(model.type_map),
        "atom_exclude_types": list(model.atom_exclude_types),
        "pair_exclude_types": [list(pair) for pair in model.pair_exclude_types],
        "rcond": None,
        "preset_out_bias": None,
        "@variables": {"out_bias": array(model.out_bias).reshape(1, n_types, 1), "out_std": np.ones((1, n_types, 1))},
        "descriptor": _descriptor(model.descriptor, model.type_map),
        "fitting": _fitting(model),
    }
    if model.neighbor_graph_method != "graph":
        source["neighbor_graph_method"] = model.neighbor_graph_method
    return source


def array(value: Tensor, precision: str = "float64") -> np.ndarray:
    """A copy of `value` in `precision`."""
    return value.detach().cpu().numpy().astype(precision)


def _descriptor(descriptor: Descriptor, type_map: tuple[str, ...]) -> Source:
    config: DescriptorConfig = descriptor.config
    n_types, nnei, precision = len(type_map), sum(config.sel), config.precision
    rows = {name: array(descriptor.get_buffer(name), precision) for name in ("davg", "dstd")}
    source: Source = {
        "@class": "Descriptor",
        "@version": 2,
        "ntypes": n_types,
        "attn_mask": False,
        "type_map": list(type_map),
        "spin": None,
        **{name: getattr(config, name) for name in DescriptorConfig.model_fields if name != "lmax"},
        "sel": list(config.sel),
        "neuron": list(config.neuron),
        "exclude_types": [list(pair) for pair in config.exclude_types],
        "embeddings": _collection([_embedding(descriptor.embedding, config)], "embedding_network", n_types),
        "attention_layers": _attention(descriptor, config),
        "env_mat": {
            "rcut": config.rcut,
            "rcut_smth": config.rcut_smth,
            "protection": config.env_protection,
            "use_exp_switch": False,
        },
        "type_embedding": _type_embedding(descriptor, config, type_map),
        "@variables": {name: np.repeat(value[:, None, :], nnei, axis=1) for name, value in rows.items()},
    }
    if descriptor.embedding_strip is not None:
        network = _embedding(descriptor.embedding_strip, config)
        source["embeddings_strip"] = _collection([network], "embedding_network", n_types)
    if config.type == "se_atten_v2":
        source = {name: value for name, value in source.items() if name not in FIXED_BY_V2}
    if config.lmax > 1:
        source |= {"@version": 4, "lmax": config.lmax}
        source["@variables"]["degree_gain_raw"] = array(descriptor.get_parameter("degree_gain_raw"), precision)
    return source


def _attention(descriptor: Descriptor, config: DescriptorConfig) -> Source:
    shared = {"nnei": sum(config.sel), **attention_facts(config), "precision": config.precision}
    norm = {"trainable_ln": config.trainable_ln, "ln_eps": config.ln_eps}
    layers = []
    for layer in descriptor.attention:
        assert isinstance(layer, GatedAttentionLayer)
        inner: Source = {"num_heads": 1, "bias": True, "smooth": config.smooth_type_embedding}
        inner |= {name: _layer(getattr(layer, name), config.precision, config.trainable) for name in ("in_proj", "out_proj")}
        variables = {name: array(getattr(layer.norm, name), config.precision) for name in ("w", "b")}
        layer_norm = {"@class": "LayerNorm", "@version": 1, "eps": config.ln_eps, "trainable": config.trainable_ln}
        layer_norm |= {"precision": config.precision, "@variables": variables}
        layers.append({**shared, **norm, "attention_layer": {**shared, **inner}, "attn_layer_norm": layer_norm})
    head = {"@class": "NeighborGatedAttention", "@version": 1, "layer_num": config.attn_layer}
    return {**head, **shared, **norm, "attention_layers": layers}


def attention_facts(config: DescriptorConfig) -> Source:
    """What DeePMD repeats of the configuration in each attention layer, under its names."""
    return {
        "embed_dim": config.neuron[-1],
        "hidden_dim": config.attn,
        "dotr": config.attn_dotr,
        "do_mask": False,
        "scaling_factor": config.scaling_factor,
        "normalize": config.normalize,
        "temperature": config.temperature,
    }


def _type_embedding(descriptor: Descriptor, config: DescriptorConfig, type_map: tuple[str, ...]) -> Source:
    layer, precision = descriptor.type_embedding.layer, config.precision
    shared = {"neuron": [config.tebd_dim], "resnet_dt": False, "precision": precision, "activation_function": "Linear"}
    return {
        "@class": "TypeEmbedNet",
        "@version": 2,
        "ntypes": len(type_map),
        **shared,
        "trainable": config.trainable,
        "padding": True,
        "use_econf_tebd": config.use_econf_tebd,
        "use_tebd_bias": config.use_tebd_bias,
        "type_map": list(type_map),
        "embedding": {
            "@class": "EmbeddingNetwork",
            "@version": 2,
            "in_dim": layer.w.shape[0],
            "bias": config.use_tebd_bias,
            **shared,
            "layers": [_layer(layer, precision, config.trainable, activation_function="Linear")],
        },
    }


def _fitting(model: DPA1) -> Source:
    fitting, config, n_types = model.fitting, model.fitting.config, len(model.type_map)
    shared = {
        "neuron": list(config.neuron),
        "activation_function": config.activation_function,
        "resnet_dt": config.resnet_dt,
        "precision": config.precision,
    }
    networks = []
    for net in fitting.nets:
        described = zip(net.children(), config.layers_trainable, strict=True)
        layers = [_layer(layer, config.precision, trainable) for layer, trainable in described]
        head = {"@class": "FittingNetwork", "@version": 1, "in_dim": layers[0]["@variables"]["w"].shape[0], "out_dim": 1}
        networks.append({**head, **shared, "bias_out": True, "layers": layers})
    values = {name: getattr(fitting, name) for name in STATISTICS}
    variables = {name: None if value is None else array(value, config.precision) for name, value in values.items()}
    return {
        "@class": "Fitting",
        "type": "ener",
        "@version": 4,
        "var_name": "energy",
        "ntypes": n_types,
        "dim_descrpt": fitting.dim_descrpt,
        **shared,
        "numb_fparam": config.numb_fparam,
        "numb_aparam": config.numb_aparam,
        "dim_case_embd": config.dim_case_embd,
        "default_fparam": _listed(config.default_fparam),
        "rcond": config.rcond,
        "mixed_types": config.mixed_types,
        "exclude_types": list(config.exclude_types),
        "nets": _collection(networks, "fitting_network", n_types, ndim=0 if config.mixed_types else 1),
        "@variables": {"bias_atom_e": array(fitting.bias_atom_e).reshape(n_types, 1), **variables},
        "type_map": list(model.type_map),
        "tot_ener_zero": False,
        "trainable": list(config.layers_trainable),
        "layer_name": None,
        "use_aparam_as_mask": config.use_aparam_as_mask,
        "spin": None,
        "dim_out": 1,
        "atom_ener": _listed(config.atom_ener),
    }


def _listed(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _collection(networks: list[Source], network_type: str, n_types: int, ndim: int = 0) -> Source:
    head = {"@class": "NetworkCollection", "@version": 1, "ndim": ndim, "ntypes": n_types}
    return {**head, "network_type": network_type, "networks": networks}


def _embedding(layers: nn.Sequential, config: DescriptorConfig) -> Source:
    described = [_layer(layer, config.precision, config.trainable) for layer in layers]
    return {
        "@class": "EmbeddingNetwork",
        "@version": 2,
        "in_dim": described[0]["@variables"]["w"].shape[0],
        "neuron": list(config.neuron),
        "activation_function": config.activation_function,
        "resnet_dt": config.resnet_dt,
        "bias": True,
        "precision": config.precision,
        "layers": described,
    }


def _layer(layer: nn.Module, precision: str, trainable: bool, activation_function: str | None = None) -> Source:
    assert isinstance(layer, Layer)
    values = {name: getattr(layer, name) for name in ("w", "b", "idt")}
    return {
        "@class": "Layer",
        "@version": 2,
        "bias": layer.b is not None,
        "use_timestep": layer.idt is not None,
        "activation_function": activation_function or layer.activation_function,
        "resnet": layer.resnet,
        "precision": precision,
        "trainable": trainable,
        "@variables": {name: None if value is None else array(value, precision) for name, value in values.items()},
    }
