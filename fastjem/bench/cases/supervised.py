"""Cross-entropy on labels."""

import torch

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case


def case(n: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """The logits are read and their gradient is written, the labels are read."""
    return Case(
        "cross_entropy", f"{n} x {k}", lambda draw: (draw.normal(n, k, gradient=True), draw.labels(n, k)),
        eager=torch.nn.functional.cross_entropy, ours=F.cross_entropy, dtype=dtype,
        bytes=2 * n * k * dtype.itemsize + 8 * n, **options,
    )  # fmt: skip


def rows_case(n: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Weighed losses of rows, with label smoothing: their gradient waits for backward, which reads the logits again."""
    weights = lambda x: torch.linspace(0.5, 1.5, len(x), device=x.device)  # noqa: E731
    cross_entropy = torch.nn.functional.cross_entropy
    return Case(
        "cross_entropy_rows", f"{n} x {k}", lambda draw: (draw.normal(n, k, gradient=True), draw.labels(n, k)),
        eager=lambda x, y: (cross_entropy(x, y, reduction="none", label_smoothing=0.1) * weights(x)).mean(),
        ours=lambda x, y: (F.cross_entropy(x, y, reduction="none", label_smoothing=0.1) * weights(x)).mean(),
        dtype=dtype, bytes=3 * n * k * dtype.itemsize + 16 * n, **options,
    )  # fmt: skip


CASES = [
    case(4096, 1000, full_only=("cuda",)),
    case(4096, 1000, torch.bfloat16),
    case(1024, 32768, full_only=("cuda",)),
    case(1024, 32768, torch.bfloat16, full_only=("cpu",)),
    case(256, 131072, full_only=("cpu", "cuda")),
    case(256, 131072, torch.bfloat16, full_only=("cuda",)),
    case(16384, 131072, torch.bfloat16, devices=("cuda",)),
    rows_case(4096, 1000, full_only=("cuda",)),
    rows_case(4096, 1000, torch.bfloat16),
    # small runs
    case(128, 1000, **SMALL),
    case(256, 4096, **SMALL),
    case(256, 4096, torch.bfloat16, **SMALL),
]
