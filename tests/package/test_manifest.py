"""Every damage to a packed file is noticed before anything of it runs."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import carryall
from carryall.errors import InputError
from carryall.package.inspect import inspect
from carryall.package.load import load_packed
from carryall.package.manifest import (
    EXTRA,
    MANIFEST,
    METADATA,
    MODEL,
    append_facts,
    entries_of,
    open_archive,
    read_json,
    verify,
)


@pytest.fixture
def packed(dpa1_pte: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(dpa1_pte, tmp_path / "model.pte"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the same layout, small enough to damage many times."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pte"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/models/model.json", json.dumps({"graph": list(range(20))}))
    append_facts(path, {"cutoff": 4.0, "type_map": ["O"]}, json.dumps({"model": {"type": "standard"}}), {"n_steps": 3})
    return path


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    """The archive with some entries exchanged, added, or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content |= {name: value for name, value in changes.items() if value is not None}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            if name not in changes or changes[name] is not None:
                archive.writestr(name, value)


def test_a_whole_file_verifies(packed: Path) -> None:
    metadata = verify(packed)
    assert metadata["type_map"] == ["O", "H"]
    manifest = read_json(packed, MANIFEST)
    with open_archive(packed) as archive:
        assert set(manifest["entries"]) | {MANIFEST} == set(archive.namelist())
        assert manifest["entries"] == {name: vars(entry) for name, entry in entries_of(archive).items()}
    assert all(len(entry["sha256"]) == 64 for entry in manifest["entries"].values())


def test_metadata_facts(packed: Path) -> None:
    facts = verify(packed)
    expected = {
        "kind": "pte",
        "cutoff": 4.0,
        "rcut": 4.0,
        "dtype": "float64",
        "message_passing": False,
        "has_message_passing": False,
        "model_type": "DPA1",
        "length_unit": "angstrom",
        "energy_unit": "eV",
        "extra_inputs": [],
        "output_keys": ["energy", "atomic_energy", "forces", "virial", "atomic_virial", "edge_gradient"],
        "device": "cpu",
        "carryall_version": carryall.__version__,
        "torch_version": torch.__version__,
        "cpu_isa": "any",
        "machine": "any",
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["n_parameters"] > 100


def test_every_truncation_is_noticed(packed: Path) -> None:
    whole = packed.read_bytes()
    for fraction in (0.0, 0.001, 0.3, 0.7, 0.99, 0.9999):
        packed.write_bytes(whole[: int(fraction * len(whole))])
        # programs hold archives of their own: the end of one of those may be found
        with pytest.raises(InputError, match=r"model\.pte (is not a packed potential|has no .*manifest\.json).*copied whole"):
            verify(packed)


def test_a_flipped_bit_in_any_entry_is_noticed(packed: Path) -> None:
    whole = packed.read_bytes()
    with zipfile.ZipFile(packed) as archive:
        entries = archive.infolist()
    assert len(entries) > 5
    for info in entries:
        name_length, extra_length = struct.unpack_from("<HH", whole, info.header_offset + 26)
        damaged = bytearray(whole)
        damaged[info.header_offset + 30 + name_length + extra_length + info.compress_size // 2] ^= 0x10
        if info.compress_size:
            packed.write_bytes(damaged)
            with pytest.raises(InputError, match=r"model\.pte"):
                verify(packed)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_an_input_error_or_harmless(tiny: Path, place: float, bit: int) -> None:
    """Wherever it is, in headers and the directory too. Harmless: dates and the like, which no content depends on."""
    damaged = bytearray(tiny.read_bytes())
    damaged[int(place * len(damaged))] ^= 1 << bit
    copy = tiny.with_name("damaged.pte")
    copy.write_bytes(damaged)
    try:
        found = verify(copy)
    except InputError as error:
        found = {"named": "damaged.pte" in str(error)}
    assert found in (verify(tiny), {"named": True})


@pytest.mark.parametrize("name", [METADATA, MODEL, EXTRA + "model_def_script.json", "model/models/model.json"])
def test_a_missing_or_changed_entry_is_named(tiny: Path, tmp_path: Path, name: str) -> None:
    for change in (None, b"{}"):
        copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
        rewrite(copy, {name: change})
        with pytest.raises(InputError, match=rf"copy\.pte: entry {name} does not match the manifest"):
            verify(copy)


def test_an_added_entry_is_named(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
    rewrite(copy, {"model/data/more.so": b"\x7fELF"})
    with pytest.raises(InputError, match=r"entry model/data/more\.so does not match"):
        verify(copy)


MANIFESTS = {
    "absent": (None, r"has no model/extra/manifest\.json: it was not written by carryall"),
    "newer": (b'{"format_version": 99, "entries": {}}', "format version 99, newer than 1: update carryall"),
    "not JSON": (b"{", "is damaged"),
    "not an object": (b"[]", "is damaged"),
    "no entries": (b'{"format_version": 1}', "is damaged"),
    "entries are a list": (b'{"format_version": 1, "entries": []}', "is damaged"),
    "version is text": (b'{"format_version": "one", "entries": {}}', "is damaged"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be_used(tiny: Path, tmp_path: Path, name: str) -> None:
    content, message = MANIFESTS[name]
    copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
    rewrite(copy, {MANIFEST: content})
    with pytest.raises(InputError, match=message):
        verify(copy)


def test_what_is_not_a_packed_file(tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.pte", tmp_path / "foreign.pt2"
    text.write_text("hello")
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("model/data", "x")
    for path, message in (
        (text, r"text\.pte is not a packed potential"),
        (foreign, r"foreign\.pt2 has no .*not written by carryall"),
        (tmp_path / "absent.pt2", r"no such file: .*absent\.pt2"),
        (tmp_path, "no such file"),
    ):
        for function in (verify, load_packed):
            with pytest.raises(InputError, match=message):
                function(path)


def test_inspect_runs_nothing_from_the_file(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something of the file was run")

    for name in ("torch.export.load", "torch._inductor.aoti_load_package", "torch.load", "pickle.loads", "pickle.load"):
        monkeypatch.setattr(name, refuse)
    facts = inspect(packed)
    assert facts["metadata"]["n_parameters"] > 100
    assert facts["bytes"] == packed.stat().st_size
    assert facts["source_bytes"] == facts["entries"][MODEL]["size"] > 1000
    assert facts["training"] == {}
    assert facts["entries"] == read_json(packed, MANIFEST)["entries"]


def test_inspect_a_source_and_refuse_others(tmp_path: Path) -> None:
    reference = Path(__file__).parents[1] / "reference_data" / "dpa1" / "a0.dp"
    facts = inspect(reference)["metadata"]
    assert (facts["kind"], facts["type_map"], facts["descriptor.rcut"]) == ("source", ["O", "H"], 4.5)
    other = tmp_path / "x.txt"
    other.write_text("")
    with pytest.raises(InputError, match=r"cannot inspect a \.txt file"):
        inspect(other)
