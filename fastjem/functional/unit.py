"""Rows of unit length, as `torch.nn.functional.normalize` makes them, by one operator and its gradient by another.

Within transforms of torch.func, and where torch.compile fuses what is around them, they are torch's.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastjem.functional.precision import in_float32
from fastjem.kernels.arithmetic import UNIT_EPS, through_unit_rows
from fastjem.ops import direct, transforms
from fastjem.ops.autograd import needs_gradient


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        unit, divisors = direct.call("normalize_rows", x, eps)
        ctx.save_for_backward(x, unit, divisors)
        ctx.eps = eps
        return unit

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, unit, divisors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may be asked for, which torch has
            (of_rows,) = torch.autograd.grad(_by_torch(x, ctx.eps), x, gradient, create_graph=True)
        elif transforms.batched(gradient):
            of_rows = through_unit_rows(gradient, unit, divisors[:, None].to(unit.dtype), ctx.eps).to(x.dtype)
        else:
            of_rows = direct.call("normalize_rows_backward", gradient, unit, divisors, ctx.eps, x.dtype)
        return of_rows, None


def _by_torch(x: Tensor, eps: float) -> Tensor:
    return normalize(in_float32(x), dim=-1, eps=eps)


def unit_rows(x: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """`normalize(x, dim=-1, eps=eps)` of [..., D] in float32, whatever autocast says (float64 for float64)."""
    if transforms.takes_apart() or not x.numel():
        return _by_torch(x, eps)
    rows = x.reshape(-1, x.shape[-1])
    if not needs_gradient(x):
        return direct.call("normalize_rows", rows.detach(), eps)[0].view(x.shape)
    return _UnitRows.apply(rows, eps).view(x.shape)  # pyright: ignore[reportAttributeAccessIssue]
