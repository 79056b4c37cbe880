"""SigLIP's loss on a GPU: the weights of a band of rows at a time, see similarity.py."""

import torch
from fastjem.kernels import reference, similarity
from torch import Tensor


def siglip_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, wanted: list[bool]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if not similarity.supported(x, y):
        return reference.siglip_loss(x, y, logit_scale, logit_bias, offset, wanted)
    x, y = x.contiguous(), y.contiguous()
    pairs = list(zip((x, y), wanted, strict=True))
    sums = [torch.zeros(z.shape, dtype=torch.float32, device=z.device) if w else None for z, w in pairs]
    loss, weights, dots = similarity.sigmoid(x, y, logit_scale, logit_bias, offset, *sums).unbind()
    gradients = [z.new_empty(0) if s is None else s.to(z.dtype) for s, z in zip(sums, (x, y), strict=True)]
    return loss.clone(), gradients, dots.clone(), weights.clone()
