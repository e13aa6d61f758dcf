"""Every damage to a packed file is noticed before anything of it runs, and what is used is what was checked."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from dataclasses import replace
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
    FORMAT_VERSION,
    MANIFEST,
    METADATA,
    MODEL,
    SCRIPT,
    SIGNATURE,
    append_facts,
    entries_of,
    is_packed,
    open_archive,
    open_packed,
    read_entry,
    read_json,
    seal,
    verified_copy,
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
        assert manifest["format_version"] == FORMAT_VERSION
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
        "cpu_level": "any",
        "machine": "any",
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["n_parameters"] > 100


def test_every_truncation_is_noticed(packed: Path) -> None:
    whole = packed.read_bytes()
    for fraction in (0.0, 0.001, 0.3, 0.7, 0.99, 0.9999):
        packed.write_bytes(whole[: int(fraction * len(whole))])
        with pytest.raises(InputError, match=r"model\.pte.*(copied whole|copy or pack it)"):
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
    assert found == {"named": True} or (found == verify(tiny) and harmless(tiny, copy))


def harmless(first: Path, second: Path) -> bool:
    """Whether two files hold the same entries; dates may differ, where both headers agree on them."""
    with open_archive(first) as one, open_archive(second) as other:
        return {name: one.read(name) for name in one.records} == {name: other.read(name) for name in other.records}


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
    "newer": (b'{"format_version": 99, "entries": {}}', "format version 99, newer than 2: update carryall"),
    "not JSON": (b"{", "entry model/extra/manifest.json is not valid JSON"),
    "deep": (b"[" * 100_000, "is nested too deep"),
    "a key twice": (b'{"format_version": 1, "entries": {}, "entries": {}}', "has a key twice"),
    "not an object": (b"[]", "has no format version"),
    "no entries": (b'{"format_version": 1}', "lists no entries"),
    "entries are a list": (b'{"format_version": 1, "entries": []}', "lists no entries"),
    "an entry is text": (b'{"format_version": 1, "entries": {"model/x": "y"}}', "has no hash and size of 'model/x'"),
    "size is true": (b'{"format_version": 1, "entries": {"model/x": {"sha256": "", "size": true}}}', "no hash and size"),
    "version is text": (b'{"format_version": "one", "entries": {}}', "has no format version"),
    "version is true": (b'{"format_version": true, "entries": {}}', "has no format version"),
    "version is zero": (b'{"format_version": 0, "entries": {}}', "has no format version"),
    "huge": (b" " * ((1 << 22) + 1), "4194305 bytes, more than the 4194304 that it may have"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be_used(tiny: Path, tmp_path: Path, name: str) -> None:
    content, message = MANIFESTS[name]
    copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
    rewrite(copy, {MANIFEST: content})
    for function in (verify, inspect) if content else (verify,):
        with pytest.raises(InputError, match=rf"copy\.pte.*{message}"):
            function(copy)


METADATAS = {
    "not an object": (b"[]", "does not hold an object"),
    "NaN": (b'{"cutoff": NaN}', "NaN is no number of JSON"),
    "infinite": (b'{"cutoff": 1e999}', "1e999 is beyond a double"),
    "huge number": (b'{"cutoff": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "a key twice": (b'{"cutoff": 4.0, "cutoff": 6.0}', "has a key twice"),
    "not text": (b"\xff\xfe{}", "is not valid JSON"),
    "deep": (b'{"a":' * 100_000, "is nested too deep"),
}


@pytest.mark.parametrize("name", METADATAS)
def test_metadata_that_readers_could_take_differently(tiny: Path, tmp_path: Path, name: str) -> None:
    """Sealed, so that every hash is right."""
    content, message = METADATAS[name]
    copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
    rewrite(copy, {METADATA: content})
    seal(copy)
    with pytest.raises(InputError, match=rf"copy\.pte.*metadata\.json.*{message}"):
        verify(copy)


def test_sealing_replaces_the_manifest_and_drops_signatures_of_the_old_one(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
    rewrite(copy, {METADATA: b'{"cutoff": 5.0}', SIGNATURE: b"{}"})
    with pytest.raises(InputError, match=rf"entry {METADATA} does not match"):
        verify(copy)
    seal(copy)
    assert verify(copy) == {"cutoff": 5.0}
    with open_archive(copy) as archive:
        assert SIGNATURE not in archive.records


def test_the_signature_is_outside_of_the_manifest(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copyfile(tiny, tmp_path / "copy.pte"))
    rewrite(copy, {SIGNATURE: b"{}"})
    assert verify(copy) == verify(tiny)


def test_equal_contents_make_equal_files(tmp_path: Path) -> None:
    """Whenever and under whatever name they are written; the training configuration may hold what JSON has no number for."""
    made = []
    for name in ("a.pte", "b.pt2"):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("model/x", (1990 + len(made), 1, 1, 0, 0, 0)), "x")
        append_facts(path, {"cutoff": 4.0}, "{}", {"largest": float("inf"), "steps": [1, float("nan")]})
        made.append(path.read_bytes())
    assert made[0] == made[1]
    assert read_json(tmp_path / "a.pte", SCRIPT) == {"largest": "inf", "steps": [1, "nan"]}
    with zipfile.ZipFile(tmp_path / "a.pte") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_whose_file_it_is(tiny: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "frozen.pt2"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("frozen/extra/model.json", "{}")
    assert is_packed(tiny)
    assert not is_packed(foreign)
    assert read_entry(foreign, "frozen/extra/model.json") == b"{}"
    assert read_json(foreign, "frozen/extra/model.json") == {}


def test_a_file_that_takes_the_place_of_an_open_one_is_not_looked_at(tiny: Path, tmp_path: Path) -> None:
    copy, other = (Path(shutil.copyfile(tiny, tmp_path / name)) for name in ("copy.pte", "other.pte"))
    rewrite(other, {METADATA: b'{"cutoff": 9.0}'})
    seal(other)
    with open_packed(copy) as packed:
        assert packed.check()["cutoff"] == 4.0
        other.replace(copy)
        assert packed.json(METADATA)["cutoff"] == 4.0
        assert verify(copy)["cutoff"] == 9.0


def test_an_open_file_that_is_changed_in_place_is_noticed(packed: Path) -> None:
    with open_packed(packed) as opened:
        opened.check()
        record = opened.archive.records[MODEL]
        content = bytearray(opened.read(MODEL))
        content[record.size // 2] ^= 1
        with packed.open("r+b") as stream:
            stream.seek(record.start)
            stream.write(content)
        with pytest.raises(InputError, match=r"model\.pte: entry model/extra/model\.json does not have its checksum"):
            opened.read(MODEL)
        # with the checksum of the archive forged too, the hash is left
        forged = replace(opened.archive.records[MODEL], crc=zlib.crc32(content))
        opened.archive.records[MODEL] = forged
        for read in (opened.read, lambda name: list(opened.chunks(name))):
            with pytest.raises(InputError, match=r"model\.pte: entry model/extra/model\.json does not match the manifest"):
                read(MODEL)


def test_a_copy_for_torch_is_written_from_what_was_checked(tmp_path: Path) -> None:
    path, folder = tmp_path / "mine.pt2", tmp_path / "private"
    folder.mkdir()
    parts = {
        "model/data/aotinductor/model/x.so": b"\x7fELF" * 1000,
        "model/archive_format": b"pt2",
        "model/.data/version": b"3\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    append_facts(path, {"kind": "pt2"}, "{}", {})
    with verified_copy(path, folder) as copy, zipfile.ZipFile(copy) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == parts
    assert not list(folder.iterdir())
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"\x7fELF") + 9] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"mine\.pt2: entry model/data/aotinductor/model/x\.so"), verified_copy(path, folder):
        raise AssertionError("it was handed out")
    assert not list(folder.iterdir())
    path.write_bytes(whole)
    rewrite(path, {"model/data/sample_inputs/model.pt": b"pickle"})
    seal(path)
    with pytest.raises(InputError, match=r"sample_inputs/model\.pt has no place in a"), verified_copy(path, folder):
        raise AssertionError("it was handed out")


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
