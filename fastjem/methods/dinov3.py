"""DINOv3's Gram anchoring: Siméoni et al. 2025, arXiv 2508.10104, written from the paper."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.encoders import Features
from fastjem.given import Given
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.dinov2 import DINOv2
from fastjem.methods.protocol import About, Branch, RunFacts
from fastjem.methods.transformer import rows_and_columns


class DINOv3(DINOv2):
    """DINOv2 with a head of each loss's own and Sinkhorn, and Gram anchoring: the similarities between an image's
    patches stay those that an earlier model, the Gram teacher with given weights, has.

    given: the Gram teacher: a run folder, an export, or timm's weights; empty: no Gram anchoring.
    teacher: of a run that is given, its momentum encoder in place of the trained one, as in the paper.
    gram_weight: of it. gram_from: the share of the run from which on it counts.
    gram_size: pixels of the shorter side of the Gram teacher's images, 0 as they come; of larger ones its map of
    patches is made smaller.
    koleo: weight of KoLeo, which is of each rank's images.
    """

    about = About(
        "self-distillation, masked prediction",
        "Sinkhorn's targets use all prototypes equally, KoLeo",
        "Siméoni et al. 2025, arXiv 2508.10104",
    )
    views = replace(DINOv2.views, recipe="dinov2_intended")
    defaults = Defaults(
        "adamw",
        5e-4,
        0.04,
        clip=3.0,
        momentum=0.994,
        final_momentum=0.994,
        drop_path=0.1,
        deep_drop_path=0.3,
        layer_decay=0.9,
        patch_embed_rate=0.2,
        source="appendix C, ViT-L: AdamW, 1e-3 under a square-root rule on batch 1024, wd 0.04, momentum encoder 0.994",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        prototypes: int = 262144,
        patch_prototypes: int = 98304,
        bottleneck: int = 512,
        hidden: int = 2048,
        shared: bool = False,
        centring: str = "sinkhorn",
        koleo: float = 0.1,
        mask: float = 0.5,
        masked_images: float = 0.5,
        given: str = "",
        teacher: bool = False,
        gram_weight: float = 2.0,
        gram_from: float = 0.0,
        gram_size: int = 0,
        norm: str = "none",
    ):
        options: dict[str, Any] = {
            "prototypes": prototypes,
            "patch_prototypes": patch_prototypes,
            "bottleneck": bottleneck,
            "hidden": hidden,
            "shared": shared,
            "centring": centring,
            "koleo": koleo,
            "mask": mask,
            "masked_images": masked_images,
            "norm": norm,
        }
        super().__init__(width, run, **options)
        ranges.not_negative("dinov3", gram_weight=gram_weight)
        ranges.shares("dinov3", gram_from=gram_from)
        self.given = Given(given, gram_size or None, teacher=teacher) if given else None
        self.gram_weight = gram_weight
        self.gram_from = round(gram_from * run.steps)

    def losses(
        self,
        student: Branch,
        teacher: Branch,
        batch: Batch,
        step: Tensor,
        seen: Features,
        small: Tensor | None,
        whole: Features,
    ) -> dict[str, Tensor]:
        losses = super().losses(student, teacher, batch, step, seen, small, whole)
        gram_teacher = self.given
        if gram_teacher is None:
            return losses
        assert seen.tokens is not None
        large = batch.views[: self.views.large]
        given = student.constant(lambda images: gram_teacher(images, self.mean, self.std), large)
        if given.tokens is None:
            raise ValueError("dinov3: the Gram teacher must be a vision transformer, as patches are compared")
        anchor = _on_grid(given.tokens, rows_and_columns(given), rows_and_columns(seen))
        counts = (step >= self.gram_from).to(anchor.dtype)
        losses["gram"] = self.gram_weight * counts * F.gram_loss(seen.tokens, anchor)
        return losses


def _on_grid(tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """[N, L, D] of a grid of patches -> [N, L', D] of a smaller one over the same image, by bicubic interpolation."""
    if grid == wanted:
        return tokens
    maps = tokens.mT.unflatten(2, grid)
    return interpolate(maps, wanted, mode="bicubic", antialias=True).flatten(2).mT
