"""DPA-1 as a nested dict in DeePMD's own form (its `Model` dict of type `standard`), both ways.

The fields are those of deepmd-kit 3: `Model` version 2, `Descriptor` `dpa1` version 2, `Fitting` `ener` version 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.models.dpa1.attention import GatedAttentionLayer
from carryall.models.dpa1.config import DescriptorConfig, FittingConfig
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.dpa1.model import DPA1
from carryall.models.networks import Layer

Source = dict[str, Any]


def to_source(model: DPA1) -> Source:
    """The model's nested dict; arrays are numpy arrays in the dtype of the weights (biases float64)."""
    config, n_types = model.descriptor.config, len(model.type_map)
    precision = model.spec.dtype
    return {
        "@class": "Model",
        "type": "standard",
        "@version": 2,
        "type_map": list(model.type_map),
        "atom_exclude_types": list(model.atom_exclude_types),
        "pair_exclude_types": [list(pair) for pair in model.pair_exclude_types],
        "rcond": None,
        "preset_out_bias": None,
        "@variables": {"out_bias": _array(model.out_bias).reshape(1, n_types, 1), "out_std": np.ones((1, n_types, 1))},
        "descriptor": _descriptor_source(model.descriptor, config, model.type_map, precision),
        "fitting": _fitting_source(model, precision),
    }


def from_source(source: Source) -> DPA1:
    """The model of a nested dict; InputError names what carryall does not know in it."""
    descriptor, fitting = source["descriptor"], source["fitting"]
    if descriptor.get("type") not in ("dpa1", "se_atten") or fitting.get("type", "ener") != "ener":
        found = f"descriptor {descriptor.get('type')!r} and fitting {fitting.get('type')!r}"
        raise InputError(f"cannot read a model of {found}: only dpa1 with ener")
    _refuse_unknown(descriptor, fitting)
    config = DescriptorConfig(**_config_values(descriptor))
    model = DPA1(
        source["type_map"],
        config,
        FittingConfig(
            neuron=tuple(fitting["neuron"]),
            resnet_dt=bool(fitting["resnet_dt"]),
            activation_function=str(fitting["activation_function"]),
        ),
        pair_exclude_types=[(a, b) for a, b in source.get("pair_exclude_types", [])],
        atom_exclude_types=sorted({*source.get("atom_exclude_types", []), *fitting.get("exclude_types", [])}),
    )
    with torch.no_grad():
        _load_descriptor(model.descriptor, descriptor)
        _load_layers(model.fitting, fitting["nets"]["networks"][0]["layers"])
        model.bias_atom_e.copy_(_tensor(fitting["@variables"]["bias_atom_e"]).reshape(-1))
        model.out_bias.copy_(_tensor(source["@variables"]["out_bias"]).reshape(-1))
    dtype = {"float32": torch.float32, "float64": torch.float64}[descriptor["precision"]]
    return set_weight_dtype(model, dtype)


