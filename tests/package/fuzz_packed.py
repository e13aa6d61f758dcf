"""Damage packed files in every way that comes to mind, from a seed, and see that each is whole, or an InputError; a program.

    python fuzz_packed.py FILE.pte FOLDER SEED N

It counts what became of N damaged copies and ends at the first that is neither. Its address space is limited, so that a file
that makes a reader take much memory is found, and it is a process of its own, so that a crash is found.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from carryall.errors import InputError
from carryall.models.pair import LennardJones
from carryall.package.archive import open_archive, write_archive
from carryall.package.check import check_graphs
from carryall.package.inspect import inspect
from carryall.package.manifest import MANIFEST, METADATA, MODEL, SCRIPT, seal, verify
from carryall.package.metadata import read_metadata
from carryall.package.program import CONSTANTS_CONFIG, PROGRAM, WEIGHTS_CONFIG, load_program
from carryall.package.signature import to_inputs
from carryall.package.sources import read_source

MEMORY = 512 << 20
"""Bytes of address space beyond what the imports took."""
HANGS = 30
"""Seconds after which a file is taken to hang its reader; those that do not take milliseconds."""
HEADERS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22, b"PK\x06\x06": 56, b"PK\x06\x07": 20}
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**40, 2**63 - 1, 2**63, -(2**64), 10**400, 0.5, -1e308, 5e-324, "", "x", "../x",
    "\0", "NaN", "Infinity", "weight_0", "cpu", "cuda", "meta", "float16", [], {}, [[]], [0], [2**62] * 3, {"as_int": 2**40},
    {"as_none": True}, {"as_tensor": {"name": "positions"}}, {"as_name": "sym_size_int"}, {"@class": "np.ndarray"},
    {"@class": "np.ndarray", "dtype": "float64", "shape": [2**40], "base64": ""}, "Symbol('s0')", "__import__('os').abort()",
    "torch.ops.aten.add.Tensor", "torch.ops.aten.mm.default", "torch.ops.aten.view.default",
    "torch.ops.aten.empty.memory_format",
    "torch.ops.aten.as_strided.default", "torch.ops.aten.index_select.default", "torch.os.abort", "_operator.pow",
)  # fmt: skip


def flips(whole: bytes, rng: random.Random) -> bytes:
    """One to eight flipped bits."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncation(whole: bytes, rng: random.Random) -> bytes:
    """Either end cut off."""
    place = rng.randrange(len(whole))
    return whole[:place] if rng.random() < 0.8 else whole[place:]


def splice(whole: bytes, rng: random.Random) -> bytes:
    """A piece taken out, doubled, moved, emptied, or replaced by noise."""
    start = rng.randrange(len(whole))
    stop = min(len(whole), start + int(10 ** rng.uniform(0, 5)))
    piece, place = whole[start:stop], rng.randrange(len(whole))
    return rng.choice((
        lambda: whole[:start] + whole[stop:],
        lambda: whole[:place] + piece + whole[place:],
        lambda: whole[:place] + piece + whole[place + len(piece) :],
        lambda: whole[:start] + bytes(len(piece)) + whole[stop:],
        lambda: whole[:start] + rng.randbytes(len(piece)) + whole[stop:],
        lambda: whole + piece,
        lambda: piece + whole,
    ))()  # fmt: skip


def header(whole: bytes, rng: random.Random) -> bytes:
    """One or two fields of one header or of the end, with numbers at which readers differ."""
    data = bytearray(whole)
    signature = rng.choice([one for one in HEADERS if one in whole])
    places = (
        [i for i in range(len(whole)) if whole.startswith(signature, i)] if len(whole) < 2000 else _places(whole, signature)
    )
    place = rng.choice(places)
    for _ in range(rng.choice((1, 1, 2))):
        layout = rng.choice(("<B", "<H", "<I"))
        offset = min(place + rng.randrange(HEADERS[signature]), len(data) - 4)
        number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.randrange(1 << 32)
        struct.pack_into(layout, data, offset, number & (1 << 8 * struct.calcsize(layout)) - 1)
    return bytes(data)


def _places(whole: bytes, signature: bytes) -> list[int]:
    found, place = [], whole.find(signature)
    while place >= 0:
        found.append(place)
        place = whole.find(signature, place + 1)
    return found


def names(whole: bytes, rng: random.Random) -> bytes:
    """Names of entries changed everywhere, or in one of the two places where they stand."""
    old = rng.choice((b"model/extra", b"metadata.json", b"model.json", b"weight_0", b"manifest.json", b"archive_format"))
    new = rng.choice(
        (b"../../../..", b"/etc/passwd", b"x" * 40, b"\\", b"\0" * 20, b"C:", b"model.json", b"weight_1", b"/" * 40)
    )
    new = new[: len(old)].ljust(len(old), b"y")
    return whole.replace(old, new, rng.choice((1, 1, 2, -1)))


