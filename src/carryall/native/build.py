"""The shared library: compiled once for this processor and compiler, then loaded from the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from carryall.cache_folder import cache_folder

ABI = 1
"""What the functions take; raised together with `carryall_abi` in common.h."""
COMPILERS = ("c++", "g++", "clang++")
# no contraction: a fused multiply-add would round otherwise than torch and numpy do
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
)
SECONDS = 300
"""After which a compiler is given up."""

_ADDRESS, _WHOLE, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_CALL = [_ADDRESS, _WHOLE, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _WHOLE]
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "carryall_normal_vectors": (None, [ctypes.c_uint64, ctypes.c_uint32, _WHOLE, *[_ADDRESS] * 4]),
    "carryall_lists_new": (_ADDRESS, [_REAL, _REAL, _REAL]),
    "carryall_lists_free": (None, [_ADDRESS]),
    "carryall_lists_searches": (_WHOLE, [_ADDRESS]),
    "carryall_lists_kept": (_WHOLE, [_ADDRESS]),
    "carryall_lists_update": (_WHOLE, [*_CALL, _ADDRESS]),
    "carryall_lists_edges": (_WHOLE, [_ADDRESS, _WHOLE, *[_ADDRESS] * 7]),
    "carryall_lists_failures": (None, [_ADDRESS, _ADDRESS, _ADDRESS]),
    "carryall_halo_search": (_WHOLE, [_ADDRESS, _WHOLE, _WHOLE, _REAL, _WHOLE, _ADDRESS, _ADDRESS]),
    "carryall_halo_edges": (_WHOLE, [_ADDRESS, _WHOLE, _ADDRESS, _ADDRESS, _REAL, *[_ADDRESS] * 4]),
    "carryall_lammps_edges": (_WHOLE, [_ADDRESS, _ADDRESS, *[_WHOLE] * 4, _ADDRESS, _REAL, _WHOLE, *[_ADDRESS] * 3]),
    "carryall_lammps_atoms": (_WHOLE, [_WHOLE, *[_ADDRESS] * 3, _WHOLE, _REAL, *[_ADDRESS] * 3]),
    "carryall_lammps_sums": (None, [*[_WHOLE] * 3, *[_ADDRESS] * 3]),
    "carryall_lammps_forces": (_WHOLE, [_WHOLE, _WHOLE, *[_ADDRESS] * 3, _REAL, _ADDRESS]),
    "carryall_lammps_callback": (None, [_ADDRESS, _WHOLE, ctypes.c_int, *[_ADDRESS] * 3]),
    "carryall_lennard_jones": (_WHOLE, [*_CALL, _ADDRESS, _WHOLE, _ADDRESS, _WHOLE, _REAL, *[_ADDRESS] * 4]),
}
"""Result and arguments of each function; addresses go as integers."""

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The library with its signatures declared, compiled first where need be; None where this machine cannot have it.

    `CARRYALL_NATIVE=0` switches it off, `CXX` names the compiler. The answer holds as long as the process.
    """
    if os.environ.get("CARRYALL_NATIVE") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        return load(built(compiler))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("native code is not used, torch does its work more slowly: %s", error)
        return None


def find_compiler() -> str | None:
    """`$CXX` or the first known C++ compiler on the path."""
    names = [name for name in (os.environ.get("CXX"), *COMPILERS) if name]
    return next((path for path in map(shutil.which, names) if path), None)


def sources() -> list[Path]:
    """C++ files and their headers."""
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def processor() -> str:
    """The kind of processor and its instructions, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return "\n".join([platform.machine(), platform.processor(), *(first[name] for name in sorted(first))])


def built(compiler: str) -> Path:
    """The library's file; compiled now where the cache has none for these sources, flags, compiler and processor."""
    version = run([compiler, "--version"]).stdout
    digest = hashlib.sha256("\0".join([platform.system(), *FLAGS, compiler, version, processor()]).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = cache_folder() / "native"
    target = folder / f"carryall-{digest.hexdigest()[:24]}.so"
    if is_whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock"), timeout=SECONDS):
        if not is_whole(target):
            compile_into(compiler, target)
    return target


def is_whole(path: Path) -> bool:
    """Whether a library is there that loads and speaks this ABI."""
    if not path.exists():
        return False
    try:
        load(path)
    except (OSError, RuntimeError):
        return False
    return True


def compile_into(compiler: str, target: Path) -> None:
    """Compile to `target`, which appears whole or not at all; RuntimeError with the compiler's first words."""
    logger.info("compiling native code with %s, once, into %s", compiler, target)
    code = [str(path) for path in sources() if path.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        new = Path(folder) / target.name
        done = run([compiler, *FLAGS, *code, "-o", str(new)])
        if done.returncode:  # not every compiler knows this processor
            done = run([compiler, *(flag for flag in FLAGS if flag != "-march=native"), *code, "-o", str(new)])
        if done.returncode:
            words = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
            raise RuntimeError(f"{compiler} failed: {words.strip()}")
        load(new)
        new.replace(target)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command, its words kept."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)


def load(path: Path) -> ctypes.CDLL:
    """The library in that file; OSError where it is none, RuntimeError where it is of another ABI."""
    found = ctypes.CDLL(str(path))
    try:
        version = found.carryall_abi()
        declare(found)
    except AttributeError as error:
        raise RuntimeError(f"{path}: {error}") from None
    if version != ABI:
        raise RuntimeError(f"{path} has ABI {version}, expected {ABI}")
    return found


def declare(found: ctypes.CDLL) -> None:
    """Argument and result types of every function."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