def set_weight_dtype(model: DPA1, dtype: torch.dtype) -> DPA1:
    """Weights in `dtype`; statistics and energy biases stay float64. Changes and returns the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _refuse_unknown(descriptor: Source, fitting: Source) -> None:
    unsupported = {
        "descriptor.use_econf_tebd": descriptor.get("use_econf_tebd"),
        "descriptor.spin": descriptor.get("spin"),
        "descriptor.attn_mask": descriptor.get("attn_mask"),
        "descriptor.lmax > 1": descriptor.get("lmax", 1) != 1,
        "descriptor.compress": descriptor.get("compress"),
        "descriptor.env_mat.use_exp_switch": descriptor.get("env_mat", {}).get("use_exp_switch"),
        "fitting.numb_fparam": fitting.get("numb_fparam"),
        "fitting.numb_aparam": fitting.get("numb_aparam"),
        "fitting.dim_case_embd": fitting.get("dim_case_embd"),
        "fitting with one net per type": not fitting.get("mixed_types", True),
    }
    found = [name for name, value in unsupported.items() if value]
    if found:
        raise InputError(f"this model uses {', '.join(found)}, which carryall does not support yet")


def _config_values(descriptor: Source) -> dict[str, Any]:
    values = {name: descriptor[name] for name in DescriptorConfig.model_fields if name in descriptor}
    values["ln_eps"] = 1e-5 if values.get("ln_eps") is None else values["ln_eps"]
    sel = values["sel"]
    values["sel"] = tuple(sel) if isinstance(sel, list | tuple) else (sel,)
    values["neuron"] = tuple(values["neuron"])
    values["exclude_types"] = tuple((int(a), int(b)) for a, b in values.get("exclude_types", []))
    return values


def _descriptor_source(descriptor: Descriptor, config: DescriptorConfig, type_map: tuple[str, ...], precision: str) -> Source:
    n_types, nnei = len(type_map), sum(config.sel)
    common = {"activation_function": config.activation_function, "precision": precision}
    networks = _collection([_network(descriptor.embedding, config.resnet_dt, **common)], "embedding_network", n_types)
    source: Source = {
        "@class": "Descriptor",
        "type": "dpa1",
        "@version": 2,
        "ntypes": n_types,
        "attn_mask": False,
        "use_econf_tebd": False,
        "type_map": list(type_map),
        "precision": precision,
        "trainable": True,
        "spin": None,
        **{name: getattr(config, name) for name in DescriptorConfig.model_fields},
        "sel": list(config.sel),
        "neuron": list(config.neuron),
        "exclude_types": [list(pair) for pair in config.exclude_types],
        "embeddings": networks,
        "attention_layers": _attention_source(descriptor, config, precision),
        "env_mat": {
            "rcut": config.rcut,
            "rcut_smth": config.rcut_smth,
            "protection": config.env_protection,
            "use_exp_switch": False,
        },
        "type_embedding": _type_embedding_source(descriptor, config, type_map, precision),
        "@variables": {
            name: np.repeat(_array(getattr(descriptor, name))[:, None, :], nnei, axis=1) for name in ("davg", "dstd")
        },
    }
    if descriptor.embedding_strip is not None:
        network = _network(descriptor.embedding_strip, config.resnet_dt, **common)
        source["embeddings_strip"] = _collection([network], "embedding_network", n_types)
    return source


def _attention_source(descriptor: Descriptor, config: DescriptorConfig, precision: str) -> Source:
    shared = {
        "nnei": sum(config.sel),
        "embed_dim": config.neuron[-1],
        "hidden_dim": config.attn,
        "dotr": config.attn_dotr,
        "do_mask": False,
        "scaling_factor": config.scaling_factor,
        "normalize": config.normalize,
        "temperature": config.temperature,
        "precision": precision,
    }
    norm = {"trainable_ln": config.trainable_ln, "ln_eps": config.ln_eps}
    layers = []
    for layer in descriptor.attention:
        assert isinstance(layer, GatedAttentionLayer)
        inner: Source = {"num_heads": 1, "bias": True, "smooth": config.smooth_type_embedding}
        inner |= {"in_proj": _layer(layer.in_proj, precision), "out_proj": _layer(layer.out_proj, precision)}
        variables = {"w": _array(layer.norm.w), "b": _array(layer.norm.b)}
        layer_norm = {"@class": "LayerNorm", "@version": 1, "eps": config.ln_eps, "trainable": config.trainable_ln}
        layer_norm |= {"precision": precision, "@variables": variables}
        layers.append({**shared, **norm, "attention_layer": {**shared, **inner}, "attn_layer_norm": layer_norm})
    head = {"@class": "NeighborGatedAttention", "@version": 1, "layer_num": config.attn_layer}
    return {**head, **shared, **norm, "attention_layers": layers}


def _type_embedding_source(
    descriptor: Descriptor, config: DescriptorConfig, type_map: tuple[str, ...], precision: str
) -> Source:
    layer = descriptor.type_embedding.layer
    shared = {"neuron": [config.tebd_dim], "resnet_dt": False, "precision": precision, "activation_function": "Linear"}
    return {
        "@class": "TypeEmbedNet",
        "@version": 2,
        "ntypes": len(type_map),
        **shared,
        "trainable": True,
        "padding": True,
        "use_econf_tebd": False,
        "use_tebd_bias": config.use_tebd_bias,
        "type_map": list(type_map),
        "embedding": {
            "@class": "EmbeddingNetwork",
            "@version": 2,
            "in_dim": len(type_map),
            "bias": config.use_tebd_bias,
            **shared,
            "layers": [_layer(layer, precision, activation_function="Linear", resnet=True)],
        },
    }


def _fitting_source(model: DPA1, precision: str) -> Source:
    config, n_types = model.fitting_config, len(model.type_map)
    width = model.descriptor.config.dim_out
    shared = {"neuron": list(config.neuron), "activation_function": config.activation_function, "resnet_dt": config.resnet_dt}
    network = {"@class": "FittingNetwork", "@version": 1, "in_dim": width, "out_dim": 1, **shared, "precision": precision}
    network |= {"bias_out": True, "layers": [_layer(layer, precision) for layer in model.fitting]}
    variables: Source = {"bias_atom_e": _array(model.bias_atom_e).reshape(n_types, 1), "case_embd": None}
    variables |= dict.fromkeys(("fparam_avg", "fparam_inv_std", "aparam_avg", "aparam_inv_std"))
    return {
        "@class": "Fitting",
        "type": "ener",
        "@version": 4,
        "var_name": "energy",
        "ntypes": n_types,
        "dim_descrpt": width,
        **shared,
        "numb_fparam": 0,
        "numb_aparam": 0,
        "dim_case_embd": 0,
        "default_fparam": None,
        "rcond": None,
        "precision": precision,
        "mixed_types": True,
        "exclude_types": [],
        "nets": _collection([network], "fitting_network", n_types),
        "@variables": variables,
        "type_map": list(model.type_map),
        "tot_ener_zero": False,
        "trainable": [True] * (len(config.neuron) + 1),
        "layer_name": None,
        "use_aparam_as_mask": False,
        "spin": None,
        "dim_out": 1,
        "atom_ener": None,
    }


def _collection(networks: list[Source], network_type: str, n_types: int) -> Source:
    head = {"@class": "NetworkCollection", "@version": 1, "ndim": 0, "ntypes": n_types}
    return {**head, "network_type": network_type, "networks": networks}


def _network(layers: nn.Sequential, resnet_dt: bool, *, activation_function: str, precision: str) -> Source:
    first = layers[0]
    assert isinstance(first, Layer)
    return {
        "@class": "EmbeddingNetwork",
        "@version": 2,
        "in_dim": first.w.shape[0],
        "neuron": [layer.w.shape[1] for layer in layers if isinstance(layer, Layer)],
        "activation_function": activation_function,
        "resnet_dt": resnet_dt,
        "bias": first.b is not None,
        "precision": precision,
        "layers": [_layer(layer, precision) for layer in layers],
    }


def _layer(layer: nn.Module, precision: str, activation_function: str | None = None, resnet: bool | None = None) -> Source:
    assert isinstance(layer, Layer)
    return {
        "@class": "Layer",
        "@version": 2,
        "bias": layer.b is not None,
        "use_timestep": layer.idt is not None,
        "activation_function": activation_function or layer.activation_function,
        "resnet": layer.resnet if resnet is None else resnet,
        "precision": precision,
        "trainable": True,
        "@variables": {
            name: None if getattr(layer, name) is None else _array(getattr(layer, name)) for name in ("w", "b", "idt")
        },
    }


def _load_descriptor(descriptor: Descriptor, source: Source) -> None:
    for name in ("davg", "dstd"):
        rows = _tensor(source["@variables"][name])
        if rows.dim() == 3 and not bool((rows == rows[:, :1]).all()):
            raise InputError(f"descriptor.{name} differs between neighbour slots: carryall needs the same row in each")
        getattr(descriptor, name).copy_(rows[:, 0] if rows.dim() == 3 else rows)
    _load_layers(descriptor.embedding, source["embeddings"]["networks"][0]["layers"])
    if descriptor.embedding_strip is not None:
        _load_layers(descriptor.embedding_strip, source["embeddings_strip"]["networks"][0]["layers"])
    _load_layers([descriptor.type_embedding.layer], source["type_embedding"]["embedding"]["layers"])
    for layer, one in zip(descriptor.attention, source["attention_layers"]["attention_layers"], strict=True):
        inner = one["attention_layer"]
        _load_layers([layer.in_proj, layer.out_proj], [inner["in_proj"], inner["out_proj"]])  # type: ignore[list-item]
        for name in ("w", "b"):
            getattr(layer.norm, name).copy_(_tensor(one["attn_layer_norm"]["@variables"][name]))


def _load_layers(layers: nn.Sequential | Sequence[nn.Module], sources: list[Source]) -> None:
    if len(layers) != len(sources):
        raise InputError(f"the model dict has {len(sources)} layers where its configuration says {len(layers)}")
    for layer, source in zip(layers, sources, strict=True):
        for name in ("w", "b", "idt"):
            target, value = getattr(layer, name), source["@variables"].get(name)
            if (target is None) != (value is None):
                raise InputError(f"layer variable {name!r} is {'missing' if value is None else 'unexpected'} in the model dict")
            if target is None:
                continue
            tensor = _tensor(value)
            if tensor.shape != target.shape:
                raise InputError(f"layer variable {name!r} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
            target.copy_(tensor)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy().copy()


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value))
