"""Names of floating-point precisions: DeePMD's, and the dtypes that stand for them here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NAMES = {
    "float64": "float64", "double": "float64",
    "float32": "float32", "single": "float32",
    "float16": "float16", "half": "float16",
}  # fmt: skip
"""What each name means; "default" is float64 unless a training run says otherwise."""

COMPUTED_IN = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float32}
"""float16 is how weights are kept; in its arithmetic, sums over neighbours and forces would lose all but two digits."""


def precision_name(name: str) -> str:
    """One of "default", "float64", "float32" and "float16"; ValueError with the reason for any other."""
    key = str(name).lower()
    if key == "bfloat16":
        raise ValueError("precision 'bfloat16' is not supported (no file of a model can hold it): use float32 or float16")
    if key != "default" and key not in NAMES:
        raise ValueError(f"precision {name!r} is not a floating-point type of weights: expected default, {', '.join(NAMES)}")
    return NAMES.get(key, key)


def resolved(name: str) -> str:
    """The same without "default"."""
    return "float64" if name == "default" else name


def set_precision(module: nn.Module, precision: str, statistics: Sequence[str]) -> None:
    """Parameters of `module` in the dtype that computes `precision`; they and its buffers `statistics` on its grid of values.

    Buffers stay float64: files keep them in `precision`, and a model must be what its file says.
    """
    for parameter in module.parameters():
        parameter.data = rounded(parameter.data, precision).to(COMPUTED_IN[precision])
    for name in statistics:
        buffer = getattr(module, name)
        if buffer is not None:
            buffer.copy_(rounded(buffer, precision))


def rounded(value: Tensor, precision: str) -> Tensor:
    """`value` on the grid of `precision`, in its own dtype."""
    return value.to(getattr(torch, precision)).to(value.dtype)
