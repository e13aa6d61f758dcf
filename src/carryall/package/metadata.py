"""The facts of a packed file: one flat JSON object that a reader in any language understands without the model.

Names and meanings are DeePMD's where it has the field (`rcut`, `type_map`, `dim_fparam`, `has_message_passing`, ...). What a
field means for files that are older than it is its default here, and the table in docs/packed-file.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from carryall.errors import InputError
from carryall.graph.potential import PotentialSpec
from carryall.package.cpu import level_of_isa
from carryall.package.signature import INPUTS, input_names, output_names

Dtype = Literal["float64", "float32"]
Kind = Literal["pt2", "pte"]
Width = Field(default=0, ge=0, le=4096)


class Definition(BaseModel):
    """An input or output of the program."""

    model_config = ConfigDict(frozen=True, strict=True, use_attribute_docstrings=True)

    name: str
    """As in input_keys or output_keys."""
    dtype: str
    """Type of its elements."""
    shape: list[int | str]
    """Sizes, or names of sizes that depend on the structures."""
    unit: str
    """Unit, or what the values mean."""


class Metadata(BaseModel):
    """Everything that an engine needs to know before it calls a packed file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", use_attribute_docstrings=True, allow_inf_nan=False)

    format_version: int = Field(ge=1)
    """Of the file's layout; 1 until carryall 0.2, 2 since 0.3."""
    kind: Kind
    """pt2 (compiled) or pte (portable program)."""
    target: Literal["carryall", "deepmd"] = "carryall"
    """Whose inputs and outputs the program has."""
    cutoff: float = Field(gt=0)
    """Å; the graph must hold every neighbour within it."""
    rcut: float = 0.0
    """The same, by DeePMD's name; 0 where only cutoff is given."""
    type_map: list[str] = Field(min_length=1)
    """Chemical symbols in the order of the atom types."""
    outputs: list[str]
    """What a Potential made of the file returns."""
    dtype: Dtype
    """Inside the program; floating-point inputs and outputs are float64."""
    length_unit: str = "angstrom"
    """Of positions and cells."""
    energy_unit: str = "eV"
    """Of energies."""
    message_passing: bool = False
    """Whether features of ghosts are exchanged between ranks."""
    has_message_passing: bool = False
    """The same, by DeePMD's name."""
    neighbor_graph_method: Literal["graph", "legacy"] = "graph"
    """Every neighbour and no padding, or DeePMD's padded lists."""
    block_edges: int | None = Field(default=None, ge=1)
    """Edge slots that a CPU evaluates together; null: all at once."""
    dim_fparam: int = Width
    """Parameters of a system that it takes."""
    default_fparam: list[float] | None = None
    """What they are where a system has none."""
    dim_aparam: int = Width
    """Parameters of an atom that it takes."""
    spin: bool = False
    """Whether it takes a magnetic moment of each atom."""
    dim_chg_spin: int = Width
    """2 where it takes charge and spin of a system."""
    default_chg_spin: list[float] | None = None
    """What they are where a system has none."""
    long_range: bool = False
    """Whether it depends on positions and cell beyond the edge vectors: for 3-D periodic systems only."""
    k_cutoff: float = Field(default=0.0, ge=0)
    """1/Å, up to which k_index holds reciprocal vectors."""
    extra_inputs: list[str] = []
    """Inputs beyond geometry and types, in order."""
    input_keys: list[str]
    """Names of the program's inputs, in order."""
    output_keys: list[str]
    """Names of the program's outputs, in order."""
    input_defs: list[Definition] = []
    """Type, shape and unit of each input."""
    output_defs: list[Definition] = []
    """Type, shape and unit of each output."""
    model_type: str = ""
    """Class of the model."""
    n_parameters: int = 0
    """Trainable numbers."""
    model_sha256: str = ""
    """SHA-256 of model.json: files of one model have the same, however they were packed."""
    compressed: bool = False
    """Whether tables stand for embedding nets; model.json always has the nets."""
    compression_tolerance: float | None = None
    """What the relative errors of the tables had to stay below."""
    compression_error_value: float | None = None
    """Largest error of an embedding, relative to its largest value, measured between the nodes."""
    compression_error_derivative: float | None = None
    """The same of its derivative."""
    compression_error_value_absolute: float | None = None
    """Largest error of an embedding."""
    compression_error_derivative_absolute: float | None = None
    """Largest error of its derivative."""
    compression_shortest_distance: float | None = None
    """Å, down to which the errors were measured."""
    compression_argument_lowest: float | None = None
    """Where the tables begin, in the radial rows of the environment, in the model's scale."""
    compression_argument_highest: float | None = None
    """Where they end."""
    compression_tables: int | None = None
    """Functions that were tabulated."""
    compression_nodes: int | None = None
    """Nodes of each, at most."""
    compression_bytes: int | None = None
    """Of all tables."""
    device: str = "cpu"
    """Type of device that the program was made on; a pte runs on any."""
    carryall_version: str = ""
    """That wrote the file."""
    torch_version: str = ""
    """That wrote the program."""
    python_version: str = ""
    """That wrote the file."""
    compiler: str = ""
    """C++ compiler of a pt2."""
    machine: str = "any"
    """Instruction set that a pt2 was compiled for."""
    cpu_level: str = "any"
    """Level of the x86-64 psABI that a pt2 needs."""
    cuda_capability: str = ""
    """Compute capability that a pt2 for CUDA was compiled for."""
    created: str = ""
    """UTC; SOURCE_DATE_EPOCH, where set, stands for now."""

    @property
    def potential_spec(self) -> PotentialSpec:
        """The same facts as a Potential has them."""
        return PotentialSpec.from_dict(self.model_dump())


def read_metadata(path: Path, values: dict[str, Any]) -> Metadata:
    """The checked facts of a file of any format version; InputError names the field that is wrong."""
    try:
        return Metadata.model_validate(upgraded(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(
            f"{path}: metadata.json: {where}: {first['msg']}; the file is damaged or not a packed potential"
        ) from None


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Facts of an older format in the words of the newest; fields that it did not have get their defaults."""
    if values.get("format_version") != 1:
        return values
    names = {name: unit for name, unit in values.items() if name not in ("block_size", "cpu_isa")}
    isa = values.get("cpu_isa", "any")
    names["cpu_level"] = "any" if isa == "any" else level_of_isa(str(isa))
    # a program without dE/d(edge vector) is evaluated whole
    if "edge_gradient" not in values.get("output_keys", []):
        names["block_edges"] = None
    return names


def check_program(path: Path, metadata: Metadata) -> None:
    """InputError unless the program takes and gives what this version of carryall knows."""
    if metadata.target != "carryall":
        raise InputError(
            f"{path} was packed for {metadata.target}: run it there, or make one of your own from its source, without running "
            f"anything of it: carryall rebuild {path.name} mine.pt2"
        )
    spec = metadata.potential_spec
    known = output_names(spec)
    if tuple(metadata.input_keys) != input_names(spec) or not set(known) >= set(metadata.output_keys) >= {"energy", "forces"}:
        odd = sorted({*metadata.input_keys, *metadata.output_keys} - {*INPUTS, *spec.extra_inputs, *known})
        raise InputError(
            f"{path} has other inputs or outputs than this version of carryall{f' ({odd[0]})' if odd else ''}: "
            f"make it again from its source: carryall rebuild {path.name} mine{path.suffix}"
        )


def json_schema() -> dict[str, Any]:
    """JSON schema of metadata.json, as it is committed in docs/metadata.schema.json."""
    return Metadata.model_json_schema()
