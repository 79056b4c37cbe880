"""Losses between a prediction and a target: BYOL, SimSiam."""

from torch import Tensor

from fastjem.functional import _checks as check
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
