"""The host's time for a call: tensors so small that nothing else is measured. On a GPU, the time to launch.

What a small run pays for each loss of each step, and what people see who try a loss in a notebook.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.bench.case import Case, Draw
from fastjem.bench.cases import contrastive, covariance, predictive, prototypes, supervised, weights

TEMPERATURE = 0.07  # SupCon's


def supcon(z: Tensor, labels: Tensor) -> Tensor:
    rows = normalize(z.flatten(0, 1), dim=1)
    classes = labels.repeat(len(z))
    itself = torch.eye(len(rows), dtype=torch.bool, device=z.device)
    positive = (classes[:, None] == classes) & ~itself
    logits = rows @ rows.T / TEMPERATURE
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


def supcon_case(n: int, d: int, **options) -> Case:
    """Two views; FLOPs and bytes as of NT-Xent."""

    def inputs(draw: Draw) -> tuple[Tensor, Tensor]:
        return draw.normal(2, n, d, gradient=True), draw.labels(n, 2)

    return Case(
        "supcon", f"2 x {n} x {d}", inputs, supcon, F.supcon, uses=("nt_xent", "nt_xent_backward"),
        bytes=4 * n * d * 4, flops=16 * n * n * d, **options,
    )  # fmt: skip


CASES = [
    contrastive.nt_xent_case(4, 16, clock="host"),
    contrastive.image_text_case("clip_loss", 4, 16, clock="host"),
    contrastive.image_text_case("siglip_loss", 4, 16, clock="host"),
    contrastive.moco_case(4, 16, 16, clock="host"),
    supcon_case(4, 16, clock="host"),
    supervised.case(8, 16, clock="host"),
    predictive.case(8, 16, clock="host"),
    predictive.regression(8, 16, clock="host"),
    prototypes.sinkhorn_case(8, 16, clock="host"),
    prototypes.dino_case(2, 2, 8, 16, clock="host"),
    covariance.case("vicreg", 8, 16, clock="host"),
    covariance.case("barlow_twins", 8, 16, clock="host"),
    weights.case("159 tensors of 16", [(16,)] * 159, clock="host"),
]
