"""Files of every format version that ever left this project still load, or say why not, and are made new from their source."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from carryall import inspect, load, rebuild
from carryall.errors import InputError
from carryall.package import cpu
from carryall.package import load as loading
from carryall.package.check import check_graphs, deviation
from carryall.package.from_source import run_from_source
from carryall.package.load import UnfitError, load_packed, misfit
from carryall.package.manifest import FORMAT_VERSION, METADATA, append_facts, read_json, verify
from carryall.package.metadata import Metadata, read_metadata
from carryall.package.run import PackedPotential

KEPT = Path(__file__).parents[1] / "reference_data" / "packed"
VERSIONS = {"0.1": 1, "0.2": 1}


def kept(version: str, suffix: str, folder: Path) -> Path:
    path = folder / f"lj-argon-{version}{suffix}"
    path.write_bytes(gzip.decompress((KEPT / f"{path.name}.gz").read_bytes()))
    return path


def test_there_is_a_file_of_every_format() -> None:
    assert set(VERSIONS.values()) | {FORMAT_VERSION} == set(range(1, FORMAT_VERSION + 1))
    assert {path.name for path in KEPT.iterdir()} == {f"lj-argon-{v}{s}.gz" for v in VERSIONS for s in (".pte", ".pt2")}


@pytest.mark.parametrize("suffix", [".pte", ".pt2"])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_file_gives_its_numbers(version: str, suffix: str, tmp_path: Path) -> None:
    path = kept(version, suffix, tmp_path)
    facts = read_metadata(path, verify(path))
    assert (facts.format_version, facts.carryall_version) == (VERSIONS[version], f"{version}.0")
    # fields that came later have their documented defaults
    later = ("target", "spin", "dim_chg_spin", "compressed", "input_defs", "created")
    assert [getattr(facts, name) for name in later] == ["carryall", False, 0, False, [], ""]
    if suffix == ".pt2" and misfit(facts, torch.device("cpu")):
        with pytest.raises(UnfitError, match="does not fit here: it"):
            load(path)
        return
    packed, eager = load(path), run_from_source("lj-argon")
    worst, where = deviation(packed, eager, check_graphs(eager.spec))
    assert worst <= 1e-12, where
    halves = [graph for graph in check_graphs(eager.spec) if graph.n_edges]
    if version == "0.1":
        with pytest.raises(InputError, match=r"carryall 0\.1\.0, whose files give per-atom virials by neighbour only"):
            packed(halves[0], atomic_virial="half")
    else:
        a, b = (one(halves[0], atomic_virial="half")["atomic_virial"] for one in (packed, eager))
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_an_old_file_is_made_new(tmp_path: Path) -> None:
    path = kept("0.1", ".pt2", tmp_path)
    new = rebuild(path, tmp_path / "new.pte")
    facts = inspect(new)["metadata"]
    assert (facts["format_version"], facts["model_type"], facts["dtype"]) == (FORMAT_VERSION, "LennardJones", "float64")
    worst, where = deviation(load(new), run_from_source("lj-argon"), check_graphs(load(new).spec))
    assert worst <= 1e-12, where
    with pytest.raises(InputError, match=r"expected a packed file, \.pt2 or \.pte"):
        rebuild("lj-argon", tmp_path / "other.pte")


# -- what does not fit


def changed(path: Path, **facts: object) -> Path:
    """The file with other facts, sealed again."""
    with_manifest = read_json(path, METADATA) | facts
    append_facts(path, with_manifest, json.dumps({"model": {"type": "none"}}), {})
    return path


FACTS = {
    "format_version": 2, "kind": "pt2", "cutoff": 3.0, "type_map": ["O"], "outputs": ["energy"], "dtype": "float64",
    "input_keys": [], "output_keys": [], "machine": "x86_64", "cpu_level": "x86-64-v3", "torch_version": "2.12.1",
}  # fmt: skip


def facts_with(**changes: object) -> Metadata:
    return read_metadata(Path("m.pt2"), {**FACTS, **changes})


def test_what_fits_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "cpu_level", lambda: "x86-64-v3")
    monkeypatch.setattr(loading.torch, "__version__", "2.13.0+cpu")
    for level in ("x86-64-v2", "x86-64-v3"):
        assert misfit(facts_with(cpu_level=level), here) is None
    assert misfit(facts_with(cpu_level="x86-64-v4"), here) == "it needs a CPU of level x86-64-v4 and this one has x86-64-v3"
    assert misfit(facts_with(machine="aarch64"), here) == "it is for aarch64 and this machine is x86_64"
    assert misfit(facts_with(device="cuda"), here) == "it was compiled for cuda, not cpu"
    for version in ("2.11.0", "2.13.0+cu130"):
        assert misfit(facts_with(torch_version=version), here) is None
    for version in ("2.10.0", "3.0.1", "", "nightly"):
        assert str(misfit(facts_with(torch_version=version), here)).startswith("it was compiled under torch ")


def test_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(cpu.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cpu.checked_level(None) == cpu.checked_level("x86-64-v3") == "x86-64-v3"
    assert cpu.checked_level("x86-64-v2") == "x86-64-v2"
    with pytest.raises(InputError, match="needs a CPU of level x86-64-v4 and this one has x86-64-v3, and a file is run before"):
        cpu.checked_level("x86-64-v4")
    with pytest.raises(InputError, match="cpu level 'avx2' cannot be compiled for here: expected one of x86-64-v2"):
        cpu.checked_level("avx2")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "arm64")
    assert cpu.checked_level(None) == "native"
    with pytest.raises(InputError, match="expected one of native"):
        cpu.checked_level("x86-64-v2")
    assert [cpu.level_of_isa(isa) for isa in ("avx512 avx512_vnni", "avx2", "none")] == list(reversed(cpu.LEVELS))


def test_a_file_that_does_not_fit_is_rebuilt_into_the_cache_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from carryall.package import cache

    path = kept("0.2", ".pt2", tmp_path)
    monkeypatch.setenv("CARRYALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "level_misfit", lambda *_: "it needs another CPU")
    with pytest.raises(
        UnfitError,
        match=r"does not fit here: it needs another CPU\. .*rebuild=True \(--rebuild\).*carryall rebuild lj-argon-0\.2\.pt2",
    ):
        load(path)
    portable = rebuild(path, tmp_path / "portable.pte")
    made: list[Path] = []

    def fake(_: Path, new: Path, **options: object) -> Path:
        assert options["device"] == "cpu"
        made.append(new)
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(portable.read_bytes())
        return new

    monkeypatch.setattr(cache, "rebuild", fake)
    notes: list[str] = []
    found = load(path, rebuild=True, notify=notes.append)
    assert isinstance(found, PackedPotential)
    assert (made, [found.path]) == ([found.path], list((tmp_path / "cache").iterdir()))
    assert len(notes) == 1
    assert load(path, rebuild=True).path == found.path  # type: ignore[attr-defined]
    assert len(made) == 1


def test_newer_and_foreign_files(tmp_path: Path) -> None:
    path = kept("0.2", ".pte", tmp_path)
    with pytest.raises(InputError, match=r"packed for deepmd: run it there, .*carryall rebuild"):
        load_packed(changed(path, target="deepmd"))
    with pytest.raises(InputError, match=r"other inputs or outputs than this version of carryall \(heat\)"):
        load_packed(changed(path, target="carryall", output_keys=["energy", "forces", "heat"]))
    with pytest.raises(InputError, match=r"metadata\.json: cutoff: Input should be greater than 0"):
        load_packed(changed(path, cutoff=-1.0))
    with pytest.raises(InputError, match=r"metadata\.json: type_map: "):
        load_packed(changed(path, cutoff=3.0, type_map=7))
