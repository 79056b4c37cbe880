"""SigLIP's loss on a GPU: loss and gradients of a row in one walk over the other side, see similarity.py."""

import torch
from fastjem.kernels import reference, similarity
from torch import Tensor


def siglip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if not similarity.supported(x, y):
        return reference.siglip_loss(x, y, logit_scale, logit_bias, offset, wanted)
    x, y = x.contiguous(), y.contiguous()
    sums, x_gradient = similarity.sigmoid(x, y, logit_scale, logit_bias, offset, wanted[0])
    y_gradient = similarity.sigmoid(y, x, logit_scale, logit_bias, -offset, True)[1] if wanted[1] else None
    loss, weights, dots = sums.sum(1, dtype=torch.float64)
    gradients = [z.new_empty(0) if g is None else g.to(z.dtype) for g, z in ((x_gradient, x), (y_gradient, y))]
    return loss.clone(), gradients, dots.clone(), weights.clone()
