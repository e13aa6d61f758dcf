"""Random DPA-1 settings and systems for the live comparison with deepmd-kit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

System = tuple[np.ndarray, np.ndarray, np.ndarray | None]
ELEMENTS = ("H", "C", "N", "O", "Al", "Si", "Fe", "Cu", "Pb")
ACTIVATIONS = ("tanh", "gelu", "relu", "relu6", "softplus", "sigmoid", "silu", "silut:2.0", "linear")
CLOSEST = 0.9  # Å between any two atoms
GAP = 1e-3  # Å between any neighbour and the cutoff, see NEAR_CUTOFF in dpa1_reference.py
TIE = 1e-6  # Å


@dataclass(frozen=True)
class LiveCase:
    """One model with random weights, and systems to evaluate it on."""

    settings: dict[str, Any]
    """As scripts/deepmd_reference.py builds it."""
    seed: int
    """Of the weights."""
    systems: dict[str, System]
    inputs: dict[str, dict[str, np.ndarray]]
    """fparam (width,) and aparam (n, width) of each system that the model takes."""


def random_case(rng: np.random.Generator) -> LiveCase:
    """A model of one to five types with every option drawn at random, and six systems."""
    n_types = int(rng.integers(1, 6))
    settings = random_settings(rng, n_types)
    systems = random_systems(rng, n_types, settings["rcut"])
    widths = {"fparam": settings["fitting"]["numb_fparam"], "aparam": settings["fitting"]["numb_aparam"]}
    inputs = {
        name: {key: rng.normal(size=(width,) if key == "fparam" else (len(x), width)) for key, width in widths.items() if width}
        for name, (x, _, _) in systems.items()
    }
    return LiveCase(settings, int(rng.integers(1 << 30)), systems, inputs)


def random_settings(rng: np.random.Generator, n_types: int) -> dict[str, Any]:
    """Settings of a model; statistics from a periodic system in half of the cases."""
    rcut = float(rng.uniform(3.2, 5.0))
    v2 = coin(rng, 0.15)
    descriptor = random_descriptor(rng, n_types)
    if v2:
        del descriptor["tebd_input_mode"], descriptor["smooth_type_embedding"]
    pairs = [pair for pair in itertools.combinations_with_replacement(range(n_types), 2) if coin(rng, 0.15)]
    model: dict[str, Any] = {"pair_exclude_types": pairs}
    if n_types > 1 and coin(rng, 0.2):
        model["atom_exclude_types"] = [int(rng.integers(n_types))]
    return {
        "rcut": rcut,
        "rcut_smth": float(rng.uniform(0.2, 0.8 * rcut)),
        # binding in a third of the cases
        "sel": int(rng.integers(4, 12)) if coin(rng, 0.33) else [int(n) for n in rng.integers(60, 80, size=2)],
        "type_map": [str(name) for name in rng.permutation(ELEMENTS)[:n_types]],
        "kind": "se_atten_v2" if v2 else "dpa1",
        "descriptor": descriptor,
        "fitting": random_fitting(rng),
        "model": model,
        "statistics": ["crystal", "tiny"] if coin(rng, 0.5) else [],
        "gain": 1.0,
    }


def random_descriptor(rng: np.random.Generator, n_types: int) -> dict[str, Any]:
    """Options of `se_atten`."""
    first, last = int(rng.integers(3, 10)), int(rng.integers(6, 14))
    neuron = [first, 2 * first, last] if coin(rng) else [first, first, 2 * first]
    pairs = list(itertools.combinations_with_replacement(range(n_types), 2))
    normalize = coin(rng, 0.7)
    # without normalisation logits grow with the square of the embedding, and a softmax of large logits multiplies rounding
    temperature = float(rng.uniform(0.2, 1.5)) if normalize else float(rng.uniform(0.01, 0.05))
    return {
        "neuron": neuron,
        "axis_neuron": int(rng.integers(1, neuron[-1] + 1)),
        "tebd_dim": int(rng.choice([2, 3, n_types, 2 * n_types])),
        "tebd_input_mode": "strip" if coin(rng) else "concat",
        "resnet_dt": coin(rng),
        "type_one_side": coin(rng),
        "attn": int(rng.integers(3, 12)),
        "attn_layer": int(rng.integers(0, 4)),
        "attn_dotr": coin(rng, 0.7),
        "exclude_types": [pair for pair in pairs if coin(rng, 0.15)],
        "env_protection": float(rng.choice([0.0, 0.0, 0.1])),
        "set_davg_zero": coin(rng),
        "activation_function": str(rng.choice(ACTIVATIONS)),
        "scaling_factor": float(rng.uniform(0.5, 2.0)),
        "normalize": normalize,
        "temperature": None if normalize and coin(rng, 0.7) else temperature,
        "ln_eps": float(rng.choice([1e-5, 1e-3])),
        "smooth_type_embedding": coin(rng),
        "concat_output_tebd": coin(rng),
        "use_econf_tebd": coin(rng, 0.3),
        "use_tebd_bias": coin(rng),
        "lmax": int(rng.choice([1, 1, 2, 3, 4])),
    }


def random_fitting(rng: np.random.Generator) -> dict[str, Any]:
    """Options of the fitting net."""
    numb_fparam = int(rng.choice([0, 0, 1, 3]))
    return {
        "neuron": [int(n) for n in rng.choice([4, 8], size=rng.integers(1, 4))],
        "resnet_dt": coin(rng),
        "activation_function": str(rng.choice(ACTIVATIONS)),
        "numb_fparam": numb_fparam,
        "numb_aparam": int(rng.choice([0, 0, 2])),
        "dim_case_embd": int(rng.choice([0, 0, 2])),
    }


def random_systems(rng: np.random.Generator, n_types: int, cutoff: float) -> dict[str, System]:
    """Tilted crystal, unwrapped atoms, a cell far smaller than the cutoff, clusters, a lone atom and a lone atom in a cell."""

    def drawn(n_atoms: int, edge: float, periodic: bool, spread: float = 0.0) -> System:
        for _ in range(2000):
            cell = edge * (np.eye(3) + rng.uniform(-0.15, 0.15, size=(3, 3)))
            x = rng.uniform(0, 1, size=(n_atoms, 3)) @ cell
            if n_atoms > 8:
                places = np.array(list(itertools.product(range(3), repeat=3)))[:n_atoms] / 3
                x = (places + rng.uniform(-0.06, 0.06, size=places.shape)) @ cell
            system = (
                x + rng.normal(size=3) * spread,
                rng.integers(0, n_types, size=n_atoms),
                cell if periodic else None,
            )
            distances = np.concatenate(image_distances(system))
            if distances.min(initial=np.inf) > CLOSEST and np.abs(distances - cutoff).min(initial=np.inf) > GAP:
                return system
        raise AssertionError(f"no system of {n_atoms} atoms with clear distances")

    return {
        "crystal": drawn(18, 6.5, periodic=True),
        "unwrapped": drawn(5, 4.5, periodic=True, spread=40.0),
        "tiny": drawn(2, 2.8, periodic=True),
        "cluster": drawn(12, 7.0, periodic=False),
        "alone": drawn(1, 3.0, periodic=False),
        "alone_periodic": drawn(1, 2.6, periodic=True),
    }


def image_distances(system: System) -> list[np.ndarray]:
    """Sorted distances of each atom to the images of all atoms, but itself."""
    x, _, cell = system
    shifts = np.zeros((1, 3))
    if cell is not None:
        x = np.remainder(x @ np.linalg.inv(cell), 1.0) @ cell
        shifts = np.array(list(itertools.product(range(-4, 5), repeat=3))) @ cell
    found = [np.sort(np.linalg.norm((x[:, None] - one + shifts).reshape(-1, 3), axis=1)) for one in x]
    return [distances[distances > 1e-9] for distances in found]


def is_cut_between_equals(system: System, sel: int, cutoff: float) -> bool:
    """Whether a padded list of `sel` slots leaves out one of two equally distant neighbours.

    Images at opposite shifts are equally far: which of them DeePMD keeps, last bits decide.
    """
    inside = [distances[distances <= cutoff] for distances in image_distances(system)]
    return any(len(one) > sel and one[sel] - one[sel - 1] < TIE for one in inside)


def coin(rng: np.random.Generator, probability: float = 0.5) -> bool:
    """True with `probability`."""
    return bool(rng.random() < probability)
