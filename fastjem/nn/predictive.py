"""Losses between a prediction and a target as modules, with lightly's names, arguments and defaults."""

from torch import Tensor, nn

import fastjem.functional as F


class NegativeCosineSimilarity(nn.Module):
    """`-cosine_similarity(x0, x1, dim, eps).mean()`; detaches nothing.

    Args:
        dim: along which the cosine is taken.
        eps: the least a norm is taken for.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8):
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        if x0.dim() != 2 or self.dim not in (1, -1):
            x0, x1 = (x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim]) for x in (x0, x1))
        if not self.eps:  # a row of zeros has no cosine then: NaN
            return -nn.functional.cosine_similarity(x0, x1, dim=1, eps=0.0).mean()
        return F.negative_cosine(x0, x1, eps=self.eps)


class SymNegCosineSimilarityLoss(nn.Module):
    """`(-cos(p0, z1) - cos(p1, z0)) / 2`, the means over images, of pairs (z, p) of projections and predictions.

    SimSiam's loss of both directions. Projections are constants: they get no gradient.
    """

    def forward(self, out0: tuple[Tensor, Tensor], out1: tuple[Tensor, Tensor]) -> Tensor:
        """Each view's (z, p), [N, D] both -> 0-dim."""
        z0, p0 = out0
        z1, p1 = out1
        return (F.negative_cosine(p0, z1.detach()) + F.negative_cosine(p1, z0.detach())) / 2


class GramLoss(nn.Module):
    """`fastjem.functional.gram_loss` of patch features [B, P, D]: DINOv3's Gram anchoring.

    Args:
        level, normalize, negatives: see `fastjem.functional.gram_loss`.
    """

    def __init__(self, level: str = "image", normalize: bool = True, negatives: str = "keep"):
        super().__init__()
        self.level = level
        self.normalize = normalize
        self.negatives = negatives

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """0-dim; the Gram teacher's features get no gradient."""
        options = {"level": self.level, "normalize": self.normalize, "negatives": self.negatives}
        return F.gram_loss(student, teacher, **options)
