"""Negative cosine similarity, BYOL's and SimSiam's loss; data2vec's regression."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.bench.case import SMALL, Case


def eager(p: Tensor, z: Tensor) -> Tensor:
    return -torch.nn.functional.cosine_similarity(p, z, dim=1).mean()


def lightly():
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


def case(n: int, d: int, dtype: torch.dtype = torch.float32, both: bool = False, **options) -> Case:
    """p and z are read, the gradient of p is written; if `both`, that of z too, though BYOL and SimSiam stop it."""
    shape = f"{n} x {d}" + (", both gradients" if both else "")
    return Case(
        "negative_cosine", shape, lambda draw: draw.pair(n, d, (True, both)), eager, F.negative_cosine, dtype=dtype,
        peers={"lightly": lightly}, bytes=(3 + both) * n * d * dtype.itemsize, **options,
    )  # fmt: skip


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    target = torch.nn.functional.layer_norm(target, target.shape[-1:])
    return torch.nn.functional.smooth_l1_loss(prediction, target, beta=2.0)


def regression(n: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """Prediction and target are read, the prediction's gradient is written."""
    return Case(
        "regression", f"{n} x {d}", lambda draw: draw.pair(n, d, (True, False)), smooth_l1,
        lambda p, t: F.regression(p, t, beta=2.0), dtype=dtype, bytes=3 * n * d * dtype.itemsize, **options,
    )  # fmt: skip


CASES = [
    case(4096, 256),
    case(4096, 256, torch.bfloat16),
    case(4096, 256, both=True, full_only=("cuda",)),
    case(256, 2048),
    case(256, 2048, torch.bfloat16, full_only=("cpu", "cuda")),
    case(8, 16, clock="host"),
    regression(4096, 768),
    regression(4096, 768, torch.bfloat16, full_only=("cpu", "cuda")),
    # small runs
    case(64, 256, **SMALL),
    case(128, 2048, torch.bfloat16, **SMALL),
    regression(256, 768, **SMALL),
    regression(256, 768, torch.bfloat16, **SMALL),
]
