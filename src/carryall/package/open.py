"""One call for whatever holds a potential: packed file, checkpoint, source dict, or built-in name.

What needs a model's source is imported only where a source is read, so that a packed file opens where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from carryall.errors import InputError, MissingDependencyError
from carryall.graph.potential import DTYPES, Potential
from carryall.package.load import UnfitError, load_packed, usable_device

COMPILED_BUILT_IN = ("water",)  # the others are a few operations each


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    *,
    neighbor_graph_method: str | None = None,
    rebuild: bool = False,
    trusted_keys: Sequence[str | Path] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Potential:
    """A potential from a `.pt2`, `.pte`, checkpoint `.pt`, source dict (`.json`, DeePMD `.dp`, `.yaml`) or built-in name.

    `dtype` casts what is run from source; a packed file keeps the one it was packed in. So with `neighbor_graph_method`:
    "graph" (every neighbour, no padding) or "legacy" (DeePMD's padded lists, see docs/deepmd.md); a DeePMD model for which it
    matters says so in a SemanticsWarning. `rebuild`: a `.pt2` whose compiled part does not fit this machine (another CPU,
    device or torch) is compiled from its source into a cache. `trusted_keys`: files with public keys,
    one of which has to have signed a packed file; those of `$CARRYALL_TRUSTED_KEYS` (separated by commas) when None. The
    built-in `water` is compiled into the cache on first use; `notify` hears of it, of running it uncompiled where there is no
    C++ compiler, and of what would be a warning.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    path, say = Path(path), notify or (lambda _: None)
    if path.suffix in (".pt2", ".pte"):
        try:
            return load_packed(path, device, dtype, neighbor_graph_method, trusted_keys)
        except UnfitError:
            if not rebuild:
                raise
        from carryall.package.cache import rebuilt

        return rebuilt(path, device, say)
    from carryall.package.from_source import run_from_source

    plain = dtype is None and neighbor_graph_method is None
    if str(path) in COMPILED_BUILT_IN and plain and usable_device(device).type == "cpu":
        from carryall.package.cache import compiled

        try:
            return compiled(shipped(f"{path}.json.gz"), say)
        except MissingDependencyError as missing:
            if notify:
                notify(f"running {path} uncompiled: {missing}")
    return run_from_source(path, device, dtype, neighbor_graph_method, notify)


def shipped(name: str) -> Path:
    """A file that comes with the package."""
    path = Path(str(resources.files("carryall") / "assets" / name))
    if not path.exists():
        raise InputError(f"the installed package lacks {path}: install carryall again")
    return path
