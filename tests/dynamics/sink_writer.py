"""A process that writes to a sink until it is killed; run as a program of its own."""

import os
import sys

import numpy as np
import torch

from carryall.data import AtomicData, Batch
from carryall.dynamics.sinks import ExtXYZSink, HDF5Sink

KINDS = {"h5": HDF5Sink, "extxyz": ExtXYZSink}


def structure(index, extra):
    """The structure of a number, the same in every process; `extra` gives it a key more."""
    rng = np.random.default_rng(index)
    n = int(rng.integers(1, 40))
    return AtomicData(
        rng.normal(size=(n, 3)),
        rng.integers(1, 90, n),
        rng.normal(size=(3, 3)),
        forces=rng.normal(size=(n, 3)),
        energy=float(rng.normal()),
        info={"name": f"system {index}", "text": "x" * int(rng.integers(0, 300))},
        atom_extras={"tag": rng.integers(0, 9, n)},
        system_extras={"system_id": index, **({"extra": rng.normal(size=3)} if extra else {})},
    )


def batch_from(first):
    """Write number w holds the systems from `first` on; how many, and with which keys, follows from `first`."""
    rng = np.random.default_rng(10**6 + first)
    count = int(rng.integers(1, 6))
    return Batch.from_data_list([structure(i, first % 7 == 3) for i in range(first, first + count)])


def write_until_killed(kind, path):
    """Go on where the file ends, and tell how many systems are safe at the start and after each write."""
    sink = KINDS[kind](path)
    while True:
        os.write(1, f"{os.getpid()} {len(sink)}\n".encode())
        sink.write(batch_from(len(sink)))


def main():
    """For each line `kind path` of the input a writer, forked from here, since importing takes longer than what is tested."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            write_until_killed(*line.split())
        os.waitpid(pid, 0)
        os.write(1, b"gone\n")


if __name__ == "__main__":
    main()
