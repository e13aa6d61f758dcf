"""Many argon structures of mixed sizes, and a look into a ledger from outside."""

import sqlite3

import numpy as np

from carryall.data import AtomicData


def argon_structures(count, seed=0, largest=40):
    """Clusters and rattled crystals of 2 to `largest` atoms, in no order of size."""
    rng = np.random.default_rng(seed)
    return [crystal(rng) if i % 3 == 0 else blob(rng, int(rng.integers(2, largest + 1))) for i in range(count)]


def crystal(rng):
    repeat, edge = int(rng.integers(1, 3)), 5.0 + 0.5 * rng.random()
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    corners = np.stack(np.meshgrid(*[np.arange(repeat)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    sites = ((corners + basis) * edge).reshape(-1, 3)
    return AtomicData(sites + rng.normal(0, 0.15, sites.shape), [18] * len(sites), np.eye(3) * edge * repeat)


def blob(rng, n_atoms):
    side = int(np.ceil(n_atoms ** (1 / 3)))
    sites = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:n_atoms] * 3.7
    return AtomicData(sites + rng.normal(0, 0.15, sites.shape), [18] * n_atoms)


def ledger_rows(folder, table="systems"):
    """All rows of a table of a ledger, in order, as they are on disk."""
    database = sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)
    try:
        return database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
    finally:
        database.close()


def n_done(folder):
    """Results in a ledger that another process is writing; 0 before there is one."""
    try:
        database = sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)
    except sqlite3.OperationalError:
        return 0
    try:
        return database.execute("SELECT count(*) FROM systems").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        database.close()
