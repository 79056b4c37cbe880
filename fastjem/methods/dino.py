"""DINO: Caron et al. 2021, arXiv 2104.14294; Sinkhorn centring as in DINOv2, arXiv 2304.07193."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import sum_over_ranks, world_size
from fastjem.data.views import Views
from fastjem.methods._parts import Defaults, Parts, Prototypes, at_most, frozen, linear_warmup, mlp


class DINO(nn.Module):
    """Every view predicts the momentum encoder's sharpened, centred softmax of the large views, never its own.

    centring: "mean" (a running mean of the teacher's logits) or "sinkhorn".
    norm: of the head; "auto" is batch norm if the encoder has it (`batch_norm`), as `--use_bn_in_head` of main_dino.py,
        and none otherwise. Without it a convolutional encoder's first logits hardly differ between images.
    """

    family, prevents_collapse = "self-distillation", "centred and sharpened teacher"
    views = Views(large=2, small=8, recipe="dino")
    ema = ("encoder", "projector", "prototypes")
    defaults = Defaults(
        "adamw",
        1e-3,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.996,
        source="main_dino.py: AdamW, 2e-3 at batch 1024, wd 0.04 to 0.4, clip 3",
    )
    centre: Tensor

    def __init__(
        self,
        width: int,
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
        batch_norm: bool = False,
        images: int = 0,
        steps_per_epoch: int = 1,
        steps: int = 0,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        if centring not in ("mean", "sinkhorn"):
            raise ValueError(f"dino: centring must be mean or sinkhorn, got {centring!r}")
        if norm == "auto":
            norm = "batch" if batch_norm else "none"
        self.projector = mlp(width, hidden, hidden, bottleneck, norm=norm, activation=nn.GELU)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        prototypes = at_most(prototypes, images, each=16)
        self.prototypes = Prototypes(bottleneck, prototypes, frozen(frozen_epochs, steps_per_epoch, steps))
        self.register_buffer("centre", torch.zeros(prototypes))
        self.temperature, self.centring, self.centre_momentum = temperature, centring, centre_momentum
        self.teacher_temperature, self.warmup_teacher_temperature = teacher_temperature, warmup_teacher_temperature
        # Not hurried in a short run, which stays near the first temperature: at 0.07 the targets of an encoder that
        # knows nothing yet are all but uniform, and the loss goes to log K and stays there (docs/log.md).
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.group = group

    def loss(self, student: Parts, teacher: Parts, views: list[Tensor], step: Tensor) -> Tensor:
        scores = student.prototypes(normalize(student.project(views), dim=1), step).chunk(len(views))
        with torch.no_grad():
            logits = teacher.prototypes(normalize(teacher.project(views[:2]), dim=1), step).float()
            # The operator takes its temperature as a number; the schedule, a tensor, goes into the logits.
            final = self.teacher_temperature
            now = linear_warmup(step, self.warmup_teacher_temperature, final, self.warmup_steps)
            sharper = final / now
            targets = [(target * sharper).contiguous() for target in logits.chunk(2)]
            if self.centring == "mean":
                bias = -self.centre * (sharper / final)
            else:
                bias = torch.stack([F.sinkhorn_bias(t, epsilon=final, group=self.group) for t in targets])
            student.seen["codes"] = targets[0] / final + bias.view(-1, bias.shape[-1])[0]
        loss = F.prototype_cross_entropy(
            list(scores),
            targets,
            student_temperature=self.temperature,
            teacher_temperature=final,
            teacher_bias=bias,
        )
        with torch.no_grad():
            mean = sum_over_ranks(logits.mean(0), self.group) / world_size(self.group)
            self.centre.lerp_(mean, 1 - self.centre_momentum)
        return loss
