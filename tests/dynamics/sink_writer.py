"""A process that writes to a sink until it is killed; apart, so that a new process can import it."""

import itertools
import os

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


def write_until_killed(kind, path, pipe):
    """Go on where the file ends, and tell how many systems are safe after each write."""
    torch.set_num_threads(1)
    sink = KINDS[kind](path)
    pipe.send((os.getpid(), len(sink)))
    for _ in itertools.count():
        sink.write(batch_from(len(sink)))
        pipe.send((os.getpid(), len(sink)))
