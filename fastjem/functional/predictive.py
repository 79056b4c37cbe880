"""Losses between a prediction and a target: BYOL, SimSiam, data2vec."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.functional import checks, quick
from fastjem.functional.options import Options, reduced
from fastjem.functional.precision import in_float32, loss_dtype, without_autocast
from fastjem.functional.unit import unit_rows
from fastjem.ops.autograd import one_pass


def negative_cosine(
    p: Tensor, z: Tensor, *, eps: float = 1e-8, reduction: str = "mean", weights: Tensor | None = None
) -> Tensor:
    """`-cosine_similarity(p, z).mean()` (SimSiam, Chen and He 2021, arXiv 2011.10566, equation 1).

    BYOL's loss is 2 + 2 of it. Detaches nothing: stopping the gradient of `z` is the caller's part of the method,
    `negative_cosine(p, z.detach())`.

    Args:
        p, z: [N, D] each.
        eps: the least a norm is taken for.
        reduction: "mean", "sum", or "none" for the loss of each row, [N].
        weights: [N], of the rows' losses, constants; the mean becomes sum(weights * losses) / sum(weights). A row of
            weight 0 isn't looked at.

    Returns:
        0-dim float32 (float64 for float64 inputs); [N] without a reduction.

    Raises:
        ValueError: for other shapes or dtypes.
    """
    has_options = reduction != "mean" or weights is not None
    if not has_options and (loss := quick.negative_cosine(p, z, eps)) is not None:
        return loss
    checks.matrices("negative_cosine", "p and z must be [N, D] both", p, z)
    eps = checks.host_number("negative_cosine", "eps", eps, low=0)
    if has_options:
        options = Options(reduction, weights).checked("negative_cosine", p, p.shape[0], [p.shape[:1]])
        with without_autocast(p):
            rows = [unit_rows(x, eps) for x in _without_rows_of_no_weight(checks.common(p, z), options.weights)]
            losses = -torch.linalg.vecdot(*rows)
            return reduced(losses, options, p, None)
    return one_pass("negative_cosine", checks.common(p, z), eps)


def _without_rows_of_no_weight(rows: Sequence[Tensor], weights: Tensor | None) -> Sequence[Tensor]:
    """[N, D] each with zeros there: of rows that hold NaN, a weight of 0 alone would leave NaN in the gradient."""
    if weights is None:
        return rows
    without = (weights == 0)[:, None]
    return [x.masked_fill(without, 0) for x in rows]


def regression(
    prediction: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`smooth_l1_loss(prediction, layer_norm(target, [D]), beta=beta)`: data2vec's loss.

    Baevski et al. 2022, arXiv 2202.03555, equation 2.

    Args:
        prediction: [..., D], the student's: at the masked positions, or at all of them with `rows`.
        target: [..., D], the teacher's; it gets no gradient.
        beta: from squared to absolute error (2 in data2vec's image models); 0: the squared error, as in the official
            code.
        normalize: the target, by layer norm without affine part.
        eps: the layer norm's.
        rows: [M] int64, the flat indices of the positions that count, as `masked_rows` gives them: they are read where
            they are, and nothing is gathered. All different, but for those of weight 0, which aren't looked at.
        weights: [M], one a row (of all rows without `rows`): the mean over rows becomes sum(weights * rows) /
            sum(weights). With 1 / (masked patches of its image) every image counts alike.
        reduction: "mean", or of the rows' losses, each the mean over its elements, "sum" or "none" ([...], without the
            last dimension). Not with `rows`, by which a prediction may be indexed.

    Returns:
        0-dim float32 (float64 for float64 inputs), the mean over all elements.

    Raises:
        ValueError: for other shapes or dtypes, a negative beta, or an eps that isn't positive; on the CPU, for rows out
            of range (on a GPU these make the loss NaN).
    """
    if rows is None and weights is None and reduction == "mean":
        loss = quick.regression(prediction, target, beta, normalize, eps)
        if loss is not None:
            return loss
    contract = "prediction and target must be [..., D] both"
    checks.matrices("regression", contract, prediction, target, dims=max(1, getattr(prediction, "ndim", 1)))
    beta = checks.host_number("regression", "beta", beta, low=0, inclusive=True)
    eps = checks.host_number("regression", "eps", eps, low=0)
    prediction, target = checks.common(prediction, target.detach())
    width = prediction.shape[-1]
    predictions = prediction.reshape(-1, width)
    targets = target.reshape(-1, width)
    options = (beta, bool(normalize), eps)
    if reduction != "mean":
        if rows is not None:
            checks.fail("regression", "with rows, reduction must be mean", repr(reduction))
        checked = Options(reduction, weights).checked(
            "regression", prediction, predictions.shape[0], [targets.shape[:1]]
        )
        losses = reduced(_losses_of_rows(predictions, targets, checked.weights, *options), checked, prediction, None)
        return losses.view(prediction.shape[:-1]) if reduction == "none" else losses
    if rows is None and weights is None:
        return one_pass("regression", (predictions,), targets, *options)
    rows, weights = _rows_and_weights(rows, weights, predictions)
    return one_pass("regression_rows", (predictions,), targets, rows, weights, *options)


def _losses_of_rows(x: Tensor, y: Tensor, weights: Tensor | None, beta: float, normalize: bool, eps: float) -> Tensor:
    """[N] of predictions and targets [N, D], in plain torch, which differentiates them."""
    with without_autocast(x):
        x, y = _without_rows_of_no_weight([in_float32(z) for z in (x, y)], weights)
        if normalize:
            y = torch.nn.functional.layer_norm(y, y.shape[1:], eps=eps)
        if beta == 0:
            return (x - y).square().mean(1)
        return torch.nn.functional.smooth_l1_loss(x, y, reduction="none", beta=beta).mean(1)


def _rows_and_weights(rows: Tensor | None, weights: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both [M], of the rows of x [N, D]: by default all of them, alike."""
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    elif not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
        came = f"{checks.shape(rows)} {getattr(rows, 'dtype', '')}".strip()
        checks.fail("regression", "rows must be [M] int64", came)
    count = rows.shape[0]
    if weights is None:
        weights = torch.ones(count, dtype=loss_dtype(x), device=x.device)
    elif not isinstance(weights, Tensor) or weights.shape != (count,) or not weights.is_floating_point():
        came = f"{checks.shape(weights)} {getattr(weights, 'dtype', '')}".strip()
        checks.fail("regression", f"weights must be [{count}], floating-point", came)
    checks.one_device("regression", [x, rows, weights])
    return rows, weights.detach()
