"""The models and systems of tests/reference_data/dpa1: tables that scripts/make_dpa1_reference.py runs over.

`MODELS` holds, for each model, what differs from BASE: options of the descriptor, of the fitting net and of the model by
DeePMD's names; `statistics` names systems that davg and dstd are taken from; `systems` is the group that it is evaluated on;
`inputs` are the widths of the fparam and aparam that each system gets; `routes` are those that deepmd-kit has for it; `gain`
multiplies the weights of the nets, so that relu6 meets its upper bend, and softplus the 20 from which torch takes it as linear.
"""

from __future__ import annotations

from typing import Any

import numpy as np

System = tuple[np.ndarray, np.ndarray, np.ndarray | None]

BASE: dict[str, Any] = {
    "rcut": 4.5,
    "rcut_smth": 0.5,
    "sel": 90,
    "type_map": ("O", "H"),
    "kind": "dpa1",
    "descriptor": {},
    "fitting": {},
    "model": {},
    "statistics": (),
    "systems": "small",
    "inputs": {},
    "routes": ("dense", "graph"),
    "gain": 1.0,
}
SMALL = {"neuron": [4, 8, 16], "axis_neuron": 4, "tebd_dim": 4, "attn": 8}
MEDIUM = {"neuron": [8, 16, 32], "axis_neuron": 4, "tebd_dim": 4, "attn": 16}
FOUR = ("O", "H", "Cu", "C")
EIGHT = ("O", "H", "Cu", "C", "N", "Si", "Al", "Fe")
GROUPS = {
    "all": (
        "cu64", "cu64_tri", "cu64_wrapped_out", "water192", "cluster24_nopbc", "two_nopbc", "two_far_nopbc", "two_pbc",
        "one_nopbc", "one_pbc",
    ),
    "nine": (
        "cu64_tri", "cu64_wrapped_out", "water24", "cluster24_nopbc", "two_nopbc", "two_far_nopbc", "two_pbc", "one_nopbc",
        "one_pbc",
    ),
    "small": ("cu32_tri", "water24", "cluster24_nopbc", "two_pbc"),
    "four": ("alloy32_four", "water24", "two_pbc", "one_pbc"),
    "eight": ("alloy32_eight", "water24", "two_pbc", "one_pbc"),
}  # fmt: skip
STATISTICS = {"all": ("cu64", "water192"), "small": ("cu32_tri", "water24"), "four": ("alloy32_four",)}
ACTIVATIONS = ("gelu", "gelu_tf", "relu", "relu6", "softplus", "sigmoid", "silu", "silut", "custom_silu:1.5", "linear", "none")


def settings_of(
    descriptor: dict[str, Any], *, widths: dict[str, Any] = SMALL, statistics: str = "small", **changes: Any
) -> dict[str, Any]:
    """BASE with changes; widths of the nets are small unless they are given."""
    fitting = {"neuron": [8, 8, 8], **changes.pop("fitting", {})}
    chosen = {"descriptor": {**widths, **descriptor}, "fitting": fitting, "statistics": STATISTICS.get(statistics, ())}
    return {**BASE, **chosen, **changes}


def original(descriptor: dict[str, Any], *, statistics: bool = False, **changes: Any) -> dict[str, Any]:
    """One of the models that are evaluated on every kind of system."""
    fitting = {"neuron": [16, 16, 16], **changes.pop("fitting", {})}
    source = "all" if statistics else "none"
    return settings_of(descriptor, widths=MEDIUM, statistics=source, fitting=fitting, **{"systems": "nine", **changes})


