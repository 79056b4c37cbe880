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


def rows_of_mask(prediction: Tensor, target: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """data2vec's at the masked patches, each image alike: rows of both are gathered first."""
    target = torch.nn.functional.layer_norm(target[rows], target.shape[-1:])
    losses = torch.nn.functional.smooth_l1_loss(prediction[rows], target, beta=2.0, reduction="none").mean(1)
    return (losses * weights).sum() / weights.sum()


def regression_rows(images: int, patches: int, d: int, dtype: torch.dtype = torch.float32, **options) -> Case:
    """60 % of the patches are masked. They are read, with rows and weights; of the gradient all rows are written."""

    def inputs(draw) -> tuple[Tensor, ...]:
        prediction, target = draw.pair(images * patches, d, (True, False))
        mask = draw.normal(images, patches, dtype=torch.float32) < 0.25
        rows, weights = F.masked_rows(mask, images * patches * 3 // 5)
        return prediction, target, rows, weights

    n = images * patches
    return Case(
        "regression_rows", f"60 % of {images} x {patches} x {d}", inputs, rows_of_mask,
        lambda p, t, rows, weights: F.regression(p, t, beta=2.0, rows=rows, weights=weights), dtype=dtype,
        bytes=(2 * n + n) * d * dtype.itemsize + n * 3 // 5 * 12, **options,
    )  # fmt: skip


CASES = [
    case(4096, 256),
    case(4096, 256, torch.bfloat16),
    case(4096, 256, both=True, full_only=("cuda",)),
    case(256, 2048),
    case(256, 2048, torch.bfloat16, full_only=("cpu", "cuda")),
    regression(4096, 768),
    regression_rows(32, 196, 768),
    regression_rows(32, 196, 768, torch.bfloat16, full_only=("cpu", "cuda")),
    regression(4096, 768, torch.bfloat16, full_only=("cpu", "cuda")),
    # small runs
    case(64, 256, **SMALL),
    case(128, 2048, torch.bfloat16, **SMALL),
    regression(256, 768, **SMALL),
    regression(256, 768, torch.bfloat16, **SMALL),
]
