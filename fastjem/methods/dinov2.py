"""DINOv2: Oquab et al. 2023, arXiv 2304.07193."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.encoders import Features
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.ibot import IBOT
from fastjem.methods.protocol import About, Branch, RunFacts


class DINOv2(IBOT):
    """iBOT with 65,536 prototypes, Sinkhorn in place of a running mean by option, and KoLeo, which spreads a batch's
    embeddings.

    koleo: weight of KoLeo, which is of each rank's images, as in its code: each is driven from the nearest of a few.
    Other options are iBOT's.
    """

    about = About(
        "self-distillation, masked prediction",
        "centred and sharpened teacher, KoLeo",
        "Oquab et al. 2023, arXiv 2304.07193",
    )
    views = Views(large=2, small=8, recipe="dinov2", mask=0.5, least_mask=0.1, masking="block", masked_images=0.5)
    defaults = Defaults(
        "adamw",
        2e-3,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.992,
        drop_path=0.1,
        deep_drop_path=0.3,
        layer_decay=0.9,
        patch_embed_rate=0.2,
        source="ssl_default_config.yaml: AdamW, 4e-3 at batch 1024 (square root), wd 0.04 to 0.4, clip 3",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        patch_prototypes: int = 65536,
        shared: bool = True,
        temperature: float = 0.1,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        warmup_epochs: float = 30,
        frozen_epochs: float = 1,
        centring: str = "mean",
        centre_momentum: float = 0.9,
        mask: float = 0.5,
        least_mask: float = 0.1,
        masked_images: float = 0.5,
        patch_weight: float = 1.0,
        koleo: float = 0.1,
        norm: str = "none",
    ):
        super().__init__(
            width,
            run,
            hidden=hidden,
            bottleneck=bottleneck,
            prototypes=prototypes,
            patch_prototypes=patch_prototypes,
            shared=shared,
            temperature=temperature,
            warmup_teacher_temperature=warmup_teacher_temperature,
            teacher_temperature=teacher_temperature,
            warmup_epochs=warmup_epochs,
            frozen_epochs=frozen_epochs,
            centring=centring,
            centre_momentum=centre_momentum,
            mask=mask,
            least_mask=least_mask,
            masked_images=masked_images,
            patch_weight=patch_weight,
            norm=norm,
        )
        ranges.not_negative(type(self).__name__.lower(), koleo=koleo)
        self.koleo = koleo

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
        if self.koleo:
            views = seen.pooled.chunk(self.views.large)  # views of one image shall not be driven apart
            losses["koleo"] = self.koleo * torch.stack([F.koleo(view) for view in views]).sum()
        return losses