ROUGH = {"smooth_type_embedding": False}
ZERO = {"set_davg_zero": True}
ORIGINALS: dict[str, dict[str, Any]] = {
    "a0": original({"attn_layer": 0}),
    "a2_smooth": original({}),
    "a2_nonsmooth": original(ROUGH),
    "a0_stat": original({"attn_layer": 0}, statistics=True, systems="all"),
    "a0_statzero": original({"attn_layer": 0, **ZERO}, statistics=True),
    "a2_smooth_statzero": original(ZERO, statistics=True, systems="all"),
    "a2_nonsmooth_statzero": original({**ROUGH, **ZERO}, statistics=True),
    "a2_nonsmooth_stat": original(ROUGH, statistics=True, systems="all"),
    "a2_options": original(
        {
            **ROUGH, "type_one_side": True, "attn_dotr": False, "normalize": False, "temperature": 0.7, "resnet_dt": True,
            "concat_output_tebd": False, "use_tebd_bias": True, "trainable_ln": False, "ln_eps": 1e-3, "env_protection": 0.01,
            "activation_function": "gelu", "tebd_dim": 5,
        },
        fitting={"resnet_dt": False, "activation_function": "silu", "neuron": [16, 32, 32]},
        systems="all",
    ),
    "a2_scale": original({**ROUGH, "scaling_factor": 2.5}),
    "a0_strip": original({"attn_layer": 0, "tebd_input_mode": "strip"}),
    "a2_strip_nonsmooth": original({**ROUGH, "tebd_input_mode": "strip"}),
    "a2_excl": original({**ROUGH, "exclude_types": [(0, 1)]}),
    "a0_pairexcl": original({"attn_layer": 0}, model={"pair_exclude_types": [(1, 1)]}),
    "a0_atomexcl": original({"attn_layer": 0}, model={"atom_exclude_types": [1]}),
    "a0_ntypes4_tebd8": original({"attn_layer": 0, "tebd_dim": 8}, type_map=FOUR),
    "a0_ntypes8_tebd8": original({"attn_layer": 0, "tebd_dim": 8}, type_map=EIGHT),
    "a0_bindingsel": original({"attn_layer": 0}, sel=12),
    # the constructors' own defaults: 120 neighbours within 6 Å, nets of 25, 50, 100 and 120, 120, 120
    "a2_default": {**BASE, "rcut": 6.0, "sel": 120, "systems": "nine"},
}  # fmt: skip

