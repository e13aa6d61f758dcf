"""Which instructions compiled code may use: the levels of the x86-64 psABI, so that a file runs on more than one CPU."""

from __future__ import annotations

import platform

import torch

from carryall.errors import InputError

LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
"""Ascending: SSE4.2, AVX2 with FMA, AVX-512 (F, BW, CD, DQ, VL)."""
NATIVE = "native"  # on other machines than x86-64: what the compiler makes of this one
LEVEL_OF_CAPABILITY = {"DEFAULT": LEVELS[0], "NO AVX": LEVELS[0], "AVX2": LEVELS[1], "AVX512": LEVELS[2]}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """The instruction set of this machine, such as x86_64 or aarch64."""
    name = platform.machine().lower()
    return MACHINES.get(name, name)


def cpu_level() -> str:
    """The highest level that this CPU has."""
    return LEVEL_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), LEVELS[0]) if machine() == "x86_64" else NATIVE


def checked_level(level: str | None) -> str:
    """`level`, or this CPU's when None; InputError for one that this CPU lacks, since a file is run before it is kept."""
    here = cpu_level()
    if level is None or level == here:
        return here
    if here == NATIVE or level not in LEVELS:
        known = NATIVE if here == NATIVE else ", ".join(LEVELS)
        raise InputError(f"cpu level {level!r} cannot be compiled for here: expected one of {known}")
    if misfit := level_misfit(level, "x86_64"):
        raise InputError(f"cpu level {level!r}: {misfit}, and a file is run before it is kept; choose {here} or lower")
    return level


def level_misfit(level: str, made_for: str) -> str | None:
    """Why code of that level, made for that kind of machine, does not run here; None when it does."""
    if made_for != machine():
        return f"it is for {made_for} and this machine is {machine()}"
    here = cpu_level()
    if level in LEVELS and here in LEVELS and LEVELS.index(level) > LEVELS.index(here):
        return f"it needs a CPU of level {level} and this one has {here}"
    return None


def level_of_isa(isa: str) -> str:
    """The level that covers a list of vector instructions, as files of format version 1 have it."""
    return LEVELS[2] if "avx512" in isa else LEVELS[1] if "avx2" in isa else LEVELS[0]
