"""From an exported program to machine code by AOTInductor: for a level of CPUs and any number of threads."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from filelock import FileLock
from torch.export import ExportedProgram

from carryall.errors import MissingDependencyError
from carryall.package.cpu import LEVELS

# inductor follows the caller's thread count instead of baking in this machine's
INDUCTOR_OPTIONS = {"cpp.dynamic_threads": True}


def compile_program(program: ExportedProgram, path: Path, level: str) -> None:
    """Compile to `path`, for CPUs of a level and above; one process at a time: all write the same files of torch's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    require_compiler()
    folder = Path(cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "carryall.lock"), deterministic_sums(), code_for(level):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=INDUCTOR_OPTIONS)


@contextlib.contextmanager
def deterministic_sums() -> Iterator[None]:
    """Sums over edges in one order: compiled for a CPU they would be atomic, and last bits would differ from call to call."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextlib.contextmanager
def code_for(level: str) -> Iterator[None]:
    """Inductor's vectors and the compiler's instructions of that level, where they would be those of this very machine."""
    if level not in LEVELS:
        yield
        return
    from torch._inductor import cpp_builder, cpu_vec_isa

    wide, wider = cpu_vec_isa.VecAVX2(), cpu_vec_isa.VecAVX512()
    vectors: dict[str, list[Any]] = {LEVELS[0]: [], LEVELS[1]: [wide], LEVELS[2]: [wider, wide]}
    # an instruction set is false where a test program of it does not run, which takes seconds to find out
    usable = list(itertools.islice((isa for isa in vectors[level] if isa), 1))
    flags_of = cpp_builder._get_optimization_cflags

    def flags(*arguments: Any, **options: Any) -> tuple[list[str], list[str]]:
        found, linker = flags_of(*arguments, **options)
        return [f"march={level}" if flag == "march=native" else flag for flag in found], linker

    with (
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", return_value=usable),
        mock.patch.object(cpp_builder, "_get_optimization_cflags", flags),
    ):
        yield


def require_compiler() -> str:
    """The C++ compiler; MissingDependencyError names what to install."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise MissingDependencyError(
        "no C++ compiler found, which compiling a .pt2 needs: install one (Debian and Ubuntu: apt install g++; "
        "macOS: xcode-select --install) or write a .pte, which needs none"
    )


def compiler_version() -> str:
    """Name and version of the C++ compiler, as it says them itself."""
    done = subprocess.run([require_compiler(), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"