# With the statistics' scale of the rows, forces are of physical size; davg is zero where nothing else is said.
FLAGS: dict[str, dict[str, Any]] = {
    "one_layer": settings_of({**ZERO, "attn_layer": 1}),
    "two_layers": settings_of(ZERO),
    "three_layers": settings_of({**ZERO, "attn_layer": 3}),
    "three_layers_rough": settings_of({**ROUGH, **ZERO, "attn_layer": 3}),
    "one_side": settings_of({**ZERO, "type_one_side": True}),
    "no_dotr": settings_of({**ROUGH, **ZERO, "attn_dotr": False}),
    "no_dotr_smooth": settings_of({**ZERO, "attn_dotr": False}),
    "no_normalize": settings_of({**ROUGH, **ZERO, "normalize": False}),
    "no_normalize_smooth": settings_of({**ZERO, "normalize": False}),
    "temperature": settings_of({**ZERO, "temperature": 0.7}),
    "scaling_factor": settings_of({**ZERO, "scaling_factor": 2.5}),
    "resnet_dt": settings_of({**ZERO, "resnet_dt": True}, fitting={"resnet_dt": False}),
    "first_residual": settings_of({**ZERO, "neuron": [9, 18, 18], "resnet_dt": True}),
    "tebd_bias": settings_of({**ZERO, "use_tebd_bias": True}),
    "econf": settings_of({**ZERO, "use_econf_tebd": True}),
    "econf_bias": settings_of({**ZERO, "use_econf_tebd": True, "use_tebd_bias": True}),
    "econf_four": settings_of({"use_econf_tebd": True, **ZERO}, type_map=FOUR, statistics="four", systems="four"),
    "ln_eps": settings_of({**ZERO, "ln_eps": 1e-3, "trainable_ln": False}),
    "env_protection": settings_of({**ZERO, "env_protection": 0.2}),
    "no_output_tebd": settings_of({**ZERO, "concat_output_tebd": False}),
    "rcut_smth": settings_of(ZERO, rcut_smth=3.0),
    "strip_smooth": settings_of({**ZERO, "tebd_input_mode": "strip"}),
    "strip_a0_rough": settings_of({**ROUGH, **ZERO, "attn_layer": 0, "tebd_input_mode": "strip"}),
    "strip_one_side": settings_of({**ZERO, "tebd_input_mode": "strip", "type_one_side": True}),
    "exclude_types": settings_of({**ZERO, "exclude_types": [(0, 1)]}),
    "exclude_types_both": settings_of({**ZERO, "exclude_types": [(0, 0), (1, 1)]}, model={"atom_exclude_types": [0]}),
    "pair_exclude_types": settings_of(ZERO, model={"pair_exclude_types": [(0, 1)]}),
    "atom_exclude_types": settings_of(ZERO, model={"atom_exclude_types": [0]}),
    "fitting_widths": settings_of(ZERO, fitting={"neuron": [8, 16, 5]}),
    "fitting_per_type": settings_of(ZERO, fitting={"mixed_types": False}),
    "atom_ener": settings_of(ZERO, fitting={"atom_ener": [-1.5, 0.25]}),
    "fparam": settings_of(ZERO, fitting={"numb_fparam": 2}, inputs={"fparam": 2}),
    "aparam": settings_of(ZERO, fitting={"numb_aparam": 3}, inputs={"aparam": 3}),
    "fparam_aparam": settings_of(
        {**ZERO, "attn_layer": 0}, fitting={"numb_fparam": 1, "numb_aparam": 2}, inputs={"fparam": 1, "aparam": 2}
    ),
    "default_fparam": settings_of(ZERO, fitting={"numb_fparam": 2, "default_fparam": [0.3, -1.2]}),
    "aparam_as_mask": settings_of(ZERO, fitting={"numb_aparam": 1, "use_aparam_as_mask": True}, inputs={"aparam": 1}),
    "case_embd": settings_of(ZERO, fitting={"dim_case_embd": 3}),
    "case_fparam": settings_of(ZERO, fitting={"dim_case_embd": 2, "numb_fparam": 2}, inputs={"fparam": 2}),
    "float32": settings_of({**ZERO, "precision": "float32"}, fitting={"precision": "float32"}),
    # deepmd.pt_expt stops at a descriptor of float32 before a fitting net of float64; without smooth attention, float32 cannot
    # resolve the angular gate near the cutoff
    "float32_descriptor": settings_of({**ZERO, "precision": "float32"}, routes=("dense",)),
    "float32_fitting": settings_of(ZERO, fitting={"precision": "float32"}),
    "float32_strip": settings_of(
        {**ZERO, "attn_layer": 0, "tebd_input_mode": "strip", "precision": "float32"}, fitting={"precision": "float32"}
    ),
    "lmax2": settings_of({**ZERO, "lmax": 2}),
    "lmax4_strip": settings_of({**ZERO, "lmax": 4, "attn_layer": 0, "tebd_input_mode": "strip", "env_protection": 0.05}),
    "lmax3_excl": settings_of({**ROUGH, **ZERO, "lmax": 3, "exclude_types": [(0, 1)]}),
    "v2": settings_of(ZERO, kind="se_atten_v2"),
    "v2_one_side": settings_of({**ZERO, "type_one_side": True, "attn_layer": 0}, kind="se_atten_v2"),
    "davg_smooth": settings_of({}),
    "davg_one_side": settings_of({**ROUGH, "type_one_side": True}),
    "davg_strip": settings_of({"tebd_input_mode": "strip"}),
    "davg_strip_rough": settings_of({**ROUGH, "tebd_input_mode": "strip"}),
    "davg_excl": settings_of({"exclude_types": [(0, 1)]}),
    "davg_pairexcl": settings_of(ROUGH, model={"pair_exclude_types": [(0, 1)]}),
    "davg_lmax": settings_of({"lmax": 2}),
    "davg_v2": settings_of({}, kind="se_atten_v2"),
    "davg_four": settings_of({}, type_map=FOUR, statistics="four", systems="four"),
    "sel12_smooth": settings_of(ZERO, sel=12),
    "sel12_rough": settings_of({**ROUGH, **ZERO}, sel=12),
    "sel12_davg": settings_of({}, sel=12),
    "sel12_excl": settings_of({**ZERO, "exclude_types": [(0, 1)]}, sel=12),
    "sel12_pairexcl": settings_of(ZERO, sel=12, model={"pair_exclude_types": [(0, 1)]}),
    "sel_list": settings_of({**ROUGH, **ZERO}, sel=[20, 25]),
    "four_types": settings_of(ZERO, type_map=FOUR, statistics="four", systems="four"),
    "four_types_strip": settings_of(
        {**ZERO, "tebd_input_mode": "strip"}, type_map=FOUR, statistics="four", systems="four"
    ),
    "four_types_tebd8": settings_of({**ZERO, "tebd_dim": 8}, type_map=FOUR, statistics="four", systems="four"),
    "eight_types": settings_of({}, type_map=EIGHT, statistics="none", systems="eight"),
    "eight_types_tebd8": settings_of({"tebd_dim": 8, **ROUGH}, type_map=EIGHT, statistics="none", systems="eight"),
    **{
        f"act_{name.replace(':', '_')}": settings_of(
            {**ZERO, "attn_layer": 1, "activation_function": name},
            fitting={"activation_function": name},
            gain={"relu6": 6.0, "softplus": 6.0}.get(name, 1.0),
        )
        for name in ACTIVATIONS
    },
}  # fmt: skip
MODELS = {**ORIGINALS, **FLAGS}


