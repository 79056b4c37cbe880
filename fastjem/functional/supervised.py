"""The loss on labels: linear probes and classifiers."""

import torch
from torch import Tensor

from fastjem.functional import checks, quick
from fastjem.functional.options import Options, is_given, reduced
from fastjem.functional.precision import loss_dtype
from fastjem.kernels.arithmetic import widest, widest_dtype
from fastjem.ops import transforms
from fastjem.ops.autograd import known, needs_gradient, one_pass, ops, refuse_second_order
from fastjem.ops.forward_mode import refuse_forward_mode


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy(logits, labels)` with the gradient computed in the forward pass.

    Args:
        logits: [N, K].
        labels: [N] int64 in [0, K), or `ignore_index`.
        ignore_index: rows with this label have no loss and no gradient, and don't count in the mean.
        reduction: "mean", "sum", or "none" for the loss of each row, [N]; its gradient is then computed in backward.
        weights: [N], of the rows' losses (torch's are of classes), constants; the mean becomes sum(weights * losses) /
            sum(weights). A row of weight 0 isn't looked at, as if it were ignored.
        label_smoothing: torch's: so much of the target is uniform over all classes; a number or a 0-dim tensor,
            constants.

    Returns:
        0-dim float32 (float64 for float64 logits); NaN where every row is ignored, as in torch. [N] without a
        reduction, 0 where a row is ignored.

    Raises:
        ValueError: for other shapes or dtypes. A label outside [0, K) raises on the CPU; on CUDA, where looking would
            stall the device, the loss and the row's gradient become NaN.
    """
    # a call of `is_given` would be a fortieth of what a few rows take
    is_smoothed = label_smoothing != 0 if type(label_smoothing) is float else is_given(label_smoothing)
    has_options = is_smoothed or reduction != "mean" or weights is not None
    if not has_options and (loss := quick.cross_entropy(logits, labels, ignore_index)) is not None:
        return loss
    checks.matrices("cross_entropy", "logits must be [N, K]", logits)
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        came = f"{checks.shape(labels)} {getattr(labels, 'dtype', '')}"
        checks.fail("cross_entropy", f"labels must be [{logits.shape[0]}] int64", came)
    checks.one_device("cross_entropy", (logits, labels))
    ignore_index = checks.integer("cross_entropy", "ignore_index", ignore_index)
    if not has_options:
        return one_pass("cross_entropy", (logits,), labels, ignore_index)
    options = Options(reduction, weights, label_smoothing)
    options = options.checked("cross_entropy", logits, logits.shape[0], [logits.shape[:1]])
    return _with_options(logits, labels, ignore_index, options)


def _with_options(logits: Tensor, labels: Tensor, ignore_index: int, options: Options) -> Tensor:
    refuse_forward_mode("cross_entropy", (logits,))
    smoothing = options.label_smoothing
    if isinstance(smoothing, Tensor):
        smoothing = smoothing.detach()
    else:
        smoothing = torch.full((), smoothing, dtype=widest_dtype(logits.device), device=logits.device)
    counted = labels != ignore_index
    weights = widest(counted) if options.weights is None else widest(options.weights).where(counted, 0)
    if options.reduction == "none":
        losses = _LossesOfRows.apply(logits, labels, weights, smoothing, ignore_index)
        return reduced(losses, options, logits, None)
    is_mean = options.reduction == "mean"
    total = weights.sum()
    # So backward needn't read the gradient again; in float16 1/N would take half of its numbers below what it holds.
    is_divided = is_mean and logits.dtype != torch.float16
    if is_divided:
        weights = weights / total
    wanted = needs_gradient(logits)
    losses, gradients = ops.cross_entropy_rows(logits.detach(), labels, weights, smoothing, ignore_index, [wanted])
    loss = (losses * weights).sum()  # the losses of rows that weigh 0 are 0
    factor = 1.0
    if is_mean and not is_divided:
        factor = 1 / total
        loss = loss * factor
    return known("cross_entropy", loss.to(loss_dtype(logits)), (logits,), gradients, (factor,))


class _LossesOfRows(torch.autograd.Function):
    """[N]: the gradient of rows that are weighted anyhow is one more pass, which reads the logits again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: Tensor, ignore_index: int) -> Tensor:
        return ops.cross_entropy_rows(logits, labels, weights, smoothing, ignore_index, [False])[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index = inputs
        ctx.in_transform = transforms.active()
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if not ctx.in_transform:  # a transform's backward has create_graph=True in any case
            refuse_second_order("cross_entropy")
        transforms.refuse_batched_gradients("cross_entropy", upstream)
        logits, labels, weights, smoothing = ctx.saved_tensors
        upstream = torch.where(weights == 0, 0, upstream)
        gradient = ops.cross_entropy_rows(logits, labels, upstream, smoothing, ctx.ignore_index, [True])[1][0]
        return transforms.once("cross_entropy", gradient, logits), None, None, None, None
