"""MAE: He et al. 2022, arXiv 2111.06377."""

from dataclasses import replace

import torch
from torch import Tensor

from fastjem.data.batch import Batch
from fastjem.data.masks import hidden_indices, hidden_patches
from fastjem.data.views import Views
from fastjem.functional.precision import in_float32
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_EACH_VIEW
from fastjem.methods.transformer import TokenPredictor, grid_of
from fastjem.nn.tokens import patchify


class MAE(Method):
    """The encoder is given a quarter of an image's patches, and a small transformer, dropped afterwards, paints the
    others: their pixels, by default less each patch's mean and over its deviation.

    mask: the share of the patches that is hidden.
    """

    about = About("masked prediction", "the targets are pixels", "He et al. 2022, arXiv 2111.06377")
    views = Views(large=1, recipe="mae", mask=0.75, masking="random", drops=True)
    refuses = {
        **OF_EACH_VIEW,
        "projector": "has a decoder in the projector's place: --options decoder_width, decoder_depth",
    }
    mean_over_images = True
    pool = "avg"  # no loss reaches the class token directly: the patches' mean is the embedding
    defaults = Defaults(
        "adamw",
        1.5e-4 * 4,
        0.05,
        warmup_epochs=40,
        source="PRETRAIN.md: AdamW, 2.4e-3 at batch 4096 (1.5e-4 for 256, linear), wd 0.05",
    )
    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/mae.yaml: AdamW, 2e-4 at batch 256", Defaults("adamw", 2e-4, 0.05)
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise: bool = True,
        mask: float = 0.75,
    ):
        super().__init__(width, run)
        if not 0 < mask < 1:
            raise ValueError(f"mae: mask must be a share between 0 and 1, got {mask}")
        self.views = replace(self.views, mask=mask)
        self.decoder = TokenPredictor(
            width,
            grid_of(run.image_size, run.patch),
            inner=decoder_width,
            depth=decoder_depth,
            heads=decoder_heads,
            out=run.channels * max(run.patch, 1) ** 2,
        )
        self.normalise = normalise

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        mask = batch.masks[0]
        assert mask.visible is not None  # as `views` drops patches
        images = batch.views[0]
        count = hidden_patches((mask.hidden.shape[1], mask.hidden.shape[2]), self.views.mask)
        hidden = hidden_indices(mask.hidden, count)  # [B, M]
        tokens = student.encode([images], batch.masks).tokens
        assert tokens is not None  # masks are for transformers, which have them
        prediction = in_float32(student.decoder(tokens, mask.visible, hidden, mask.hidden.shape[1:]))  # [B, M, p p C]
        with torch.no_grad():
            patches = patchify(images, self.run.patch)
            target = in_float32(patches.gather(1, hidden[..., None].expand(-1, -1, patches.shape[2])))
            if self.normalise:
                variance, mean = torch.var_mean(target, dim=2, keepdim=True)
                target = (target - mean) * (variance + 1e-6).rsqrt()
        student.note(projection=prediction.detach()[:, 0])
        return torch.nn.functional.mse_loss(prediction, target)
