"""SimDINO and SimDINOv2: Wu et al. 2025, arXiv 2502.10385."""

from dataclasses import replace

import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.hidden import hidden_rows
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP, init_as_vision_transformer


class SimDINO(Method):
    """DINO without prototypes, centring and temperatures: views have the momentum encoder's features of the other large
    views, and the features' coding rate is large.

    eps: the coding rate's distortion. coefficient: weight of the similarities.
    expansion: whose rate it is: "student", or "mean" of student and teacher.
    """

    about = About("self-distillation", "the features' coding rate is large", "Wu et al. 2025, arXiv 2502.10385")
    views = Views(large=2, small=10, recipe="dino")
    refuses = {
        "no_momentum_encoder": "isn't known to learn without its momentum encoder, whose features are its targets",
    }
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw",
        1e-3 / 2**0.5,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.996,
        drop_path=0.1,
        source="README's run of simdino/main_dino.py: AdamW, 1e-3 at batch 512, wd 0.04 to 0.4, clip 3",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        eps: float = 0.05,
        coefficient: float = 1.0,
        expansion: str = "mean",
        norm: str = "auto",
    ):
        super().__init__(width, run)
        ranges.positive(type(self).__name__.lower(), eps=eps)
        ranges.not_negative(type(self).__name__.lower(), coefficient=coefficient)
        if expansion not in ("student", "mean"):
            raise ValueError(f"simdino: expansion must be student or mean, got {expansion!r}")
        if norm == "auto":
            norm = "batch" if run.batch_norm else "none"
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, dim), norm=norm, activation=nn.GELU)
        init_as_vision_transformer(self.projector)
        self.eps = eps
        self.coefficient = coefficient
        self.expansion = expansion

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor | dict[str, Tensor]:
        x = student.project(batch.views)
        with torch.no_grad():
            y = teacher.project(batch.views[: self.views.large])
        return self._of_images(x, y, len(batch.index))

    def _of_images(self, x: Tensor, y: Tensor, images: int) -> Tensor:
        """Of features [V B, D] and the teacher's [T B, D], of the large views."""
        return F.simdino(
            x.split(images),
            y.split(images),
            eps=self.eps,
            coefficient=self.coefficient,
            expansion=self.expansion,
            group=self.run.group,
        )


class SimDINOv2(SimDINO):
    """SimDINO, and beside it iBOT's: where blocks of a large view are hidden from the student, it has the teacher's
    features of these patches.

    mask, least_mask, masked_images: as for iBOT. patch_weight: of the patches' similarities.
    """

    about = About(
        "self-distillation, masked prediction",
        "the features' coding rate is large",
        "Wu et al. 2025, arXiv 2502.10385",
    )
    views = Views(large=2, small=10, recipe="dino", mask=0.5, least_mask=0.1, masking="block", masked_images=0.5)
    mask_token = True
    defaults = Defaults(
        "adamw",
        2e-3,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.9,
        drop_path=0.2,
        layer_decay=0.9,
        patch_embed_rate=0.2,
        source="simdino_config.yaml: AdamW, 4e-3 at batch 1024, wd 0.04 to 0.4; momentum encoder 0.9 to 1",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        eps: float = 0.05,
        coefficient: float = 1.0,
        expansion: str = "mean",
        mask: float = 0.5,
        least_mask: float = 0.1,
        masked_images: float = 0.5,
        patch_weight: float = 1.0,
        norm: str = "none",
    ):
        super().__init__(
            width, run, hidden=hidden, dim=dim, eps=eps, coefficient=coefficient, expansion=expansion, norm=norm
        )
        ranges.block_masks("simdinov2", mask, least_mask, masked_images)
        ranges.not_negative("simdinov2", patch_weight=patch_weight)
        self.views = replace(self.views, mask=mask, least_mask=least_mask, masked_images=masked_images)
        self.patch_weight = patch_weight

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        large = batch.views[: self.views.large]
        seen = student.encode(large, batch.masks)
        pooled = seen.pooled
        if rest := batch.views[self.views.large :]:
            pooled = torch.cat([pooled, student.encode(rest).pooled])
        rows = hidden_rows(batch, self.views)
        assert seen.tokens is not None  # masks are for transformers, which have them
        x, patches = rows.through(student.projector, pooled, seen.tokens)
        with torch.no_grad():
            whole = teacher.encode(large, tokens=True)
            assert whole.tokens is not None
            y, targets = rows.through(teacher.projector, whole.pooled, whole.tokens)
        student.note(projection=x.detach()[: len(batch.index)])
        of_patches = rows.mean_over_images(
            lambda weights: self.coefficient * F.negative_cosine(patches, targets, weights=weights), patches
        )
        return {"images": self._of_images(x, y, len(batch.index)), "patches": self.patch_weight * of_patches}
