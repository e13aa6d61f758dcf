"""The operations that a portable program may call: functions of tensors, and arithmetic of sizes, nothing else.

A `.pte` names its operations by strings. Only those below are looked up, so that a file cannot reach files, processes, raw
storage or Python itself. Those that torch does not defend against arguments that fit no tensor are left out, or checked here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from carryall.errors import InputError

OURS = "carryall"
"""Namespace of our own operations (exchange between ranks)."""

POINTWISE_NAMES = """
abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp
clamp_max clamp_min copysign cos cosh deg2rad digamma div elu eq erf erfc erfinv exp exp2 expm1 fill floor floor_divide fmax
fmin fmod gelu ge gt hardtanh heaviside hypot isfinite isinf isnan ldexp le leaky_relu lerp lgamma log log10 log1p log2
log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum
mish mul nan_to_num ne neg nextafter positive pow prelu rad2deg reciprocal relu remainder round rsqrt rsub sgn sigmoid sign
signbit silu sin sinc sinh softplus sqrt square sub tan tanh threshold true_divide trunc where xlogy special_erfcx
special_i0e special_i1 special_i1e i0
"""
"""These may also stand in their in-place form: they change intermediate values of the program."""

OTHER_NAMES = """
_cdist_forward _conj _conj_physical _linalg_eigh _linalg_det _linalg_slogdet _linalg_solve_ex _log_softmax
_log_softmax_backward_data _softmax _softmax_backward_data _to_copy _unsafe_view _assert_tensor_metadata _assert_scalar
_assert_async addbmm addmm addmv addr alias all amax amin aminmax any arange argmax argmin argsort as_strided baddbmm bmm
broadcast_tensors bucketize cat cdist chunk clone complex concat conj constant_pad_nd contiguous copy count_nonzero cross
cummax cummin cumprod cumsum detach diag diag_embed diagonal diagonal_backward diff dot einsum elu_backward embedding empty
empty_like empty_strided expand expand_as eye flatten flip full full_like gather gelu_backward hardtanh_backward imag index
index_add index_copy index_fill index_put index_select inner inverse item kron layer_norm leaky_relu_backward linalg_cross
linalg_det linalg_eigh linalg_inv linalg_inv_ex linalg_norm linalg_solve linalg_vector_norm linear linspace
log_sigmoid_backward log_softmax logcumsumexp logsumexp masked_scatter masked_select matmul max mean median meshgrid min
mish_backward mm moveaxis movedim mv mse_loss narrow native_layer_norm native_layer_norm_backward new_empty new_empty_strided
new_full new_ones new_zeros nonzero nonzero_static norm numpy_T ones ones_like outer permute prod ravel real repeat
repeat_interleave reshape resolve_conj resolve_neg roll rot90 scalar_tensor scatter scatter_add scatter_reduce searchsorted
select select_backward select_scatter sigmoid_backward silu_backward slice slice_backward slice_scatter softmax
softplus_backward sort split split_with_sizes squeeze stack std std_mean sum swapaxes sym_numel sym_size sym_storage_offset
sym_stride sym_constrain_range sym_constrain_range_for_size t take take_along_dim tanh_backward tensor_split
threshold_backward tile to topk trace transpose tril tril_indices triu triu_indices type_as unbind unflatten unfold
unique_consecutive unsqueeze unsqueeze_copy var var_mean vdot view view_as view_as_complex view_as_real vstack hstack zeros
zeros_like lift_fresh_copy
"""

POINTWISE = POINTWISE_NAMES.split()
ATEN = frozenset(
    (*POINTWISE, *(f"{name}_" for name in POINTWISE), *OTHER_NAMES.split(), *("index_add_", "index_put_", "copy_", "zero_"))
)
MAX_POWER = 8


def _power(base: float, exponent: float) -> float:
    """Of sizes: powers that a program needs are small, and a large one would never end."""
    if not -MAX_POWER <= exponent <= MAX_POWER:
        raise ValueError(f"a size to the power {exponent}")
    return base**exponent


def _layer_norm_backward(
    gradient: Tensor, value: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """Torch does not compare the sizes of mean and rstd with those of the input."""
    tail, outer = list(value.shape[value.dim() - len(shape) :]), value.shape[: value.dim() - len(shape)]
    if tail != list(shape) or gradient.shape != value.shape or not mean.numel() == rstd.numel() == math.prod(outer):
        raise ValueError("sizes of a layer norm that do not fit together")
    return torch.ops.aten.native_layer_norm_backward.default(gradient, value, shape, mean, rstd, *others)


CHECKED: dict[str, Callable[..., Any]] = {"torch.ops.aten.native_layer_norm_backward.default": _layer_norm_backward}

SIZES: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
    )},
    "_operator.pow": _power,
    "math.trunc": math.trunc,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sqrt",
    )},
}  # fmt: skip
"""Arithmetic of sizes, which are Python numbers when a program runs."""


def find_operation(target: str) -> Callable[..., Any]:
    """The function that a program calls by the name `target`; InputError when a program may not call it, or torch has none."""
    if known := SIZES.get(target) or CHECKED.get(target):
        return known
    match = re.fullmatch(r"torch\.ops\.(aten|carryall)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z0-9_]+)", target)
    if match is None:
        raise InputError(f"it calls {target[:100]!r}, which is no operation on tensors")
    space, name, overload = match.groups()
    if space == "aten" and (name not in ATEN or overload.endswith("out")):
        raise InputError(f"it calls {target[:100]}, which is not among the operations that a program may call")
    if space == OURS:
        import_module("carryall.exchange.ops")  # registers them; a program without them needs none of it
    found = getattr(getattr(getattr(torch.ops, space), name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise InputError(
            f"it calls {target[:100]}, which torch {torch.__version__} with this version of carryall does not have"
        )
    return found
