"""What a portable program may call, and what it may not reach."""

from __future__ import annotations

import pytest
import torch

from carryall.errors import InputError
from carryall.package.operations import ATEN, POINTWISE, SIZES, find_operation


def test_every_operation_exists_and_is_spelled_right() -> None:
    names = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    in_place = {f"{name}_" for name in POINTWISE}  # not every one has that form
    assert ATEN - in_place <= names
    assert "aten" not in names


FORBIDDEN = (
    "torch.load", "torch.hub.load", "torch.os.system", "torch.ops.load_library", "torch.ops.aten.from_file.default",
    "torch.ops.aten.set_.source_Storage", "torch.ops.aten.resize_.default", "torch.ops.aten.add.out",
    "torch.ops.aten.__class__.mro", "torch.ops.aten.add.__init__", "torch.ops.aten.add", "torch.ops.prims.add.default",
    "torch.ops.carryall.__dict__.items", "torch.ops.higher_order.cond", "torch.ops.profiler._record_function_enter.default",
    "_operator.attrgetter", "_operator.methodcaller", "_operator.call", "_operator.setitem", "math.factorial", "builtins.eval",
    "os.system", "eval", "", "#ext:op", "torch.ops.aten.add.Tensor\n", "torch.ops.aten.ndd.Tensor",
)  # fmt: skip


@pytest.mark.parametrize("target", FORBIDDEN)
def test_what_is_no_operation_on_tensors_is_not_found(target: str) -> None:
    with pytest.raises(InputError, match=r"it calls .*, which (is no|is not|torch)"):
        find_operation(target)


def test_operations_that_are_found() -> None:
    assert find_operation("torch.ops.aten.add.Tensor") is torch.ops.aten.add.Tensor
    assert find_operation("torch.ops.aten.logical_and_.default") is torch.ops.aten.logical_and_.default
    assert find_operation("torch.ops.carryall.exchange_forward.default") is torch.ops.carryall.exchange_forward.default
    assert SIZES["_operator.pow"](3, 2) == 9
    with pytest.raises(ValueError, match="a size to the power 1000000"):
        SIZES["_operator.pow"](3, 10**6)


def test_layer_norm_backward_with_sizes_that_do_not_fit() -> None:
    """Torch would read beyond the end of mean and rstd."""
    run = find_operation("torch.ops.aten.native_layer_norm_backward.default")
    x = torch.randn(4, 3)
    _, mean, rstd = torch.ops.aten.native_layer_norm.default(x, [3], None, None, 1e-5)
    args = (x, x, [3], mean, rstd, None, None, [True, False, False])
    assert torch.equal(run(*args)[0], torch.ops.aten.native_layer_norm_backward.default(*args)[0])
    for wrong in (
        (x, x, [3], mean[:1], rstd),
        (x, x, [3], mean, rstd[:1]),
        (x[:2], x, [3], mean, rstd),
        (x, x, [2], mean, rstd),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            run(*wrong, None, None, [True, False, False])
