"""DINO: Caron et al. 2021, arXiv 2104.14294; Sinkhorn centring as in DINOv2, arXiv 2304.07193."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset, at_most, frozen_steps
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts
from fastjem.methods.prototypes import TeacherCentre, check_centring, cross_entropy_of_features
from fastjem.nn.parts import MLP, Prototypes, init_as_vision_transformer


class DINO(Method):
    """Every view predicts the momentum encoder's sharpened, centred softmax of the large views, never its own.

    centring: "mean" (a running mean of the teacher's logits) or "sinkhorn".
    norm: of the head; "auto" is batch norm if the encoder has it, as `--use_bn_in_head` of main_dino.py, and none
        otherwise. Without it a convolutional encoder's first logits hardly differ between images.
    """

    about = About(
        "self-distillation",
        "centred and sharpened teacher",
        "Caron et al. 2021, arXiv 2104.14294; Sinkhorn centring as in DINOv2, arXiv 2304.07193",
    )
    views = Views(large=2, small=8, recipe="dino")
    refuses = {
        "no_momentum_encoder": "collapses without its momentum encoder, unless --options centring=sinkhorn (table 7)",
    }
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "bottleneck")
    momentum = ("encoder", "projector", "prototypes")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw",
        1e-3,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.996,
        drop_path=0.1,
        small=("adamw", 3e-3),
        source="main_dino.py: AdamW, 2e-3 at batch 1024, wd 0.04 to 0.4, clip 3",
    )

    presets = {
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/dino.yaml",
            Defaults("larc", 0.3, 1e-6, momentum=0.9995),
            {"prototypes": 4096},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        temperature: float = 0.1,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        warmup_epochs: float = 30,
        frozen_epochs: float = 1,
        centring: str = "mean",
        centre_momentum: float = 0.9,
        norm: str = "auto",
    ):
        super().__init__(width, run)
        ranges.positive(
            "dino",
            temperature=temperature,
            warmup_teacher_temperature=warmup_teacher_temperature,
            teacher_temperature=teacher_temperature,
        )
        ranges.not_negative("dino", warmup_epochs=warmup_epochs, frozen_epochs=frozen_epochs)
        ranges.shares("dino", centre_momentum=centre_momentum)
        check_centring("dino", centring)
        if centring == "sinkhorn":  # table 7, row 9
            self.combines = self.combines | {"no_momentum_encoder"}
        if norm == "auto":
            norm = "batch" if run.batch_norm else "none"
        widths = self.projector_widths(hidden, hidden, bottleneck)
        self.projector = MLP(width, *widths, norm=norm, activation=nn.GELU)
        init_as_vision_transformer(self.projector)
        prototypes = at_most(prototypes, run.images, each=16)
        frozen = frozen_steps(frozen_epochs, run.steps_per_epoch, run.steps)
        self.prototypes = Prototypes(widths[-1], prototypes, frozen)
        self.centre = TeacherCentre(
            prototypes,
            centring=centring,
            momentum=centre_momentum,
            first=warmup_teacher_temperature,
            temperature=teacher_temperature,
            # Not hurried in a short run, which stays near the first temperature: at 0.07 the targets of an encoder that
            # knows nothing yet are all but uniform, and the loss goes to log K and stays there (docs/log.md).
            warmup_steps=round(warmup_epochs * run.steps_per_epoch),
        )
        self.temperature = temperature

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        large = self.views.large
        z = student.project(views)
        x = normalize(z, dim=1).chunk(len(views))
        with torch.no_grad():
            whole = teacher.project(views[:large]) if teacher.momentum else z[: large * len(batch.index)]
            y = self.centre.sharpened(whole, step).chunk(large)
            prototypes = teacher.prototypes.unit_weight(step)
            bias = self.centre.bias(y, prototypes, step, self.run.group)
        loss, mean = cross_entropy_of_features(
            x,
            y,
            student.prototypes.unit_weight(step),
            prototypes,
            student_temperature=self.temperature,
            teacher_temperature=self.centre.temperature,
            teacher_bias=bias,
        )
        self.centre.hold_scores(mean, large * len(y[0]), step)
        student.note(codes=Codes(y[0], prototypes, bias, self.centre.temperature))
        return loss

    def step_ends(self, step: Tensor) -> None:
        self.centre.step_ends(self.run.group)