def resealed(name: str) -> Callable[[dict[str, bytes], random.Random], dict[str, bytes]]:
    """A JSON entry changed in one to three places, with a manifest that agrees: what an attacker can write."""

    def change(entries: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
        tree = json.loads(entries[name])
        # most of a program beside its calls is not read
        calls = tree["graph_module"]["graph"]["nodes"] if name == PROGRAM and rng.random() < 0.8 else None
        for _ in range(rng.choice((1, 1, 1, 3))):
            if calls:
                mutated(calls, rng)
            else:
                tree = mutated(tree, rng)
        return {**entries, name: json.dumps(tree).encode()}

    return change


def mutated(tree: Any, rng: random.Random) -> Any:
    """A place somewhere in the tree replaced, removed, doubled, or put elsewhere."""
    holder: Any = None
    key: Any = None
    place = tree
    while isinstance(place, dict | list) and place and (holder is None or rng.random() < 0.93):
        holder = place
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        place = place[key]
    if holder is None:
        return json.loads(json.dumps(rng.choice(VALUES)))
    action = rng.random()
    if action < 0.6:
        holder[key] = json.loads(json.dumps(rng.choice(VALUES)))
    elif action < 0.75:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), json.loads(json.dumps(place)))
    else:
        holder[rng.choice(("as_int", "as_tensor", "name", "dtype", "shape", key))] = json.loads(json.dumps(place))
    return tree


def check_damaged(path: Path, facts: Any, contents: dict[str, bytes]) -> str:
    """A file whose manifest was not made for its damage: all as before, or an InputError that names the file."""
    try:
        found = verify(path)
        with open_archive(path) as archive:
            same = found == facts and {name: archive.read(name) for name in archive.records} == contents
    except InputError as error:
        if path.name not in str(error):
            raise AssertionError("no file is named") from error
        return "refused"
    if not same:
        raise AssertionError("it verifies, with other contents")
    return "harmless"


def check_resealed(path: Path, inputs: list[tuple[torch.Tensor, ...]]) -> str:
    """A file whose manifest is right, whatever it holds: everything that reads it gives values or an InputError."""
    outcome = "loads"
    for read in (
        lambda: read_metadata(path, verify(path)),
        lambda: inspect(path),
        lambda: read_source(path),
        lambda: run(path, inputs),
    ):
        try:
            read()
        except InputError:
            outcome = "refused"
    return outcome


def run(path: Path, inputs: list[tuple[torch.Tensor, ...]]) -> None:
    program = load_program(path)
    for one in inputs:
        program(*one)


def reseal(path: Path, entries: dict[str, bytes]) -> None:
    write_archive(path, ((name, data) for name, data in entries.items() if name != MANIFEST))
    seal(path)


BYTES = {"flips": flips, "truncation": truncation, "splice": splice, "header": header, "names": names}
TREES = {name.rpartition("/")[2]: resealed(name) for name in (METADATA, MODEL, SCRIPT, WEIGHTS_CONFIG, CONSTANTS_CONFIG)}
TREES |= {"program": resealed(PROGRAM)}
SHARES = {
    "flips": 25, "truncation": 10, "splice": 15, "header": 25, "names": 5, "metadata.json": 4, "model.json": 2,
    "model_def_script.json": 1, "model_weights_config.json": 3, "model_constants_config.json": 1, "program": 9,
}  # fmt: skip


def main(source: Path, folder: Path, seed: int, count: int) -> Counter[str]:
    """What became of each kind of damage."""
    whole, facts = source.read_bytes(), verify(source)
    with open_archive(source) as archive:
        contents = {name: archive.read(name) for name in archive.records}
    spec = LennardJones.argon().spec
    inputs = [to_inputs(graph, spec) for graph in check_graphs(spec)[:2]]
    check_resealed(source, inputs)  # what is imported on first use, is
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    rng, seen = random.Random(seed), Counter[str]()
    kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
    path = folder / "damaged.pte"
    for index in range(count):
        kind = kinds[index % len(kinds)]
        signal.alarm(HANGS)
        try:
            if kind in BYTES:
                path.write_bytes(BYTES[kind](whole, rng))
                outcome = check_damaged(path, facts, contents)
            else:
                reseal(path, TREES[kind](contents, rng))
                outcome = check_resealed(path, inputs)
        except BaseException:
            path.rename(folder / "found.pte")
            print(f"{kind}, file {index} of seed {seed}, kept as {folder / 'found.pte'}", file=sys.stderr)
            raise
        seen[f"{kind}: {outcome}"] += 1
    signal.alarm(0)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
