"""DPA-1 from DeePMD's nested dict, of every version that deepmd-kit 3.2 reads.

What a dict says twice (of layers, of attention) must be the same, and what it says beyond what is known here is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from carryall.errors import InputError
from carryall.models.dpa1.config import DescriptorConfig, FittingConfig
from carryall.models.dpa1.descriptor import Descriptor
from carryall.models.dpa1.fitting import STATISTICS, EnergyFitting
from carryall.models.dpa1.model import DPA1, ROW_STATISTICS
from carryall.models.dpa1.precision import set_precision
from carryall.models.dpa1.source_writer import Source, attention_facts
from carryall.models.networks import Layer

Config = TypeVar("Config", bound=BaseModel)

VERSIONS = {
    "Model": (2, 2), "Descriptor": (1, 4), "Fitting": (1, 4),
    "TypeEmbedNet": (1, 2), "NeighborGatedAttention": (1, 1), "NetworkCollection": (1, 1),
    "EmbeddingNetwork": (1, 2), "FittingNetwork": (1, 1), "Layer": (1, 2), "LayerNorm": (1, 1),
}  # fmt: skip
"""First and last version of each class; a dict without `@version` is of version 1."""

MODEL_KEYS = {
    "type_map", "atom_exclude_types", "pair_exclude_types", "rcond", "preset_out_bias", "descriptor", "fitting",
    "neighbor_graph_method",
}  # fmt: skip
DESCRIPTOR_PARTS = {"ntypes", "type_map", "embeddings", "embeddings_strip", "attention_layers", "env_mat", "type_embedding"}
FITTING_PARTS = {"ntypes", "type_map", "nets", "var_name", "dim_descrpt", "dim_out", "type"}
BOOKKEEPING = {"@class", "@version", "@variables"}


def from_source(source: Source) -> DPA1:
    """The model of a nested dict; InputError names what carryall does not know in it."""
    descriptor, fitting = source["descriptor"], source["fitting"]
    if descriptor.get("type") not in ("dpa1", "se_atten", "se_atten_v2") or fitting.get("type", "ener") != "ener":
        found = f"descriptor {descriptor.get('type')!r} and fitting {fitting.get('type')!r}"
        raise InputError(f"cannot read a model of {found}: only dpa1 or se_atten_v2 with ener")
    check_versions(source)
    unknown = sorted(source.keys() - MODEL_KEYS - BOOKKEEPING - {"type"})
    if unknown:
        raise InputError(f"the model dict has {unknown[0]!r}, which carryall does not know")
    if (descriptor.get("env_mat") or {}).get("use_exp_switch"):
        raise InputError("descriptor.env_mat.use_exp_switch is not supported: DPA-1 has the polynomial switch only")
    # deepmd-kit gives the fitting net the model's exclusions, whatever it had
    overrides: Source = {"exclude_types": source.get("atom_exclude_types", [])}
    flags = fitting.get("trainable", True)
    if isinstance(flags, list) and len(set(flags)) == 1:
        overrides["trainable"] = flags[0]
    for key in ("rcut", "rcut_smth", "sel"):
        descriptor[key]
    model = DPA1(
        source["type_map"],
        # dicts of version 1 come from before use_tebd_bias, and have the bias
        _config(DescriptorConfig, "descriptor", {"use_tebd_bias": True} | descriptor, DESCRIPTOR_PARTS),
        _config(FittingConfig, "fitting", {"mixed_types": False} | fitting | overrides, FITTING_PARTS),
        pair_exclude_types=[(a, b) for a, b in source.get("pair_exclude_types", [])],
        atom_exclude_types=source.get("atom_exclude_types", []),
        neighbor_graph_method=source.get("neighbor_graph_method", "graph"),
    )
    with torch.no_grad():
        _load_descriptor(model.descriptor, descriptor)
        _load_fitting(model.fitting, fitting)
        _copy(model.out_bias, source["@variables"]["out_bias"], "out_bias")
        set_precision(model.descriptor, model.descriptor.config.precision, ROW_STATISTICS)
        set_precision(model.fitting, model.fitting.config.precision, STATISTICS)
    return model


def check_versions(source: Source) -> None:
    """InputError names the first part of the dict whose class or version is unknown."""
    for path, part in _parts(source, "model"):
        name, version = part["@class"], part.get("@version", 1)
        if name not in VERSIONS:
            raise InputError(f"{path} is of class {name!r}, which carryall does not know: known are {', '.join(VERSIONS)}")
        first, last = VERSIONS[name]
        if not first <= version <= last:
            raise InputError(
                f"{path} is a {name} of version {version}, carryall reads {first} to {last}: write it again with deepmd-kit 3.2"
            )


def _parts(value: Any, path: str) -> Iterator[tuple[str, Source]]:
    if isinstance(value, dict):
        if "@class" in value:
            yield path, value
        for key, one in value.items():
            yield from _parts(one, f"{path}.{key}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _parts(one, f"{path}[{index}]")


def _config(kind: type[Config], name: str, source: Source, parts: set[str]) -> Config:
    """The options of a part of the dict; what is neither an option nor one of `parts` is refused."""
    values = {key: value for key, value in source.items() if key not in parts | BOOKKEEPING}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        known = f" (known: {', '.join(sorted(kind.model_fields))})" if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{where} of the model dict: {str(first['msg']).removeprefix('Value error, ')}{known}") from None


def _load_descriptor(descriptor: Descriptor, source: Source) -> None:
    config = descriptor.config
    for name in ROW_STATISTICS:
        rows = _tensor(source["@variables"][name])
        if rows.dim() == 3 and not bool((rows == rows[:, :1]).all()):
            raise InputError(f"descriptor.{name} differs between neighbour slots: carryall needs the same row in each")
        _copy(getattr(descriptor, name), rows[:, 0] if rows.dim() == 3 else rows, f"descriptor.{name}")
    if config.lmax > 1:
        _copy(descriptor.get_parameter("degree_gain_raw"), source["@variables"]["degree_gain_raw"], "degree_gain_raw")
    _load_layers(descriptor.embedding, _only(source["embeddings"], "descriptor.embeddings"), "descriptor.embeddings")
    if descriptor.embedding_strip is not None:
        where = "descriptor.embeddings_strip"
        _load_layers(descriptor.embedding_strip, _only(source["embeddings_strip"], where), where)
    of_types = source["type_embedding"]["embedding"]["layers"]
    _load_layers([descriptor.type_embedding.layer], of_types, "descriptor.type_embedding")
    layers = source["attention_layers"]["attention_layers"]
    if len(layers) != config.attn_layer:
        raise InputError(f"the model dict has {len(layers)} attention layers, descriptor.attn_layer is {config.attn_layer}")
    for index, (layer, one) in enumerate(zip(descriptor.attention, layers, strict=True)):
        where, inner, norm = f"attention layer {index}", one["attention_layer"], one["attn_layer_norm"]
        for key, value in {**attention_facts(config), "smooth": config.smooth_type_embedding}.items():
            _same(f"{where}: {key}", inner.get(key, value), value)
        _same(f"{where}: eps", norm.get("eps", config.ln_eps), config.ln_eps)
        _load_layers([layer.in_proj, layer.out_proj], [inner["in_proj"], inner["out_proj"]], where)  # type: ignore[list-item]
        for name in ("w", "b"):
            _copy(getattr(layer.norm, name), norm["@variables"][name], f"{where}: norm.{name}")


def _load_fitting(fitting: EnergyFitting, source: Source) -> None:
    collection, variables = source["nets"], source["@variables"]
    networks = collection["networks"]
    if len(networks) != len(fitting.nets):
        kind = "shared by all types" if fitting.config.mixed_types else "one for each type"
        raise InputError(f"fitting.nets holds {len(networks)} nets, expected {len(fitting.nets)}: {kind}, as mixed_types says")
    for index, (net, network) in enumerate(zip(fitting.nets, networks, strict=True)):
        _load_layers(list(net.children()), network["layers"], f"fitting.nets[{index}]")
    _copy(fitting.bias_atom_e, variables["bias_atom_e"], "fitting.bias_atom_e")
    for name in STATISTICS:
        target, value = getattr(fitting, name), variables.get(name)
        if (target is None) != (value is None):
            raise InputError(f"fitting.{name} is {'missing' if value is None else 'unexpected'} in the model dict")
        if target is not None:
            _copy(target, value, f"fitting.{name}")


def _only(collection: Source, where: str) -> list[Source]:
    """Layers of the one network of a collection."""
    if len(collection["networks"]) != 1:
        raise InputError(f"{where} holds {len(collection['networks'])} networks, expected 1")
    return collection["networks"][0]["layers"]


def _load_layers(layers: Sequence[nn.Module] | nn.Sequential, sources: list[Source], where: str) -> None:
    if len(layers) != len(sources):
        raise InputError(f"{where}: the model dict has {len(sources)} layers where its configuration says {len(layers)}")
    for index, (layer, source) in enumerate(zip(layers, sources, strict=True)):
        assert isinstance(layer, Layer)
        here = f"{where}, layer {index}"
        _same(f"{here}: activation_function", _plain(source["activation_function"]), _plain(layer.activation_function))
        n_in, n_out = layer.w.shape
        if n_out in (n_in, 2 * n_in):
            _same(f"{here}: resnet", bool(source["resnet"]), layer.resnet)
        for name in ("w", "b", "idt"):
            target, value = getattr(layer, name), source["@variables"].get(name)
            if (target is None) != (value is None):
                found = "missing" if value is None else "unexpected"
                raise InputError(f"{here}: layer variable {name!r} is {found} in the model dict")
            if target is not None:
                tensor = _tensor(value) if name == "w" else _tensor(value).reshape(-1)  # version 1 has rows
                _copy(target, tensor, f"{here}: layer variable {name!r}")


def _plain(activation_function: str | None) -> str:
    name = (activation_function or "none").lower()
    return "none" if name == "linear" else name


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise InputError(f"{what} is {found!r} in the model dict where its configuration says {expected!r}")


def _copy(target: Tensor, value: Any, what: str) -> None:
    """`value` into `target`, whose shape it has, or has after its axes of length 1 are dropped."""
    tensor = value if isinstance(value, Tensor) else _tensor(value)
    if tensor.shape != target.shape and tensor.squeeze().shape != target.squeeze().shape:
        raise InputError(f"{what} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
    target.copy_(tensor.reshape(target.shape))


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value))
