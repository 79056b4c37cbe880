"""Losses between a prediction and a target: BYOL, SimSiam, data2vec."""

import torch
from torch import Tensor

from fastjem.functional import _checks as check
from fastjem.functional.spectral import in_float32, without_autocast
from fastjem.ops.autograd import one_pass


def negative_cosine(p: Tensor, z: Tensor, *, eps: float = 1e-8) -> Tensor:
    """`-cosine_similarity(p, z).mean()` (SimSiam, Chen and He 2021, arXiv 2011.10566, equation 1; BYOL's loss is 2 + 2
    of it).

    Detaches nothing: stopping the gradient of `z` is the caller's part of the method, `negative_cosine(p, z.detach())`.

    Args:
        p, z: [N, D] each.
        eps: the least a norm is taken for.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes or dtypes.
    """
    check.matrices("negative_cosine", "p and z must be [N, D] both", p, z)
    check.positive("negative_cosine", eps=eps)
    return one_pass("negative_cosine", check.common(p, z), float(eps))


def regression(
    prediction: Tensor, target: Tensor, *, beta: float = 1.0, normalize: bool = True, eps: float = 1e-5
) -> Tensor:
    """`smooth_l1_loss(prediction, layer_norm(target, [D]), beta=beta)`: data2vec (Baevski et al. 2022, arXiv
    2202.03555, eq. 2).

    Args:
        prediction: [..., D], the student's, at the masked positions.
        target: [..., D], the teacher's; it gets no gradient.
        beta: from squared to absolute error (2 in data2vec's image models); 0: the squared error, as in the official
            code.
        normalize: the target, by layer norm without affine part.
        eps: the layer norm's.

    Returns:
        0-dim float32 (float64 for float64 inputs), the mean over all elements.

    Raises:
        ValueError: for other shapes or dtypes, or a negative beta.
    """
    contract = "prediction and target must be [..., D] both"
    check.matrices("regression", contract, prediction, target, dims=max(1, getattr(prediction, "ndim", 1)))
    if beta < 0:
        check.fail("regression", "beta must not be negative", beta)
    prediction, target = in_float32(*check.common(prediction, target))
    with without_autocast(prediction):
        target = target.detach()
        if normalize:
            target = torch.nn.functional.layer_norm(target, target.shape[-1:], eps=eps)
        if beta == 0:
            return torch.nn.functional.mse_loss(prediction, target)
        return torch.nn.functional.smooth_l1_loss(prediction, target, beta=beta)
