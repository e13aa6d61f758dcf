"""What a pipeline over files is: one frozen, strict tree, read from YAML; `carryall pipeline` runs it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from carryall.errors import InputError, nearest

HOW = ("helping", "comm_mode", "buffer_config", "checkpoint_seconds", "timeout", "step_timeout")
"""How the work is done, which changes no number."""
FREE = ("out", "inputs", "model", "device", *HOW)
"""What a resumed run may change; the ledger knows inputs and potentials itself."""
FREE_OF_STAGES = ("model", "ranks", "max_atoms_per_batch", "max_edges_per_batch")
NAME = r"[A-Za-z][A-Za-z0-9_]*"


class Strict(BaseModel):
    """Frozen; unknown keys are refused; docstrings of fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _words(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Schedule = Annotated[str, BeforeValidator(_words)]
"""A number, or numbers with colons between them."""


class WorkConfig(Strict):
    """What every stage with a potential has."""

    name: str | None = Field(default=None, pattern=f"^{NAME}$")
    """What reports and columns call it; None: relax or md, from the second without a name on relax2, md2, ..."""
    model: str | None = None
    """Potential of this stage; None: that of the pipeline."""
    ranks: int = Field(default=1, ge=1)
    """Ranks of torchrun that share its systems."""
    constraints: tuple[Literal["fix_symmetry", "fix_center_of_mass"], ...] = ()
    """What stays as it is, beside atoms that a file holds fixed."""
    max_atoms_per_batch: int | None = Field(default=None, ge=1)
    """Atoms that a rank works on at once; None: as many as pay and fit into memory."""
    max_edges_per_batch: int | None = Field(default=None, ge=1)
    """Neighbour pairs that a rank works on at once; takes effect with max_atoms_per_batch."""


class RelaxConfig(WorkConfig):
    """A stage that relaxes, with the words of `carryall relax`."""

    fmax: float = Field(default=0.05, gt=0)
    """Largest force that counts as relaxed, eV/Å."""
    max_steps: int = Field(default=500, ge=1)
    """Steps after which a structure goes on as it is."""
    optimizer: Literal["fire", "lbfgs", "gradient_descent"] = "fire"
    """How to go downhill."""
    cell_filter: Literal["unit_cell", "frechet"] | None = None
    """Relax the cell too, in these coordinates; None keeps it fixed."""
    pressure: float = 0.0
    """That the cell relaxes to, GPa."""
    cell_mask: tuple[bool, bool, bool, bool, bool, bool] | None = None
    """Which strains are free: xx yy zz yz xz xy."""
    hydrostatic_strain: bool = False
    """The cell keeps its shape."""
    constant_volume: bool = False
    """The cell keeps its volume."""


class MDConfig(WorkConfig):
    """A stage of molecular dynamics, with the words of `carryall md`."""

    ensemble: Literal["nvt", "nve", "npt", "nph"] = "nvt"
    """What is held."""
    thermostat: Literal["langevin", "nose_hoover", "velocity_rescaling"] | None = None
    """Of nvt; None: langevin."""
    barostat: Literal["stochastic_cell_rescaling", "mtk"] | None = None
    """Of npt; None: stochastic_cell_rescaling. nph is mtk's."""
    cell_mode: Literal["isotropic", "anisotropic", "triclinic"] = "isotropic"
    """What the barostat may change."""
    temperature: Schedule = "300"
    """K, of the thermostat, and of velocities that a structure lacks. 300:600 goes from 300 to 600 over the stage."""
    pressure: Schedule = "0"
    """GPa; a schedule as for the temperature."""
    timestep: float = Field(default=0.5, gt=0)
    """fs."""
    n_steps: int = Field(default=1000, ge=1)
    """Steps of each structure."""
    friction: float = Field(default=1.0, ge=0)
    """Of the Langevin thermostat, 1/ps."""
    tau: float = Field(default=100.0, gt=0)
    """Of the other thermostats, fs."""
    barostat_tau: float = Field(default=1000.0, gt=0)
    """Of the barostat, fs."""
    compressibility: float | None = Field(default=None, gt=0)
    """Of the material, 1/GPa, for stochastic_cell_rescaling; None: water's."""
    seed: int | None = Field(default=None, ge=0)
    """Of velocities and noise; None: the number of the stage."""
    max_force: float = Field(default=1000.0, gt=0)
    """eV/Å beyond which a structure is set aside."""
    sample_interval: int = Field(default=10, ge=1)
    """Steps between samples of temperature, energy and pressure for their means."""

    @model_validator(mode="after")
    def _samples(self) -> MDConfig:
        if self.sample_interval > self.n_steps:
            raise ValueError(f"sample_interval ({self.sample_interval}) is larger than n_steps ({self.n_steps}): no sample")
        return self


class AnalysisConfig(Strict):
    """What is computed of all finished structures, at the end."""

    r_max: float = Field(default=6.0, gt=0)
    """Å, of the radial distribution function."""
    n_bins: int = Field(default=120, ge=1)
    """Its bins."""


class StageConfig(Strict):
    """One stage: a single one of these."""

    relax: RelaxConfig | None = None
    """Relax."""
    md: MDConfig | None = None
    """Molecular dynamics."""
    analysis: AnalysisConfig | None = None
    """Numbers and a picture; the last entry."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        """`- relax` is a relaxation with the default of every key."""
        if isinstance(value, str):
            return {value: {}}
        if isinstance(value, dict):
            if len(value) != 1:
                raise ValueError(f"a stage is one of relax, md and analysis with its keys below it, got {list(value)}")
            return {key: {} if one is None else one for key, one in value.items()}
        return value

    @property
    def work(self) -> RelaxConfig | MDConfig | None:
        """The stage that has a potential, if it is one."""
        return self.relax or self.md


class PipelineConfig(Strict):
    """Structures through stages, and what is made of them."""

    inputs: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(min_length=1)
    """Files, folders of files, or patterns such as structures/*.cif; every frame of each."""
    model: str | None = None
    """A packed file, checkpoint, source file or built-in name, for stages that name none."""
    stages: tuple[StageConfig, ...]
    """One after the other."""
    out: Path = Path("pipeline")
    """Folder for everything that the run writes."""
    device: str = "cpu"
    """Where to run."""
    helping: bool = True
    """A rank whose stage has nothing to do works for another one."""
    comm_mode: Literal["sync", "async_recv", "fully_async"] = "async_recv"
    """How ranks take and hand on systems."""
    buffer_config: dict[Literal["num_systems", "num_nodes", "num_edges"], int] | None = None
    """What a rank may ask for ahead; None: a quarter of its batch."""
    checkpoint_seconds: float = Field(default=10.0, ge=0)
    """Between two times that batches on their way are saved; longer where that would take more than 3 % of the time."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds without a sign of life after which a rank counts as gone."""
    step_timeout: float = Field(default=1800.0, gt=0)
    """Seconds that one step may take."""

    @model_validator(mode="after")
    def _consistent(self) -> PipelineConfig:
        found = [one.work for one in self.stages if one.work is not None]
        if len(found) < 2:
            raise ValueError(
                f"stages: a pipeline has at least two of relax and md, got {len(found)}; "
                "a single one is carryall relax or carryall md"
            )
        if any(one.analysis for one in self.stages[:-1]):
            raise ValueError("stages: analysis is what is done at the end: make it the last entry, once")
        if self.model is None and any(one.model is None for one in found):
            raise ValueError("model: give one to the pipeline, or one to every stage")
        names = [name for name, _ in self.work]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: two have the same name: {', '.join(names)}")
        return self

    @property
    def work(self) -> list[tuple[str, RelaxConfig | MDConfig]]:
        """Stages that have a potential, with their names."""
        found: list[tuple[str, RelaxConfig | MDConfig]] = []
        counts = {"relax": 0, "md": 0}
        for one in self.stages:
            if one.work is not None:
                kind = "relax" if one.relax else "md"
                counts[kind] += one.work.name is None
                name = kind if counts[kind] == 1 else f"{kind}{counts[kind]}"
                found.append((one.work.name or name, one.work))
        return found

    @property
    def analysis(self) -> AnalysisConfig | None:
        """What is done at the end."""
        return self.stages[-1].analysis

    def plain(self) -> dict[str, Any]:
        """All of it as YAML has it; `read_pipeline_config` reads it."""
        found = self.model_dump(mode="json")
        found["stages"] = [{key: one for key, one in stage.items() if one is not None} for stage in found["stages"]]
        return found

    def fixed(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed: what decides the numbers of a structure."""
        stages = {
            name: {key: value for key, value in one.model_dump(mode="json").items() if key not in FREE_OF_STAGES}
            for name, one in self.work
        }
        rest = {key: value for key, value in self.model_dump(mode="json", exclude={"stages"}).items() if key not in FREE}
        return {"stages": stages, **rest}


def read_pipeline_config(source: PipelineConfig | Mapping[str, Any] | str | Path) -> PipelineConfig:
    """A configuration from YAML, a dict, or as it is; InputError names an unknown key, where, and the nearest one."""
    if isinstance(source, PipelineConfig):
        return source
    where = "config"
    if isinstance(source, str | Path):
        where = str(source)
        if not Path(source).is_file():
            raise InputError(f"no such file: {source}")
        try:
            source = yaml.load(Path(source).read_text(encoding="utf-8"), Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(source, Mapping):
        raise InputError(f"{where} must hold a mapping with at least inputs and stages, got {type(source).__name__}")
    try:
        return PipelineConfig.model_validate(dict(source))
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_explain(one) for one in error.errors())) from None


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of JSON only, so that 20:40 is a text and 1e-3 a number; a key may come once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} is there twice")
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What a plain word may stand for, by its first letter."""
    number, whole = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
    kept = {
        first: [one for one in rules if one[0] not in (number, whole)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        own = [(whole, re.compile(r"^[-+]?\d+$")), (number, re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"))]
        kept[first] = [*own, *kept.get(first, [])]
    return kept


_Loader.yaml_implicit_resolvers = _resolvers()


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known(error["loc"][:-1])
        return f"unknown key {place!r}{nearest(str(error['loc'][-1]), known)} (known: {', '.join(known)})"
    text = str(error["msg"]).removeprefix("Value error, ")
    given = error["input"]
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{place}: must be one of {', '.join(allowed)}, got {given!r}{nearest(str(given), allowed)}"
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) and error["type"] != "missing" else ""
    return f"{place}: {text}{shown}" if place else text


def _known(path: Iterable[str | int]) -> list[str]:
    """Keys that there are at a path of the tree."""
    model: Any = PipelineConfig
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The configuration class somewhere in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(one) for one in get_args(annotation))
    return next((one for one in found if one is not None), None)
