"""Losses between a prediction and a target: BYOL, SimSiam, data2vec."""

from torch import Tensor

from fastjem.functional import checks, quick
from fastjem.ops.autograd import one_pass


def negative_cosine(p: Tensor, z: Tensor, *, eps: float = 1e-8) -> Tensor:
    """`-cosine_similarity(p, z).mean()` (SimSiam, Chen and He 2021, arXiv 2011.10566, equation 1).

    BYOL's loss is 2 + 2 of it. Detaches nothing: stopping the gradient of `z` is the caller's part of the method,
    `negative_cosine(p, z.detach())`.

    Args:
        p, z: [N, D] each.
        eps: the least a norm is taken for.

    Returns:
        0-dim float32 (float64 for float64 inputs).

    Raises:
        ValueError: for other shapes or dtypes.
    """
    if (loss := quick.negative_cosine(p, z, eps)) is not None:
        return loss
    checks.matrices("negative_cosine", "p and z must be [N, D] both", p, z)
    eps = checks.host_number("negative_cosine", "eps", eps, low=0)
    return one_pass("negative_cosine", checks.common(p, z), eps)


def regression(
    prediction: Tensor, target: Tensor, *, beta: float = 1.0, normalize: bool = True, eps: float = 1e-5
) -> Tensor:
    """`smooth_l1_loss(prediction, layer_norm(target, [D]), beta=beta)`: data2vec's loss.

    Baevski et al. 2022, arXiv 2202.03555, equation 2.

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
        ValueError: for other shapes or dtypes, a negative beta, or an eps that isn't positive.
    """
    if (loss := quick.regression(prediction, target, beta, normalize, eps)) is not None:
        return loss
    contract = "prediction and target must be [..., D] both"
    checks.matrices("regression", contract, prediction, target, dims=max(1, getattr(prediction, "ndim", 1)))
    beta = checks.host_number("regression", "beta", beta, low=0, inclusive=True)
    eps = checks.host_number("regression", "eps", eps, low=0)
    prediction, target = checks.common(prediction, target.detach())
    width = prediction.shape[-1]
    rows = prediction.reshape(-1, width)
    targets = target.reshape(-1, width)
    return one_pass("regression", (rows,), targets, beta, bool(normalize), eps)
