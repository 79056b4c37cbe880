"""iBOT: Zhou et al. 2022, arXiv 2111.07832."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.encoders import Features
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, at_most, frozen_steps
from fastjem.methods.hidden import HiddenRows, hidden_rows
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts
from fastjem.methods.prototypes import TeacherCentre, check_centring, cross_entropy_of_features
from fastjem.nn.parts import MLP, Prototypes, init_as_vision_transformer


class IBOT(Method):
    """DINO, and beside it the same for patches: where blocks of a large view are hidden from the student, it predicts
    the teacher's distribution over prototypes for these patches.

    shared: one head for images and patches; else patches have one of their own ("untied heads").
    mask, least_mask: the largest and the least share of the patches that is hidden in an image with a mask.
    masked_images: the share of the large views that have a mask.
    patch_weight: of the patches' loss.
    """

    about = About(
        "self-distillation, masked prediction", "centred and sharpened teacher", "Zhou et al. 2022, arXiv 2111.07832"
    )
    views = Views(large=2, small=10, recipe="ibot", mask=0.5, least_mask=0.1, masking="block", masked_images=0.5)
    refuses = {
        "no_momentum_encoder": "predicts what its momentum encoder sees of hidden patches, and would be its own target",
    }
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "bottleneck")
    momentum = ("encoder", "projector", "prototypes", "patch_projector", "patch_prototypes")
    mask_token = True
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw",
        1e-3,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.996,
        drop_path=0.1,
        source="main_ibot.py: AdamW, 2e-3 at batch 1024, wd 0.04 to 0.4, clip 3, momentum encoder 0.996 to 1",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 8192,
        patch_prototypes: int = 8192,
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
        norm: str = "none",
    ):
        super().__init__(width, run)
        name = type(self).__name__.lower()
        ranges.positive(
            name,
            temperature=temperature,
            warmup_teacher_temperature=warmup_teacher_temperature,
            teacher_temperature=teacher_temperature,
        )
        ranges.not_negative(
            name,
            warmup_epochs=warmup_epochs,
            frozen_epochs=frozen_epochs,
            patch_weight=patch_weight,
        )
        ranges.shares(name, centre_momentum=centre_momentum)
        check_centring(name, centring)
        ranges.block_masks(name, mask, least_mask, masked_images)
        self.views = replace(self.views, mask=mask, least_mask=least_mask, masked_images=masked_images)
        frozen = frozen_steps(frozen_epochs, run.steps_per_epoch, run.steps)
        centre = {
            "centring": centring,
            "momentum": centre_momentum,
            "first": warmup_teacher_temperature,
            "temperature": teacher_temperature,
            "warmup_steps": round(warmup_epochs * run.steps_per_epoch),  # as DINO's, not hurried in a short run
        }
        count = at_most(prototypes, run.images, each=16)
        widths = self.projector_widths(hidden, hidden, bottleneck)
        self.projector = MLP(width, *widths, norm=norm, activation=nn.GELU)
        self.prototypes = Prototypes(widths[-1], count, frozen)
        self.centre = TeacherCentre(count, **centre)
        self.shared = shared
        patch_count = count if shared else at_most(patch_prototypes, run.images, each=16)
        if shared:
            self.momentum = tuple(part for part in type(self).momentum if not part.startswith("patch_"))
        else:
            self.patch_projector = MLP(width, *widths, norm=norm, activation=nn.GELU)
            self.patch_prototypes = Prototypes(widths[-1], patch_count, frozen)
            init_as_vision_transformer(self.patch_projector)
        init_as_vision_transformer(self.projector)
        self.patch_centre = TeacherCentre(patch_count, **centre)
        self.temperature = temperature
        self.patch_weight = patch_weight

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        large = batch.views[: self.views.large]
        seen = student.encode(large, batch.masks)
        rest = batch.views[self.views.large :]
        small = student.encode(rest).pooled if rest else None
        with torch.no_grad():
            whole = teacher.encode(large, tokens=True)
        return self.losses(student, teacher, batch, step, seen, small, whole)

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
        """The loss of images and that of patches.

        Args:
            seen: the student's features of the large views with their masks.
            small: its embeddings of the small views.
            whole: the teacher's features of the large views.
        """
        assert seen.tokens is not None and whole.tokens is not None  # masks are for transformers, which have them
        images = len(batch.index)
        hidden = hidden_rows(batch, self.views)
        pooled = seen.pooled if small is None else torch.cat([seen.pooled, small])
        x, patches = self._projected(student, hidden, pooled, seen.tokens)
        with torch.no_grad():
            y, targets = self._projected(teacher, hidden, whole.pooled, whole.tokens)
        student.note(projection=x.detach()[:images])
        of_images = self._of_images(student, teacher, x.split(images), y, step)
        of_patches = self._of_patches(student, teacher, hidden, patches, targets, step)
        return {"images": of_images, "patches": self.patch_weight * of_patches}

    def _projected(self, branch: Branch, hidden: HiddenRows, pooled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and hidden patches through their head, in one call where it is the same."""
        if self.shared:
            return hidden.through(branch.projector, pooled, tokens)
        return branch.projector(pooled), branch.patch_projector(hidden.of(tokens))

    def _of_images(self, student: Branch, teacher: Branch, x: Sequence[Tensor], y: Tensor, step: Tensor) -> Tensor:
        """DINO's loss of features [B, D] a view."""
        with torch.no_grad():
            targets = self.centre.sharpened(y, step).chunk(self.views.large)
            prototypes = teacher.prototypes.unit_weight(step)
            bias = self.centre.bias(targets, prototypes, step, self.run.group)
        loss, mean = cross_entropy_of_features(
            [normalize(view, dim=1) for view in x],
            targets,
            student.prototypes.unit_weight(step),
            prototypes,
            student_temperature=self.temperature,
            teacher_temperature=self.centre.temperature,
            teacher_bias=bias,
        )
        self.centre.hold_scores(mean, len(y), step)
        student.note(codes=Codes(targets[0], prototypes, bias, self.centre.temperature))
        return loss

    def _of_patches(
        self, student: Branch, teacher: Branch, hidden: HiddenRows, x: Tensor, y: Tensor, step: Tensor
    ) -> Tensor:
        """The cross-entropy of hidden patches [M, D]."""
        head, teacher_head = student.prototypes, teacher.prototypes
        if not self.shared:
            head, teacher_head = student.patch_prototypes, teacher.patch_prototypes
        with torch.no_grad():
            targets = self.patch_centre.sharpened(y, step)
            prototypes = teacher_head.unit_weight(step)
            bias = torch.empty(0)
            if x.shape[0] or self.run.group is not None:  # Sinkhorn's ranks wait for one without hidden patches, too
                bias = self.patch_centre.bias([targets], prototypes, step, self.run.group, hidden.counted)

        def cross_entropy(weights: Tensor) -> Tensor:
            loss, mean = cross_entropy_of_features(
                [normalize(x, dim=1)],
                [targets],
                head.unit_weight(step),
                prototypes,
                student_temperature=self.temperature,
                teacher_temperature=self.patch_centre.temperature,
                teacher_bias=bias,
                pairs="same",
                weights=weights,
            )
            self.patch_centre.hold_scores(mean, hidden.count, step)
            return loss

        loss = hidden.mean_over_images(cross_entropy, x)
        # A batch without a mask leaves a head of the patches' own without a gradient, for which other ranks would wait.
        return loss if self.shared else loss + 0.0 * head.weight.sum()

    def step_ends(self, step: Tensor) -> None:
        self.centre.step_ends(self.run.group)
        self.patch_centre.step_ends(self.run.group)
