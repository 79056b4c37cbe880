"""Losses as a user would write them in a few lines of plain torch, of the inputs that calls.py has for ours.

With option_formulas.py, for how many launches such code takes: see test_launches_of_peers.py. `LIGHTLY` names the peers
that are modules of lightly 1.6.0 instead.
"""

from collections.abc import Callable

import option_formulas
import torch
import torch.nn.functional as TF
from calls import D, K
from torch import Tensor


def cross_entropy_of_pairs(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (TF.cross_entropy(logits, labels) + TF.cross_entropy(logits.T, labels)) / 2


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    z = TF.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return TF.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


def of_prefixes(loss: Callable[..., Tensor], x: Tensor, y: Tensor, dims: tuple, weights: tuple) -> Tensor:
    return sum((w * loss(x[:, :d], y[:, :d]) for d, w in zip(dims, weights, strict=True)), torch.zeros(()))


def clip_dims(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy_of_pairs(TF.normalize(a, dim=1), TF.normalize(b, dim=1), scale)

    return of_prefixes(loss, x, y, (3, D), (1.0, 1.0))


def siglip_ids(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    logits = scale * x @ y.T + bias
    together = (ids[:, None] == ids).to(logits)
    return TF.binary_cross_entropy_with_logits(logits, together, reduction="sum") / len(x)


def coding_rate(z: Tensor, eps: float = 0.2) -> Tensor:
    n, d = z.shape[-2:]
    gram = z.mT @ z if d <= n else z @ z.mT
    identity = torch.eye(gram.shape[-1], device=z.device)
    return torch.linalg.slogdet(identity + d / (n * eps) * gram)[1].mean() / 2


def emp_ssl(z: Tensor) -> Tensor:
    return -coding_rate(z) - 200 * TF.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()


def simdino(a: Tensor, b: Tensor, teacher: Tensor) -> Tensor:
    a, b, teacher = (TF.normalize(x, dim=1) for x in (a, b, teacher))
    n, d = a.shape
    return -(b * teacher).sum(1).mean() - coding_rate(a, 0.05) * (d + n) / (d * n)


def mmcr(online: Tensor, momentum: Tensor) -> Tensor:
    z = torch.cat([online, momentum], 1)
    return 5e-3 * torch.linalg.svdvals(z).sum() / len(z) - torch.linalg.svdvals(z.mean(1)).sum()


def whitened(x: Tensor, eps: float = 0.1) -> Tensor:
    x = x - x.mean(0)
    covariance = (1 - eps) * x.T @ x / (len(x) - 1) + eps * torch.eye(x.shape[1], device=x.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(covariance).L, x.T, upper=False).T


def w_mse(a: Tensor, b: Tensor) -> Tensor:
    return 2 - 2 * TF.cosine_similarity(whitened(a), whitened(b)).mean()


def smoothed(x: Tensor, labels: Tensor) -> Tensor:
    return TF.cross_entropy(x, labels, reduction="none", label_smoothing=0.1)


def gram_loss(x: Tensor, y: Tensor) -> Tensor:
    x, y = (TF.normalize(z, dim=-1) for z in (x, y))
    return TF.mse_loss(x @ x.mT, y @ y.mT)


def hypersphere(a: Tensor, b: Tensor) -> Tensor:
    x, y = TF.normalize(a), TF.normalize(b)
    uniformity = [torch.pdist(z).pow(2).neg().exp().mean().log() for z in (x, y)]
    return (x - y).norm(dim=1).pow(2).mean() + sum(uniformity) / 2


PLAIN: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.2),
    "nt_xent-options": lambda a, b, ids, weights, t: option_formulas.nt_xent(
        torch.stack([a, b]), t, ids=ids, weights=weights, label_smoothing=0.1, prior=0.1
    ),
    "info_nce-options": lambda a, b, q, exclude, t, hard: option_formulas.info_nce(
        a, b, q, t, exclude=exclude, hard_negatives=hard
    ),
    "clip_loss-options": lambda a, b, scale, ids: option_formulas.clip_loss(
        a, b, scale, ids=ids, reduction="sum", false_negative_margin=2.0, hardness=0.5
    ),
    "nt_xent-dims": lambda a, b: of_prefixes(nt_xent, a, b, (2, 4, D), (0.5, 1.0, 2.0)),
    "clip_loss": cross_entropy_of_pairs,
    "clip_loss-dims": clip_dims,
    "siglip_loss-ids": siglip_ids,
    "total_coding_rate": coding_rate,
    "emp_ssl": emp_ssl,
    "simdino": simdino,
    "mmcr": mmcr,
    "whiten": lambda x: whitened(x).pow(3).sum(),
    "w_mse": w_mse,
    "cross_entropy": TF.cross_entropy,
    "cross_entropy-rows": lambda x, y, w: (smoothed(x, y) * w * w).sum(),
    "cross_entropy-weights": lambda x, y, w: (smoothed(x, y) * w).sum() / w.sum(),
    "negative_cosine": lambda p, z: -TF.cosine_similarity(p, z, dim=1).mean(),
    "negative_cosine-rows": lambda p, z, w: -(TF.cosine_similarity(p, z, dim=1) * w * w).sum(),
    "regression": lambda p, t: TF.smooth_l1_loss(p, TF.layer_norm(t, t.shape[1:])),
    "gram_loss": gram_loss,
    "HypersphereLoss": hypersphere,
}

LIGHTLY: dict[str, Callable[[], torch.nn.Module]] = {}
try:
    import lightly.loss as theirs
    from lightly.loss.hypersphere_loss import HypersphereLoss
except ImportError:
    pass
else:
    LIGHTLY = {
        "NTXentLoss": theirs.NTXentLoss,
        "NTXentLoss-bank": lambda: theirs.NTXentLoss(memory_bank_size=(32, D)),
        "DCLLoss": theirs.DCLLoss,
        "DCLWLoss": theirs.DCLWLoss,
        "BarlowTwinsLoss": theirs.BarlowTwinsLoss,
        "VICRegLoss": theirs.VICRegLoss,
        "VICRegLLoss": lambda: theirs.VICRegLLoss(num_matches=(3, 2)),
        "TiCoLoss": theirs.TiCoLoss,
        "DINOLoss": lambda: theirs.DINOLoss(K),
        "IBOTPatchLoss": lambda: theirs.IBOTPatchLoss(K),
        "IBOTPlusPlusPatchLoss": lambda: theirs.IBOTPlusPlusPatchLoss(K),
        "SIGReg": lambda: theirs.SIGReg(num_vectors=6),
        "LeJEPALoss": lambda: theirs.LeJEPALoss(sigreg_num_vectors=6),
        "LeWMLoss": lambda: theirs.LeWMLoss(sigreg_num_vectors=6),
        "VISRegLoss": lambda: theirs.VISRegLoss(num_slices=6),
        "CAPILoss": theirs.CAPILoss,
        "NegativeCosineSimilarity": theirs.NegativeCosineSimilarity,
        "SwaVLoss": theirs.SwaVLoss,
        "MSNLoss": theirs.MSNLoss,
        "PMSNLoss": theirs.PMSNLoss,
        "PMSNCustomLoss": lambda: theirs.PMSNCustomLoss(lambda p: torch.full_like(p, 1 / len(p))),
        "KoLeoLoss": theirs.KoLeoLoss,
        "EMPSSLLoss": theirs.EMPSSLLoss,
        "WMSELoss": lambda: theirs.WMSELoss(3, w_size=6),
        "MMCRLoss": theirs.MMCRLoss,
        "FroSSLLoss": theirs.FroSSLLoss,
        "DetConBLoss": theirs.DetConBLoss,
        "DetConSLoss": theirs.DetConSLoss,
        "DirectCLRLoss": lambda: theirs.DirectCLRLoss(D - 1),
        "HypersphereLoss": HypersphereLoss,
        "MACLLoss": theirs.MACLLoss,
        "PatchKernelAlignmentLoss": theirs.PatchKernelAlignmentLoss,
    }
