"""A small call of every public function and module for any batch size: for tests of what goes on around the losses.

Of torch.compile (how many graphs), gradient checkpointing, forward mode. What the losses compute is in cases.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem import nn

D, K = 8, 12


@dataclass(frozen=True)
class Call:
    """`make(batch)` gives the tensors, those that are differentiated as leaves that require a gradient.

    `fresh()` gives what to call with them: a module's state (a centre, a queue) is as new.
    """

    make: Callable[[int], list[Tensor]]
    call: Callable[..., Tensor]
    differentiable: bool = True
    module: Callable[[], torch.nn.Module] | None = None  # made anew and given to `call` first

    def fresh(self) -> Callable[..., Tensor]:
        if self.module is None:
            return self.call
        torch.manual_seed(0)
        return partial(self.call, self.module())


def _module(make: Callable[[int], list[Tensor]], module: Callable[[], torch.nn.Module], call=None, **options) -> Call:
    return Call(make, call or (lambda module, *x: module(*x)), module=module, **options)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def _two(b: int) -> list[Tensor]:
    return [leaf(b, D), leaf(b, D)]


def _scores(count: int, width: int = K) -> Callable[[int], list[Tensor]]:
    return lambda b: [leaf(b, width) for _ in range(count)]


def _labelled(b: int) -> list[Tensor]:
    return [leaf(2, b, D), torch.arange(b) % 3]


def _with_scale(b: int) -> list[Tensor]:
    return [*_two(b), torch.tensor(10.0, requires_grad=True)]


def _with_scale_and_bias(b: int) -> list[Tensor]:
    return [*_with_scale(b), torch.tensor(-10.0, requires_grad=True)]


def _masked_patches(b: int) -> list[Tensor]:
    """One masked patch an image, and two of the first."""
    mask = torch.zeros(b, 3, 3, dtype=torch.bool)
    mask[:, 0, 0] = True
    mask[0, 1, 1] = True
    return [torch.randn(b + 1, K), leaf(b + 1, K), mask]


def _anchors(b: int) -> list[Tensor]:
    return [leaf(2 * b, D), torch.randn(b, D), leaf(K, D)]


def _table(b: int) -> Tensor:
    """Parameters of an augmentation that cuts a window and does nothing else."""
    return torch.tensor([0.0, 0, 6, 6, 0, 1, 1, 1, 0, 0, 0, 0, 0]).repeat(b, 1)


def _views(function: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    """Half of the inputs are the student's views, the other half the teacher's."""
    return lambda *x: function(list(x[: len(x) // 2]), list(x[len(x) // 2 :]), **options)


TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}

FUNCTIONS = {
    "nt_xent": Call(_two, lambda a, b: F.nt_xent(a, b, temperature=0.2)),
    "dcl": Call(_two, F.dcl),
    "dclw": Call(_two, F.dclw),
    "supcon": Call(_labelled, F.supcon),
    "supcon-one": Call(_labelled, lambda z, y: F.supcon(z, y, anchors="one", normalize=False)),
    "supcon-options": Call(_labelled, lambda z, y: F.supcon(z, y, hardness=0.5, temperature=0.5)),
    "supcon-mask": Call(lambda b: [leaf(2, b, D), torch.rand(b, b)], lambda z, m: F.supcon(z, mask=m)),
    "info_nce": Call(lambda b: [*_two(b), torch.randn(20, D)], F.info_nce),
    "info_nce-offset": Call(lambda b: [*_two(b), leaf(2 * b, D)], lambda a, b, q: F.info_nce(a, b, q, label_offset=0)),
    "info_nce-learned": Call(
        lambda b: [*_two(b), leaf(20, D), torch.tensor(0.2, requires_grad=True)],
        lambda a, b, q, t: F.info_nce(a, b, q, temperature=t),
    ),
    "nt_xent-options": Call(
        lambda b: [*_two(b), torch.arange(b) % 5, torch.rand(b), torch.full((), 0.4, requires_grad=True)],
        lambda a, b, ids, w, t: F.nt_xent(a, b, temperature=t, ids=ids, weights=w, label_smoothing=0.1, prior=0.1),
    ),
    "info_nce-options": Call(
        lambda b: [*_two(b), leaf(20, D), torch.rand(b, 20) < 0.2, torch.rand(b) + 0.2, leaf(b, 2, D)],
        lambda a, b, q, mask, t, hard: F.info_nce(a, b, q, exclude=mask, temperature=t, hard_negatives=hard),
    ),
    "clip_loss-options": Call(
        lambda b: [*_with_scale(b), torch.arange(b) % 5],
        lambda a, b, s, ids: F.clip_loss(a, b, s, ids=ids, reduction="sum", false_negative_margin=2.0, hardness=0.5),
    ),
    "nt_xent-dims": Call(
        _two,
        lambda a, b: F.nt_xent(a, b, dims=(2, 4, D), dim_weights=(0.5, 1.0, 2.0)),
    ),
    "clip_loss-dims": Call(_with_scale, lambda a, b, s: F.clip_loss(a, b, s, dims=(3, D))),
    "nnclr": Call(lambda b: [*_two(b), *_two(b), torch.randn(20, D)], F.nnclr),
    "siglip_loss-ids": Call(
        lambda b: [*_with_scale_and_bias(b), torch.arange(b) % 3],
        lambda a, b, s, t, i: F.siglip_loss(a, b, s, t, ids=i),
    ),
    "nearest_neighbors": Call(lambda b: [torch.randn(b, D), torch.randn(20, D)], F.nearest_neighbors, False),
    "clip_loss": Call(_with_scale, F.clip_loss),
    "clip_loss-number": Call(_two, lambda a, b: F.clip_loss(a, b, 10.0)),
    "siglip_loss": Call(_with_scale_and_bias, F.siglip_loss),
    "negative_cosine": Call(_two, F.negative_cosine),
    "regression": Call(lambda b: [leaf(b, D), torch.randn(b, D)], F.regression),
    "regression-rows": Call(
        lambda b: [leaf(b, D), torch.randn(b, D), torch.arange(b), torch.rand(b)],
        lambda p, t, rows, weights: F.regression(p, t, rows=rows, weights=weights),
    ),
    "masked_rows": Call(lambda b: [torch.rand(b, 3, 3) > 0.5], lambda mask: F.masked_rows(mask, 7)[1], False),
    "gram_loss": Call(lambda b: [leaf(b, 5, D), torch.randn(b, 5, D)], F.gram_loss),
    "kmeans": Call(
        lambda b: [torch.randn(b, D), torch.eye(D)[:2]], lambda x, c: F.kmeans(x, c, iterations=2).centroids, False
    ),
    "nearest_rows": Call(
        lambda b: [torch.randn(b, D), torch.randn(20, D)], lambda q, bank: F.nearest_rows(q, bank, k=3)[0], False
    ),
    "knn_votes": Call(
        lambda b: [torch.randn(b, D), torch.randn(20, D), torch.arange(20) % 3],
        lambda q, bank, labels: F.knn_votes(q, bank, labels, classes=3, k=5),
        False,
    ),
    "barlow_twins": Call(_two, F.barlow_twins),
    "vicreg": Call(_two, F.vicreg),
    "vicreg-health": Call(_two, lambda a, b: F.vicreg(a, b, health=F.Health())),
    "tico": Call(_two, lambda a, b: F.tico(a, b)[0]),
    "sigreg": Call(lambda b: [leaf(b, D), torch.randn(D, 6)], F.sigreg),
    "lejepa": Call(lambda b: [leaf(2, b, D), leaf(2, b, D), torch.randn(D, 6)], F.lejepa),
    "visreg": Call(lambda b: [leaf(2, b, D), leaf(2, b, D), torch.randn(D, 6)], F.visreg),
    "prototype_cross_entropy": Call(
        lambda b: [leaf(b, K), leaf(b, K), torch.randn(b, K), torch.randn(b, K)],
        _views(F.prototype_cross_entropy, **TEMPERATURES),
    ),
    "prototype_cross_entropy-all": Call(
        lambda b: [leaf(b, K), leaf(b, K), torch.randn(b, K), torch.randn(K), torch.rand(b)],
        lambda s, r, t, bias, weights: F.prototype_cross_entropy(
            [s, r], [t], teacher_bias=bias, weights=weights, pairs="all", statistics=True, **TEMPERATURES
        )[0],
    ),
    "prototype_head_cross_entropy": Call(
        lambda b: [leaf(b, D), leaf(b, D), torch.randn(b, D), torch.randn(b, D), leaf(K, D), torch.randn(K, D)],
        lambda s, r, t, u, w, v: F.prototype_head_cross_entropy([s, r], [t, u], w, v, **TEMPERATURES),
    ),
    "koleo": Call(lambda b: [leaf(b, D)], F.koleo),
    "mean_entropy": Call(_scores(1), F.mean_entropy),
    "sinkhorn": Call(lambda b: [torch.randn(b, K)], F.sinkhorn, False),
    "sinkhorn-positions": Call(
        lambda b: [torch.randn(b, 3, K)], lambda x: F.sinkhorn(x.transpose(0, 1)).transpose(0, 1), False
    ),
    "sinkhorn_bias-rows": Call(
        lambda b: [torch.randn(b, K)], lambda x: F.sinkhorn_bias(x, rows=(x[:, 0] < 0.5).sum()), False
    ),
    "sinkhorn_bias": Call(lambda b: [torch.randn(b, K), torch.randn(b + 1, K)], lambda *x: F.sinkhorn_bias(x), False),
    "total_coding_rate": Call(lambda b: [leaf(b, D)], F.total_coding_rate),
    "simdino": Call(lambda b: [leaf(b, D), leaf(b, D), torch.randn(b, D)], lambda s, r, t: F.simdino([s, r], [t])),
    "emp_ssl": Call(lambda b: [leaf(3, b, D)], F.emp_ssl),
    "mmcr": Call(lambda b: [leaf(b, 2, D), leaf(b, 2, D)], F.mmcr),
    "frossl": Call(_two, lambda *x: F.frossl(x)),
    "whiten": Call(lambda b: [leaf(b, D)], lambda x: F.whiten(x, eps=0.1)[0].pow(3).sum()),
    "w_mse": Call(_two, lambda a, b: F.w_mse(a, b, eps=0.1)),
    "cross_entropy-rows": Call(
        lambda b: [leaf(b, K), torch.arange(b) % K, torch.rand(b) + 0.1],
        lambda x, y, w: (F.cross_entropy(x, y, weights=w, reduction="none", label_smoothing=0.1) * w).sum(),
    ),
    "cross_entropy-weights": Call(
        lambda b: [leaf(b, K), torch.arange(b) % K, torch.rand(b) + 0.1],
        lambda x, y, w: F.cross_entropy(x, y, weights=w, label_smoothing=0.1),
    ),
    "negative_cosine-rows": Call(
        lambda b: [*_two(b), torch.rand(b) + 0.1],
        lambda p, z, w: (F.negative_cosine(p, z, weights=w, reduction="none") * w).sum(),
    ),
    "cross_entropy": Call(lambda b: [leaf(b, K), torch.arange(b) % K], F.cross_entropy),
    "augment": Call(
        lambda b: [torch.randint(0, 255, (b, 8, 8, 3), dtype=torch.uint8), _table(b)],
        lambda x, p: F.augment(x, p, mean=[0.5] * 3, std=[0.5] * 3),
        False,
    ),
    "augment-floats": Call(
        lambda b: [torch.rand(b, 8, 8, 5) * 255, _table(b)],
        lambda x, p: F.augment(x, p, mean=[0.5] * 5, std=[0.5] * 5),
        False,
    ),
    "crop_resize-floats": Call(
        lambda b: [torch.rand(6, 8, 8, 5) * 255, torch.arange(b) % 6, _table(b)],
        lambda x, i, p: F.crop_resize(x, i, p, size=4),
        False,
    ),
    "crop_resize": Call(
        lambda b: [torch.randint(0, 255, (6, 8, 8, 3), dtype=torch.uint8), torch.arange(b) % 6, _table(b)],
        lambda x, i, p: F.crop_resize(x, i, p, size=4),
        False,
    ),
}


def _regions(count: int) -> Callable[[int], list[Tensor]]:
    """Features of 4 regions an image, and which regions these are, twice."""
    return lambda b: [*(leaf(b, 4, D) for _ in range(count)), *torch.randint(5, (2, b, 4))]


def _scale() -> Tensor:
    return torch.tensor(2.0, requires_grad=True)


def _dino(call: Callable[..., Tensor], **options) -> Call:
    def of_views(module: torch.nn.Module, *x: Tensor) -> Tensor:
        return call(module, list(x[2:]), list(x[:2]))

    return _module(_scores(4), lambda: nn.DINOLoss(K, **options), of_views)


MODULES = {
    "NTXentLoss": _module(_two, nn.NTXentLoss),
    "NTXentLoss-bank": _module(_two, lambda: nn.NTXentLoss(memory_bank_size=(32, D))),
    "DCLLoss": _module(_two, nn.DCLLoss),
    "DCLWLoss": _module(_two, nn.DCLWLoss),
    "SupConLoss": _module(lambda b: [leaf(b, 2, D), torch.arange(b) % 3], nn.SupConLoss),
    "ClipLoss": _module(_with_scale_and_bias, nn.ClipLoss),
    "SigLipLoss": _module(_with_scale_and_bias, nn.SigLipLoss),
    "BarlowTwinsLoss": _module(_two, nn.BarlowTwinsLoss),
    "VICRegLoss": _module(_two, lambda: nn.VICRegLoss(track_health=True)),
    "VICRegLLoss": _module(
        lambda b: [leaf(b, D), leaf(b, D), leaf(b, 3, 3, D), leaf(b, 3, 3, D), *torch.rand(2, b, 3, 3, 2)],
        lambda: nn.VICRegLLoss(num_matches=(3, 2)),
        lambda loss, z0, z1, m0, m1, *grids: loss([(z0, m0), (z1, m1)], grids),
    ),
    "TiCoLoss": _module(_two, nn.TiCoLoss),
    "DINOLoss": _dino(lambda loss, t, s: loss(t, s)),
    "DINOLoss-epoch": _dino(lambda loss, t, s: loss(t, s, epoch=3)),
    "DINOLoss-tensor": _dino(lambda loss, t, s: loss(t, s, teacher_temp=t[0].new_full((), 0.05))),
    "DINOLoss-sinkhorn": _dino(lambda loss, t, s: loss(t, s), centering="sinkhorn"),
    "DINOLoss-deferred": _dino(lambda loss, t, s: loss(t, s), defer_center_update=True),
    "IBOTPatchLoss": _module(_masked_patches, lambda: nn.IBOTPatchLoss(K)),
    "IBOTPatchLoss-sinkhorn": _module(_masked_patches, lambda: nn.IBOTPatchLoss(K, centering="sinkhorn")),
    "SIGReg": _module(lambda b: [leaf(b, D)], lambda: nn.SIGReg(num_vectors=6)),
    "LeJEPALoss": _module(
        lambda b: [leaf(2, b, D), leaf(2, b, D)],
        lambda: nn.LeJEPALoss(sigreg_num_vectors=6),
        lambda loss, a, b: loss(local_proj=a, global_proj=b),
    ),
    "VISRegLoss": _module(
        lambda b: [leaf(2, b, D), leaf(2, b, D)],
        lambda: nn.VISRegLoss(num_slices=6),
        lambda loss, a, b: loss(local_proj=a, global_proj=b),
    ),
    "CAPILoss": _module(lambda b: [torch.randn(b, 3, K), leaf(b, 3, K)], nn.CAPILoss),
    "NegativeCosineSimilarity": _module(_two, nn.NegativeCosineSimilarity),
    "SwaVLoss": _module(
        lambda b: [*_scores(3)(b), *torch.randn(2, 5, K)], nn.SwaVLoss, lambda loss, a, b, c, *q: loss([a, b], [c], q)
    ),
    "MSNLoss": _module(_anchors, nn.MSNLoss),
    "PMSNLoss": _module(_anchors, nn.PMSNLoss),
    "PMSNCustomLoss": _module(_anchors, lambda: nn.PMSNCustomLoss(lambda p: torch.full_like(p, 1 / len(p)))),
    "KoLeoLoss": _module(lambda b: [leaf(b, D)], nn.KoLeoLoss),
    "GramLoss": _module(lambda b: [leaf(b, 5, D), torch.randn(b, 5, D)], nn.GramLoss),
    "SimDINOLoss": _module(_scores(3), nn.SimDINOLoss, lambda loss, s, r, t: loss([t], [s, r])),
    "SMoGPrototypes": _module(
        lambda b: [leaf(b, D)],
        lambda: nn.SMoGPrototypes(torch.arange(4.0 * D).view(4, D).sin(), 0.9),
        lambda groups, x: groups(x, groups.group_features).logsumexp(1).mean(),
    ),
    "EMPSSLLoss": _module(_two, nn.EMPSSLLoss, lambda loss, *x: loss(x)),
    "NNCLRLoss": _module(lambda b: [leaf(b, D) for _ in range(4)], lambda: nn.NNCLRLoss(memory_bank_size=(32, D))),
    # Two parts of six images, of a batch that has others, too: parts divide the batch.
    "WMSELoss": _module(
        _two, lambda: nn.WMSELoss(3, w_size=6), lambda loss, a, b: loss(torch.cat([a, b]).view(-1, 4)[:24, :3])
    ),
    "MMCRLoss": _module(lambda b: [leaf(b, 2, D), leaf(b, 2, D)], nn.MMCRLoss),
    "FroSSLLoss": _module(_two, nn.FroSSLLoss, lambda loss, *x: loss(x)),
    "Whitening2d": _module(lambda b: [leaf(b, D)], lambda: nn.Whitening2d(D, eps=0.1), lambda w, x: w(x).pow(3).sum()),
    "DetConBLoss": _module(_regions(4), nn.DetConBLoss),
    "DetConSLoss": _module(_regions(2), nn.DetConSLoss),
    "DirectCLRLoss": _module(_two, lambda: nn.DirectCLRLoss(D - 1)),
    "HypersphereLoss": _module(_two, nn.HypersphereLoss),
    "MACLLoss": _module(_two, nn.MACLLoss),
    "SymNegCosineSimilarityLoss": _module(
        lambda b: [leaf(b, D) for _ in range(4)],
        nn.SymNegCosineSimilarityLoss,
        lambda loss, z0, p0, z1, p1: loss((z0, p0), (z1, p1)),
    ),
    "LeWMLoss": _module(
        lambda b: [leaf(b, 2, D), torch.randn(b, 2, D), leaf(b, 3, D)],
        lambda: nn.LeWMLoss(sigreg_num_vectors=6),
        lambda loss, p, t, e: loss(predicted=p, target=t, embeddings=e),
    ),
    "PatchKernelAlignmentLoss": _module(lambda b: [leaf(b, 5, D), torch.randn(b, 5, D)], nn.PatchKernelAlignmentLoss),
    "IBOTPlusPlusPatchLoss": _module(
        lambda b: [torch.randn(b, 6, K), leaf(b, 6, K), torch.rand(b, 6) < 0.5], lambda: nn.IBOTPlusPlusPatchLoss(K)
    ),
    "CoCaLoss": _module(
        lambda b: [leaf(b, D), leaf(b, D), leaf(b, 5, 7), torch.randint(1, 7, (b, 5)), _scale()],
        lambda: nn.CoCaLoss(2.0, 1.0),
        lambda loss, *x: sum(loss(*x)),
    ),
    "DistillClipLoss": _module(
        lambda b: [leaf(b, D), leaf(b, D), _scale(), torch.randn(b, D), torch.randn(b, D), torch.tensor(3.0)],
        nn.DistillClipLoss,
        lambda loss, *x: sum(loss(*x)),
    ),
    "MemoryBankModule": _module(
        lambda b: [torch.randn(b, D)],
        lambda: nn.MemoryBankModule((32, D)),
        lambda bank, x: bank(x, update=True)[1],
        differentiable=False,
    ),
    "NNMemoryBankModule": _module(
        lambda b: [torch.randn(b, D)],
        lambda: nn.NNMemoryBankModule((32, D)),
        lambda bank, x: bank(x, update=True),
        differentiable=False,
    ),
}
CALLS = FUNCTIONS | MODULES
