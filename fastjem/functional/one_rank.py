"""CLIP's loss of the pairs of one rank, which one operator computes whole and another differentiates."""

import torch
from torch import Tensor

from fastjem.ops import direct, transforms
from fastjem.ops.autograd import distinct, needs_gradient, refuse_second_order


class _ClipOfPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        loss, *saved = direct.call("clip_loss_of_pairs", x, y, scale)
        ctx.save_for_backward(x, y, scale, *saved)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        refuse_second_order("clip_loss")
        batched = transforms.batched(upstream)
        given = ctx.saved_tensors[3].new_ones((), dtype=upstream.dtype) if batched else upstream
        wanted = list(ctx.needs_input_grad)
        (of_x, of_y), of_scale = direct.call("clip_loss_of_pairs_backward", given, *ctx.saved_tensors, wanted)
        gradients = [of if want else None for of, want in zip((of_x, of_y, of_scale), wanted, strict=True)]
        return (*(of if of is None or not batched else transforms.scaled(of, upstream) for of in gradients),)


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # 0-dim
) -> Tensor:
    if not any(needs_gradient(z) for z in (x, y, scale)):
        return direct.call("clip_loss_of_pairs", x, y, scale)[0]
    x, y = distinct((x, y))
    return _ClipOfPairs.apply(x, y, scale)  # pyright: ignore[reportReturnType]
