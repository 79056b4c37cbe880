"""CLIP's loss beside captions or a teacher: modules with open_clip's names, arguments and defaults."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastjem.functional as F
from fastjem.collectives import Agreement, default_group, of_global_batch
from fastjem.functional import checks
from fastjem.functional.precision import in_float32
from fastjem.nn.image_text import ClipLoss

BOTH = ("image_features and text_features must be [N, D] both", "dist_image_features and dist_text_features, [N, D']")


class CoCaLoss(ClipLoss):
    """CLIP's loss and the cross-entropy of captions (Yu et al. 2022, arXiv 2205.01917): `clip_loss`, `cross_entropy`.

    Args:
        caption_loss_weight, clip_loss_weight: what each is multiplied by; with 0 for CLIP's it isn't computed.
        pad_id: labels that have no loss.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, options: see `ClipLoss`. The
            captions' loss is each rank's own, as in open_clip.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **options: Any,
    ):
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **options)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.pad_id = checks.integer("CoCaLoss", "pad_id", pad_id)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(CLIP's loss, the captions'), 0-dim both, each times its weight; or a dict of both.

        Args:
            image_features, text_features: [N, D], normalised by the caller.
            logits: [N, L, words], the decoder's.
            labels: [N, L] int64, the words, `pad_id` where there is none.
            logit_scale: what cosines are multiplied by.
        """
        if not isinstance(logits, Tensor) or logits.dim() != 3 or labels.shape != logits.shape[:2]:
            contract = "logits and labels must be [N, L, words] and [N, L]"
            checks.fail("CoCaLoss", contract, f"{checks.shape(logits)} and {checks.shape(labels)}")
        captions = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad_id)
        captions = captions * self.caption_loss_weight
        clip = torch.zeros((), dtype=captions.dtype, device=captions.device)
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale)
            assert isinstance(loss, Tensor)
            clip = loss * self.clip_loss_weight
        return {"contrastive_loss": clip, "caption_loss": captions} if output_dict else (clip, captions)


class DistillClipLoss(ClipLoss):
    """CLIP's loss, and the cross-entropy of its similarities by a teacher's (Wu et al. 2023, arXiv 2309.12314).

    The teacher's features and scale are constants. Its similarities are in memory no more than the student's: both live
    in tiles (`fastjem.functional.prototype_head_cross_entropy`). Arguments as of `ClipLoss`; over ranks each rank
    computes the teacher's term of the global batch, as open_clip does without `local_loss`, which must be False then.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(CLIP's loss, the teacher's term), 0-dim both; or a dict of both.

        Args:
            image_features, text_features: the student's [N, D], normalised by the caller.
            logit_scale, dist_logit_scale: what student's and teacher's cosines are multiplied by.
            dist_image_features, dist_text_features: the teacher's [N, D'], normalised by the caller.
        """
        who = "DistillClipLoss"
        group = default_group(self.world_size > 1)
        contrastive = super().forward(image_features, text_features, logit_scale)
        assert isinstance(contrastive, Tensor)
        features = (image_features, text_features, dist_image_features, dist_text_features)
        with Agreement(who, group) as ranks:
            checks.matrices(who, f"{BOTH[0]}, {BOTH[1]}", *features, same=False, may_be_empty=0)
            if any(x.shape[0] != image_features.shape[0] for x in features) or features[2].shape != features[3].shape:
                checks.fail(who, f"{BOTH[0]}, {BOTH[1]}", [tuple(x.shape) for x in features])
            if group is not None and self.local_loss:
                checks.fail(who, "with world_size > 1, local_loss must be False", True)
            ranks.rows_of(image_features)
        scale = checks.positive(who, "logit_scale", logit_scale, image_features)
        of_teacher = checks.positive(who, "dist_logit_scale", dist_logit_scale, image_features)
        # The student's scale is in its images, so that over ranks its gradient comes with theirs.
        images = in_float32(image_features) * scale
        texts = in_float32(text_features)
        width = max(images.shape[1], dist_image_features.shape[1])

        def by_teacher(*features: Tensor) -> Tensor:
            # The operator wants one width of both: channels of zeros change no product.
            images, texts, its_images, its_texts = (pad(x, (0, width - x.shape[1])) for x in features)
            options: dict[str, Any] = {
                "student_temperature": 1.0, "teacher_temperature": 1 / of_teacher, "pairs": "same"
            }  # fmt: skip
            of_images = F.prototype_head_cross_entropy([images], [its_images], texts, its_texts, **options)
            of_texts = F.prototype_head_cross_entropy([texts], [its_texts], images, its_images, **options)
            return (of_images + of_texts) / 2

        distilled = of_global_batch(by_teacher, group, ranks.sizes, images, texts, *(x.detach() for x in features[2:]))
        return {"contrastive_loss": contrastive, "distill_loss": distilled} if output_dict else (contrastive, distilled)
