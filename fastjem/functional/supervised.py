"""The loss on labels: linear probes and classifiers."""

import torch
from torch import Tensor

from fastjem.functional import checks, quick
from fastjem.ops.autograd import one_pass


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """`torch.nn.functional.cross_entropy(logits, labels)` with the gradient computed in the forward pass.

    Args:
        logits: [N, K].
        labels: [N] int64 in [0, K), or `ignore_index`.
        ignore_index: rows with this label have no loss and no gradient, and don't count in the mean.

    Returns:
        0-dim float32 (float64 for float64 logits); NaN where every row is ignored, as in torch.

    Raises:
        ValueError: for other shapes or dtypes. A label outside [0, K) raises on the CPU; on CUDA, where looking would
            stall the device, the loss and the row's gradient become NaN.
    """
    if (loss := quick.cross_entropy(logits, labels, ignore_index)) is not None:
        return loss
    checks.matrices("cross_entropy", "logits must be [N, K]", logits)
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        came = f"{checks.shape(labels)} {getattr(labels, 'dtype', '')}"
        checks.fail("cross_entropy", f"labels must be [{logits.shape[0]}] int64", came)
    checks.one_device("cross_entropy", (logits, labels))
    return one_pass("cross_entropy", (logits,), labels, checks.integer("cross_entropy", "ignore_index", ignore_index))
