"""Losses on the spectrum of embeddings as modules, with lightly's names, arguments and defaults."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.collectives import check_distributed, default_group
from fastjem.functional import checks
from fastjem.ops.transforms import refuse_vmap


class EMPSSLLoss(nn.Module):
    """`fastjem.functional.emp_ssl` of a list of views [N, D].

    The coding rate is *maximised*, as in the paper and the official code (lightly 1.6 adds it, and so shrinks it).

    Args:
        tcr_eps: the coding rate's distortion.
        inv_coef: weight of the invariance.
    """

    def __init__(self, tcr_eps: float = 0.2, inv_coef: float = 200.0):
        super().__init__()
        self.tcr_eps = tcr_eps
        self.inv_coef = inv_coef

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        return F.emp_ssl(torch.stack(list(z_views)), eps=self.tcr_eps, invariance=self.inv_coef)


class SimDINOLoss(nn.Module):
    """`fastjem.functional.simdino`: what views have in common, and the coding rate in place of prototypes.

    Wu et al. 2025, arXiv 2502.10385.

    Args:
        eps: the coding rate's distortion.
        coefficient: weight of the similarities.
        expansion: see `fastjem.functional.simdino`.
        gather_distributed: both terms over the samples of all ranks.
    """

    def __init__(
        self,
        eps: float = 0.05,
        coefficient: float = 1.0,
        expansion: str = "student",
        gather_distributed: bool = False,
    ):
        super().__init__()
        check_distributed("SimDINOLoss", gather_distributed)
        self.eps = eps
        self.coefficient = coefficient
        self.expansion = expansion
        self.gather_distributed = gather_distributed

    def forward(self, teacher_out: Sequence[Tensor], student_out: Sequence[Tensor]) -> Tensor:
        """0-dim. Features [B, D] of each view, as `DINOLoss` takes scores; the teacher's get no gradient."""
        return F.simdino(
            list(student_out),
            list(teacher_out),
            eps=self.eps,
            coefficient=self.coefficient,
            expansion=self.expansion,
            group=default_group(self.gather_distributed),
        )


class MMCRLoss(nn.Module):
    """`fastjem.functional.mmcr` of online and momentum views, [B, V, D] each.

    Args:
        lmda: weight of the images' own manifolds.
    """

    def __init__(self, lmda: float = 5e-3):
        super().__init__()
        self.lmda = checks.number("MMCRLoss", "lmda", lmda, low=0, inclusive=True)

    def forward(self, online: Tensor, momentum: Tensor) -> Tensor:
        return F.mmcr(online, momentum, lmda=self.lmda)


class FroSSLLoss(nn.Module):
    """`fastjem.functional.frossl` of a list of views [N, D].

    Args:
        invariance_weight: weight of the invariance.
    """

    def __init__(self, invariance_weight: float = 1.0):
        super().__init__()
        self.invariance_weight = invariance_weight

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        return F.frossl(z_views, invariance=self.invariance_weight)


def norm_mse_loss(x0: Tensor, x1: Tensor) -> Tensor:
    """`2 - 2 mean cos(x0, x1)`"""
    return 2 + 2 * F.negative_cosine(x0, x1, eps=1e-12)


class Whitening2d(nn.Module):
    """Rows [N, D] with covariance I (`fastjem.functional.whiten`); with the running mean and covariance in evaluation.

    Args:
        num_features: D.
        momentum: of the running mean and covariance, how much is new at each step.
        track_running_stats: keep them.
        eps: shrinks the covariance to the identity.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, num_features: int, momentum: float = 0.01, track_running_stats: bool = True, eps: float = 0):
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.eps = eps
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(1, num_features, 1, 1))
            self.register_buffer("running_variance", torch.eye(num_features))

    def reset_parameters(self) -> None:
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_variance.copy_(torch.eye(self.num_features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.track_running_stats:
            shrunk = (1 - self.eps) * self.running_variance + self.eps * torch.eye(self.num_features, device=x.device)
            factor = torch.linalg.cholesky_ex(shrunk).L
            return torch.linalg.solve_triangular(factor, (x - self.running_mean.flatten()).T, upper=False).T
        whitened, mean, covariance = F.whiten(x, eps=self.eps)
        if self.track_running_stats:
            refuse_vmap("Whitening2d", self.running_mean, mean)
            momentum = checks.number("Whitening2d", "momentum", self.momentum, x)
            of_batch = (self.running_mean, mean.reshape(1, -1, 1, 1)), (self.running_variance, covariance)
            for running, new in of_batch:
                share = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
                running.lerp_(new.to(running.dtype), share)
        return whitened


class WMSELoss(nn.Module):
    """W-MSE: the views of each sub-batch are whitened and compared (Ermolov et al. 2021, arXiv 2007.06346).

    Args:
        embedding_dim: D.
        momentum, eps, track_running_stats: see `Whitening2d`.
        w_iter: how many random partitions into sub-batches are averaged.
        w_size: images of a sub-batch, which divides the batch; at least 2 D.
        loss_fn: of two whitened views.
        num_samples: views of each image.

    Sub-batches are of this rank's images, whatever the number of ranks, as in the official code and solo-learn.
    """

    def __init__(
        self,
        embedding_dim: int = 128,
        momentum: float = 0.01,
        eps: float = 0.0,
        track_running_stats: bool = True,
        w_iter: int = 1,
        w_size: int = 256,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = norm_mse_loss,
        num_samples: int = 2,
    ):
        super().__init__()
        self.whitening = Whitening2d(embedding_dim, momentum, track_running_stats, eps)
        if w_size < 2 * embedding_dim:
            checks.fail("WMSELoss", f"w_size must be at least twice embedding_dim = {embedding_dim}", w_size)
        self.w_iter = w_iter
        self.w_size = w_size
        self.loss_f = loss_fn
        self.num_samples = num_samples
        self.num_pairs = num_samples * (num_samples - 1) // 2

    def forward(self, input: Tensor) -> Tensor:
        """0-dim, of [num_samples B, D]: all first views, then all second ones, ..."""
        if input.shape[0] % self.num_samples:
            raise RuntimeError(
                f"WMSELoss: input must be a multiple of num_samples = {self.num_samples} rows, got {input.shape[0]}"
            )
        views = input.unflatten(0, (self.num_samples, -1))  # [V, B, D]
        batch = views.shape[1]
        if batch < self.w_size or batch % self.w_size:
            checks.fail("WMSELoss", f"the batch must be a multiple of w_size = {self.w_size} images", batch)
        losses = []
        for _ in range(self.w_iter):
            # The sub-batches stay together: the loss is a mean over images, whose order doesn't matter.
            order = torch.randperm(batch, device=input.device).view(-1, self.w_size)
            parts = [[self.whitening(view[some]) for view in views] for some in order]
            whitened = [torch.cat(view) for view in zip(*parts, strict=True)]
            losses += [self.loss_f(a, b) for i, a in enumerate(whitened) for b in whitened[i + 1 :]]
        return torch.stack(losses).sum() / (self.w_iter * self.num_pairs)