def fcc(nx: int, ny: int, nz: int, a: float = 3.6, jitter: float = 0.12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A jittered crystal and its box."""
    rng = np.random.default_rng(seed)
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.array([[i, j, k] for i in range(nx) for j in range(ny) for k in range(nz)])
    x = ((corners[:, None] + basis[None]).reshape(-1, 3)) * a
    return x + rng.normal(size=x.shape) * jitter, np.diag([nx * a, ny * a, nz * a]).astype(float)


def water(n_side: int = 4, length: float = 12.42, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Randomly turned molecules on a grid of `n_side` along each axis; types O, H, H."""
    rng = np.random.default_rng(seed)
    side = range(n_side)
    grid = np.array([[i, j, k] for i in side for j in side for k in side]) * (length / n_side)
    hydrogens = np.array([[0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
    positions: list[np.ndarray] = []
    types: list[int] = []
    for site in grid:
        q = rng.normal(size=4)
        w, x, y, z = q / np.linalg.norm(q)
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        oxygen = site + rng.normal(size=3) * 0.2
        positions += [oxygen, oxygen + hydrogens[0] @ rotation.T, oxygen + hydrogens[1] @ rotation.T]
        types += [0, 1, 1]
    return np.array(positions), np.eye(3) * length, np.array(types)


def make_systems() -> dict[str, System]:
    """Periodic, tilted, unwrapped, open, tiny and single-atom cases."""
    x, box = fcc(4, 2, 2)
    types = np.arange(64) % 2
    tilted = np.array([[14.4, 0, 0], [1.1, 7.2, 0], [-0.7, 0.9, 7.2]])
    xw, bw, tw = water()
    small, small_box = fcc(2, 2, 2, seed=1)
    small_tilted = np.array([[7.2, 0, 0], [0.9, 7.2, 0], [-0.7, 1.1, 7.2]])
    small = (small @ np.linalg.inv(small_box)) @ small_tilted
    xs, bs, ts = water(2, 6.21, seed=2)
    mixed = np.random.default_rng(11).permutation(32)
    pair_cell = np.array([[4.1, 0, 0], [0.3, 3.9, 0], [-0.2, 0.5, 4.4]])
    one_cell = np.array([[3.1, 0, 0], [0.2, 3.3, 0], [0.1, -0.3, 3.2]])
    one = np.array([[0.3, -0.2, 0.9]])
    return {
        "cu64": (x, types, box),
        "cu64_tri": ((x @ np.linalg.inv(box)) @ tilted, types, tilted),
        "cu64_wrapped_out": (x + np.array([100.0, -57.3, 3.3]), types, box),
        "water192": (xw, tw, bw),
        "cluster24_nopbc": (xw[:24] - xw[:24].mean(0), tw[:24], None),
        "two_nopbc": (np.array([[0.0, 0, 0], [1.1, 0.7, -0.4]]), np.array([0, 1]), None),
        "two_far_nopbc": (np.array([[0.0, 0, 0], [50.0, 0, 0]]), np.array([0, 1]), None),
        "two_pbc": (np.array([[0.1, 0.2, 0.3], [1.9, 1.4, 2.2]]), np.array([1, 0]), pair_cell),
        "one_nopbc": (one, np.array([0]), None),
        "one_pbc": (one, np.array([1]), one_cell),
        "cu32_tri": (small, np.arange(32) % 2, small_tilted),
        "water24": (xs, ts, bs),
        "alloy32_four": (small, mixed % 4, small_tilted),
        "alloy32_eight": (small, mixed % 8, small_tilted),
    }


def make_inputs(widths: dict[str, int], systems: dict[str, System]) -> dict[str, dict[str, np.ndarray]]:
    """Random fparam (width,) and aparam (n, width) of each system."""
    rng = np.random.default_rng(7)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, (x, _, _) in systems.items():
        shapes = {key: (width,) if key == "fparam" else (len(x), width) for key, width in widths.items()}
        found[name] = {key: rng.normal(size=shape) for key, shape in shapes.items()}
    return found
