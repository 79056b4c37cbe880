"""data2vec: Baevski et al. 2022, arXiv 2202.03555, for images."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm, layer_norm, smooth_l1_loss

from fastjem.data.batch import Batch
from fastjem.data.masks import SAMPLERS, hidden_indices, hidden_patches
from fastjem.data.views import Views
from fastjem.errors import nearest
from fastjem.functional.precision import in_float32
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_EACH_VIEW, OF_OWN_TARGETS

TARGET_NORMS = ("layer", "instance")  # of each layer's outputs: over a patch's channels, or each channel over patches


class Data2Vec(Method):
    """The student sees an image with blocks of its patches replaced by a mask token, and predicts at those patches the
    momentum encoder's representation of the whole image: the mean of its top layers, layer-normalised.

    mask: the share of the patches that is hidden; masking: how, a name in `fastjem.data.masks.SAMPLERS`.
    target_norm: of the layers before their mean, "layer" over a patch's channels, or "instance" of each channel over
    the patches.
    """

    about = About(
        "masked prediction",
        "normalised targets of a momentum encoder",
        "Baevski et al. 2022, arXiv 2202.03555, for images",
    )
    views = Views(large=1, recipe="data2vec", mask=0.75)
    refuses = {
        **OF_OWN_TARGETS,
        **OF_EACH_VIEW,
        "projector": "predicts the encoder's own features, of its width, by one layer",
    }
    momentum = ("encoder",)
    mean_over_images = True
    pool = "avg"  # no loss reaches the class token directly: the patches' mean is the embedding
    mask_token = True
    defaults = Defaults(
        "adamw",
        7e-4,
        0.05,
        clip=3.0,
        momentum=0.9998,
        final_momentum=0.9998,
        warmup_epochs=40,
        drop_path=0.25,
        deep_drop_path=0.2,
        source="section 4.1, released configuration: AdamW, 2e-3 at batch 2048, wd 0.05",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        layers: int = 6,
        beta: float = 2.0,
        mask: float = 0.75,
        masking: str = "even_block",
        target_norm: str = "layer",
    ):
        super().__init__(width, run)
        ranges.not_negative("data2vec", beta=beta)
        if not 0 < mask < 1:
            raise ValueError(f"data2vec: mask must be a share between 0 and 1, got {mask}")
        if masking not in SAMPLERS:
            raise nearest("masking", masking, SAMPLERS)
        if target_norm not in TARGET_NORMS:
            raise nearest("target_norm", target_norm, TARGET_NORMS)
        self.views = replace(self.views, mask=mask, masking=masking)
        self.projector = nn.Linear(width, width)
        self.layers = layers
        self.beta = beta
        self.target_norm = target_norm

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        hidden = batch.masks[0].hidden  # [B, h, w]
        with torch.no_grad():
            outputs = teacher.encode(batch.views, layers=self.layers).layers
            normalised = [self._normalised(in_float32(x)) for x in outputs]
            target = torch.stack(normalised).mean(0)  # [B, L, D]
            target = layer_norm(target, target.shape[-1:])
            _, height, width = hidden.shape
            count = hidden_patches((height, width), self.views.mask)
            masked = hidden_indices(hidden, count)  # [B, M]
        tokens = student.encode(batch.views, batch.masks).tokens
        assert tokens is not None  # masks are for transformers, which have them
        at = masked[..., None].expand(-1, -1, self.width)
        prediction = in_float32(self.projector(tokens.gather(1, at)))  # [B, M, D]
        student.note(projection=prediction.detach()[:, 0])
        return smooth_l1_loss(prediction, target.gather(1, at), beta=self.beta)

    def _normalised(self, x: Tensor) -> Tensor:
        """A layer's outputs [B, L, D], of mean 0 and variance 1 over D, or over L."""
        if self.target_norm == "layer":
            return layer_norm(x, x.shape[-1:])
        return instance_norm(x.mT).mT
