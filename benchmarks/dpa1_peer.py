"""deepmd-kit's half of benchmarks/dpa1.py, run by the Python of deepmd-kit 3.2 in a fresh process; prints one line of JSON.

    python dpa1_peer.py --attn_layer 2 --atoms 512 --form pt2_nlist --dtype float64 --model model.dp --artifact-dir DIR

Forms: `pt2_nlist` and `pt2_graph` (AOTInductor, padded neighbours or neighbour graph), `pth` (TorchScript), all three called
through DeepPot with its neighbour search, and `pt_eager` (deepmd.pt as it is). The model is read from --model, or made there
with the constructors' defaults. What is compiled is made once in --artifact-dir, by a process of its own, so that it does not
count in the peak memory. The environment: pip install torch==2.11.0 deepmd-kit==3.2.0 e3nn mpich "vesin[torch]"
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMS = ("pt2_nlist", "pt2_graph", "pth", "pt_eager")
REPEATS = {64: (4, 2, 2), 512: (8, 4, 4), 4096: (16, 8, 8)}
TYPE_MAP = ["O", "H"]


def crystal(n_atoms: int) -> tuple[Any, Any, Any]:
    """Positions (n, 3) Å, types (n,) and cell (3, 3) of fcc with 3.6 Å, displaced by 0.05 Å, two types in turn."""
    import numpy as np

    repeat = REPEATS[n_atoms]
    rng = np.random.default_rng(0)
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.stack(np.meshgrid(*[np.arange(n) for n in repeat], indexing="ij"), -1).reshape(-1, 3)
    places = (corners[:, None] + basis).reshape(-1, 3) * 3.6
    places = places + 0.05 * rng.normal(size=places.shape)
    return places, np.arange(n_atoms) % 2, np.diag(np.array(repeat) * 3.6)


def make_model(path: Path, attn_layer: int, dtype: str) -> None:
    """A model dict with the constructors' defaults (6 Å, sel 120) and random weights."""
    from deepmd.dpmodel.descriptor.dpa1 import DescrptDPA1
    from deepmd.dpmodel.fitting.ener_fitting import EnergyFittingNet
    from deepmd.dpmodel.model.ener_model import EnergyModel
    from deepmd.dpmodel.utils.serialization import save_dp_model

    shared = {"type_map": TYPE_MAP, "precision": dtype}
    descriptor = DescrptDPA1(6.0, 0.5, 120, 2, attn_layer=attn_layer, seed=1, **shared)
    fitting = EnergyFittingNet(2, descriptor.get_dim_out(), mixed_types=True, seed=2, **shared)
    model = EnergyModel(descriptor, fitting, type_map=TYPE_MAP).serialize()
    save_dp_model(str(path), {"backend": "dpmodel", "model": model, "model_def_script": {}})


def read_model(path: Path) -> dict[str, Any]:
    """The root dict of a model file; carryall's own, without deepmd-kit's keys, will do."""
    from deepmd.dpmodel.utils.serialization import load_dp_model

    root = load_dp_model(str(path))
    return {"backend": "dpmodel", "model": root["model"], "model_def_script": root.get("model_def_script", {})}


def make_artifact(model: Path, artifact: Path, form: str) -> None:
    """Compile or script the model."""
    import deepmd.pt  # noqa: F401, registers deepmd-kit's operators
    import torch

    data = copy.deepcopy(read_model(model))
    # one root inside the archive, which torch wants to be the file's name at writing
    folder = artifact.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    if form == "pth":
        from deepmd.pt.utils.serialization import deserialize_to_file

        made = folder / "model.pth"
        deserialize_to_file(str(made), data)
    else:
        import deepmd.pt_expt.utils.env as environment
        from deepmd.pt_expt.utils.serialization import deserialize_to_file

        environment.DEVICE = torch.device("cpu")
        made = folder / "model.pt2"
        deserialize_to_file(str(made), data, lower_kind=form.removeprefix("pt2_"))
    made.replace(artifact)


def evaluator(arguments: argparse.Namespace, artifact: Path) -> Callable[[], tuple[Any, Any, Any]]:
    """A function without arguments that returns energy, forces and virial."""
    places, types, cell = crystal(arguments.atoms)
    if arguments.form != "pt_eager":
        from deepmd.infer import DeepPot

        potential = DeepPot(str(artifact))
        return lambda: potential.eval(places.reshape(1, -1), cell.reshape(1, 9), types)[:3]
    import deepmd.pt  # noqa: F401
    import torch
    from deepmd.pt.model.model.ener_model import EnergyModel

    model = EnergyModel.deserialize(copy.deepcopy(read_model(arguments.model)["model"])).to("cpu").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def call() -> tuple[Any, Any, Any]:
        positions = torch.tensor(places[None], requires_grad=True)
        out = model.forward(positions, torch.tensor(types[None]), torch.tensor(cell.reshape(1, 9)))
        return tuple(out[key].detach().numpy() for key in ("energy", "force", "virial"))

    return call


def measure(arguments: argparse.Namespace, artifact: Path) -> dict[str, Any]:
    """Seconds of the fastest call, peak memory of this process in GB, and the energy, to see that it is the same model."""
    import torch

    torch.set_num_threads(arguments.threads)
    call = evaluator(arguments, artifact)
    began = time.perf_counter()
    energy, force, _ = call()
    first = time.perf_counter() - began
    if arguments.form == "pth":
        call()  # TorchScript optimises in its second call
    times = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    status = Path("/proc/self/status").read_text()
    return {
        "form": arguments.form,
        "attn_layer": arguments.attn_layer,
        "dtype": arguments.dtype,
        "n_atoms": arguments.atoms,
        "threads": arguments.threads,
        "seconds": min(times),
        "first_seconds": first,
        "all_seconds": times,
        # ru_maxrss would be inherited from the process that started this one
        "peak_memory_gb": int(status.split("VmHWM:")[1].split()[0]) / 2**20,
        "energy": float(energy.reshape(-1)[0]),
        "largest_force": float(abs(force).max()),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attn_layer", type=int, default=2)
    parser.add_argument("--atoms", type=int, default=64, choices=REPEATS)
    parser.add_argument("--form", default="pt2_nlist", choices=FORMS)
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--model", type=Path, required=True, help="a .dp file; made there when absent")
    parser.add_argument("--artifact-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # read when the libraries are imported; AOTInductor keeps the number for good
    for name in ("OMP_NUM_THREADS", "DP_INTRA_OP_PARALLELISM_THREADS"):
        os.environ[name] = str(arguments.threads)
    os.environ["DP_INTER_OP_PARALLELISM_THREADS"] = "1"
    suffix = ".pth" if arguments.form == "pth" else ".pt2"
    artifact = arguments.artifact_dir / f"{arguments.model.stem}-{arguments.form}-{arguments.threads}{suffix}"
    if arguments.make:
        if not arguments.model.exists():
            make_model(arguments.model, arguments.attn_layer, arguments.dtype)
        if arguments.form != "pt_eager" and not artifact.exists():
            make_artifact(arguments.model, artifact, arguments.form)
        return
    arguments.artifact_dir.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{artifact} could not be made:\n{done.stderr[-3000:]}")
    print(json.dumps(measure(arguments, artifact)), flush=True)


if __name__ == "__main__":
    main()
