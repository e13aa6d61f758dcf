"""Load a packed file. Nothing here needs the source of the model: a file runs where its model's code is absent."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from carryall.errors import InputError
from carryall.package.cpu import level_misfit
from carryall.package.manifest import Packed, open_packed, verified_copy
from carryall.package.metadata import Metadata, check_program, read_metadata
from carryall.package.program import load_program
from carryall.package.run import EDGE_OUTPUTS, PackedPotential, Run

TRUSTED_KEYS = "CARRYALL_TRUSTED_KEYS"
OLDEST, NEWEST = (2, 11), (2, 13)
"""Versions of torch between which compiled programs are known to be exchangeable."""


class UnfitError(InputError):
    """The compiled part of a whole file does not run here; its source does."""


def load_packed(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    neighbor_graph_method: str | None = None,
    trusted_keys: Sequence[str | Path] | None = None,
) -> PackedPotential:
    """Load a `.pt2` or `.pte`; every entry is checked against the manifest's SHA-256 before anything of it runs.

    With `trusted_keys` (None: those of $CARRYALL_TRUSTED_KEYS), the file has to be signed by one of them.
    InputError for a file that is damaged or not one of ours; UnfitError, one of them, for one compiled for another CPU, device
    or torch: `carryall.load(path, rebuild=True)` makes it again from its source.
    """
    path, where = Path(path), usable_device(device)
    with open_packed(path) as packed:
        if trusted_keys or (trusted_keys is None and os.environ.get(TRUSTED_KEYS)):
            from carryall.package.signing import require_signature
            from carryall.package.signing import trusted_keys as keys_of_environment

            require_signature(packed, trusted_keys or keys_of_environment())
        facts = read_metadata(path, packed.check())
        check_program(path, facts)
        _check_options(path, facts, dtype, neighbor_graph_method)
        if facts.message_passing:
            # the ops that the program calls
            import carryall.exchange.ops  # noqa: F401
        if facts.kind == "pte":
            return PackedPotential(path, facts, where, *_portable(packed, device, edge_places(facts)))
        if reason := misfit(facts, where):
            raise UnfitError(_unfit(path, reason))
        run, places = _compiled(packed, where), edge_places(facts)

        def run_edges(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            out = run(inputs)
            return [out[place] for place in places]

        return PackedPotential(path, facts, where, run, run_edges)


def edge_places(facts: Metadata) -> list[int]:
    """Where EDGE_OUTPUTS are among the outputs of the program, as far as it has them."""
    return [facts.output_keys.index(name) for name in EDGE_OUTPUTS if name in facts.output_keys]


def _check_options(path: Path, facts: Metadata, dtype: str | None, neighbor_graph_method: str | None) -> None:
    if dtype is not None and dtype != facts.dtype:
        raise InputError(f"{path} was packed in {facts.dtype}, not {dtype}: pack it again with --dtype {dtype}")
    if neighbor_graph_method is not None and neighbor_graph_method != facts.neighbor_graph_method:
        raise InputError(
            f"{path} was packed with neighbor_graph_method {facts.neighbor_graph_method!r}, not {neighbor_graph_method!r}: "
            f"pack it again with --neighbor-graph-method {neighbor_graph_method}"
        )


def misfit(facts: Metadata, where: torch.device) -> str | None:
    """Why a compiled program cannot run on the device, as far as its facts say; None when nothing speaks against it."""
    if where.type != facts.device:
        return f"it was compiled for {facts.device}, not {where.type}"
    if where.type == "cuda":
        made_for, here = facts.cuda_capability, ".".join(map(str, torch.cuda.get_device_capability(where)))
        if made_for and made_for != here:
            return f"it was compiled for GPUs of compute capability {made_for} and this one has {here}"
    if reason := level_misfit(facts.cpu_level, facts.machine):
        return reason
    made_by, here_version = _minor(facts.torch_version), _minor(torch.__version__)
    if made_by != here_version and not (OLDEST <= made_by <= NEWEST and OLDEST <= here_version <= NEWEST):
        return f"it was compiled under torch {facts.torch_version} and this is {torch.__version__}"
    return None


def usable_device(name: str) -> torch.device:
    """The device of that name; InputError when this machine or this torch has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).strip().splitlines()[0]}") from None
    return device


def _compiled(packed: Packed, where: torch.device) -> Run:
    index = -1 if where.index is None else where.index
    with tempfile.TemporaryDirectory(prefix="carryall-") as folder, verified_copy(packed, Path(folder)) as copy:
        try:
            # the loader itself: torch's Python wrapper around it imports the compiler and takes longer for each call
            loader = torch._C._aoti.AOTIModelPackageLoader(str(copy), "model", False, 1, index)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UnfitError(_unfit(packed.path, f"torch {torch.__version__} cannot load it ({reason})")) from None
    return lambda inputs: loader.run(list(inputs))


def _portable(packed: Packed, device: str, places: list[int]) -> tuple[Run, Run]:
    whole = load_program(packed, device)
    edges = whole.giving(places)
    return lambda inputs: whole(*inputs), lambda inputs: edges(*inputs)


def _unfit(path: Path, reason: str) -> str:
    return (
        f"the compiled part of {path} does not fit here: {reason}. Its source does: load it with rebuild=True (--rebuild), "
        f"which compiles it once into a cache, or make a new file: carryall rebuild {path.name} mine.pt2"
    )


def _minor(version: str) -> tuple[int, int]:
    """(2, 13) of 2.13.0+cpu; (0, 0) of what is no version."""
    parts = version.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else (0, 0)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Hide torch's warnings about its own internals."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield
