"""Stands for an engine on ranks: `MODE RANKS RIGHT.npz MODEL STRUCTURES.extxyz OUT.npz`."""

import ctypes
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    mode, ranks, right, model, structures, out = sys.argv[1:]
    assert Path(model).is_file()
    assert Path(structures).is_file()
    with np.load(right) as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    if mode == "wrong":
        arrays["forces"][3, 1] += 1e-6
    if mode == "nan":
        arrays["energy"][0] = np.nan
    if mode == "other shapes":
        arrays["forces"] = arrays["forces"][:2]
    if mode == "lonely":
        arrays["ranks"] = np.array(1)
    if mode == "raises":
        raise RuntimeError("no such neighbour")
    if mode == "aborts":
        print("Fatal: something else\ncarryall: rank 1 of 2: forces of atom 7 are nan", file=sys.stderr)
        sys.exit(1)
    if mode == "crashes":
        ctypes.string_at(0)
    if mode == "hangs":
        time.sleep(60)
    if mode != "writes nothing":
        arrays.setdefault("ranks", np.array(int(ranks)))
        np.savez(out, **arrays)


main()
