"""I-JEPA: Assran et al. 2023, arXiv 2301.08243."""

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_EACH_VIEW, OF_OWN_TARGETS
from fastjem.methods.transformer import TokenPredictor, grid_of


class IJEPA(Method):
    """From a context block of an image a small transformer predicts the momentum encoder's representation of four other
    blocks, in that space, without any augmentation but cropping. The encoder is given the context's patches alone.
    """

    about = About("masked prediction", "targets of a momentum encoder", "Assran et al. 2023, arXiv 2301.08243")
    views = Views(large=1, recipe="ijepa", mask=0.8, masking="multi_block", drops=True)
    refuses = {
        **OF_OWN_TARGETS,
        **OF_EACH_VIEW,
        "projector": "has a predictor in the projector's place: --options predictor_width, predictor_depth",
    }
    momentum = ("encoder",)
    mean_over_images = True
    pool = "avg"  # no loss reaches the class token directly: the patches' mean is the embedding
    defaults = Defaults(
        "adamw",
        1e-3 / 8**0.5,
        0.04,
        0.4,
        momentum=0.996,
        warmup_epochs=40,
        source="in1k_vith14_ep300.yaml: AdamW, 1e-3 at batch 2048, wd 0.04 to 0.4, momentum encoder 0.996 to 1",
    )
    presets = {"cifar": Preset("stable-pretraining: AdamW, 1e-3", Defaults("adamw", 1e-3, 0.04, 0.4, momentum=0.996))}

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        predictor_width: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int = 12,
    ):
        super().__init__(width, run)
        self.predictor = TokenPredictor(
            width,
            grid_of(run.image_size, run.patch),
            inner=predictor_width,
            depth=predictor_depth,
            heads=predictor_heads,
            out=width,
        )

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        mask = batch.masks[0]
        assert mask.targets is not None and mask.visible is not None  # "multi_block" draws both
        images, blocks, patches = mask.targets.shape
        context = student.encode(batch.views[:1], batch.masks).tokens  # [B, M, D]
        assert context is not None  # an encoder without patches has refused the masks
        with torch.no_grad():
            whole = teacher.encode(batch.views[:1], tokens=True).tokens  # [B, L, D]
            assert whole is not None
        # Each block is predicted by itself from the same context.
        context = context.repeat_interleave(blocks, 0)
        visible = mask.visible.repeat_interleave(blocks, 0)
        grid = mask.hidden.shape[1:]
        prediction = student.predictor(context, visible, mask.targets.flatten(0, 1), grid)  # [B T, P, D]
        at = mask.targets.view(images, -1, 1).expand(-1, -1, self.width)
        target = whole.gather(1, at).view(images * blocks, patches, self.width)
        student.note(projection=prediction.detach()[::blocks, 0])
        return F.regression(prediction, target, beta=1.0)
