"""Dense layers with DeePMD's residual rule, and the two stacks made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from carryall.errors import InputError, nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_tf": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "softplus": nn.functional.softplus,  # x itself above 20, as in DeePMD: 2e-9 off the formula
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "linear": lambda x: x,
    "none": lambda x: x,
}


SILUT_THRESHOLD = 3.0


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name, in any case; InputError names the nearest known one.

    Beside ACTIVATIONS: "silut" (or "custom_silu"), a threshold after a colon, such as "silut:10.0".
    """
    key, colon, threshold = name.lower().partition(":")
    if key in ("silut", "custom_silu"):
        try:
            return silut(float(threshold) if colon else SILUT_THRESHOLD)
        except ValueError:
            raise InputError(f"activation_function {name!r} needs a number after the colon, such as 'silut:3.0'") from None
    if name.lower() in ACTIVATIONS:
        return ACTIVATIONS[name.lower()]
    known = (*ACTIVATIONS, "silut", "custom_silu")
    raise InputError(f"unknown activation_function {name!r}{nearest(name, known)}: known are {', '.join(known)}")


def silut(threshold: float) -> Callable[[Tensor], Tensor]:
    """SiLU below `threshold` and a tanh of the same value and slope above, which is bounded."""
    sigmoid = 1 / (1 + math.exp(-threshold))
    value, slope = threshold * sigmoid, sigmoid * (1 + threshold * (1 - sigmoid))

    def function(x: Tensor) -> Tensor:
        return torch.where(x < threshold, nn.functional.silu(x), torch.tanh(slope * (x - threshold)) + value)

    return function


class Layer(nn.Module):
    """y = act(x w + b) [* idt] [+ x or + (x, x)]: the residual is added when the width stays equal or doubles."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        activation_function: str = "none",
        bias: bool = True,
        use_timestep: bool = False,
        resnet: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation_function, self.resnet = activation_function, resnet
        self._act = activation(activation_function)
        scale = 1 / math.sqrt(n_in + n_out)
        self.w = nn.Parameter(torch.randn(n_in, n_out, dtype=torch.float64, generator=generator) * scale)
        self.b = nn.Parameter(torch.randn(n_out, dtype=torch.float64, generator=generator)) if bias else None
        self.idt = (
            nn.Parameter(0.1 + 0.001 * torch.randn(n_out, dtype=torch.float64, generator=generator)) if use_timestep else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) to (..., n_out)."""
        y = torch.matmul(x, self.w)
        if self.b is not None:
            y = y + self.b
        y = self._act(y)
        if self.idt is not None:
            y = y * self.idt
        return y + residual(x, y.shape[-1]) if self.resnet else y


def residual(x: Tensor, n_out: int) -> Tensor | float:
    """What a layer of width `n_out` adds to its output: x, (x, x), or nothing."""
    if x.shape[-1] == n_out:
        return x
    return torch.cat([x, x], dim=-1) if 2 * x.shape[-1] == n_out else 0.0


def embedding_net(
    n_in: int, neuron: Sequence[int], *, activation_function: str, resnet_dt: bool = False, bias: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Sequential:  # fmt: skip
    """Residual layers of widths `neuron`; a learned step multiplies the layers that have a residual when `resnet_dt`."""
    widths = [n_in, *neuron]
    return nn.Sequential(
        *(
            Layer(
                a,
                b,
                activation_function=activation_function,
                bias=bias,
                use_timestep=resnet_dt and b in (a, 2 * a),
                resnet=True,
                generator=generator,
            )
            for a, b in pairwise(widths)
        )
    )


def fitting_net(
    n_in: int, neuron: Sequence[int], *, activation_function: str, resnet_dt: bool, generator: torch.Generator | None = None
) -> nn.Sequential:
    """An embedding net followed by one linear output."""
    hidden = embedding_net(n_in, neuron, activation_function=activation_function, resnet_dt=resnet_dt, generator=generator)
    return nn.Sequential(*hidden, Layer(neuron[-1] if neuron else n_in, 1, generator=generator))
