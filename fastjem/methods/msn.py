"""MSN: Assran et al. 2022, arXiv 2204.07141; PMSN: Assran et al. 2022, arXiv 2210.07277."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, at_most
from fastjem.methods.protocol import About, Branch, Codes, Method, RunFacts
from fastjem.nn.msn import MSNLoss, PMSNLoss
from fastjem.nn.parts import MLP, Prototypes, init_as_vision_transformer


class MSN(Method):
    """A view without some of its patches, and small views, predict the momentum encoder's sharpened distribution over
    prototypes for another whole view; all prototypes are used alike. The student is given the patches left alone.

    mask: the share of the large view's patches that is dropped.
    regularization: weight of the mean entropy that keeps all prototypes in use.
    """

    about = About(
        "self-distillation, masked", "sharp targets, all prototypes alike", "Assran et al. 2022, arXiv 2204.07141"
    )
    views = Views(large=2, small=10, recipe="msn", mask=0.15, masking="random", drops=True, masked_views=(1,))
    refuses = {
        "no_momentum_encoder": "isn't known to learn without its momentum encoder, which alone sees whole views",
    }
    combines = frozenset({"large_views"})
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "adamw",
        5e-4,
        0.04,
        0.4,
        clip=3.0,
        momentum=0.996,
        warmup_epochs=15,
        source="msn_vits16.yaml: AdamW, 1e-3 at batch 1024, wd 0.04 to 0.4, clip 3; momentum encoder 0.996 to 1",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        prototypes: int = 1024,
        temperature: float = 0.1,
        sharpen: float = 0.25,
        iterations: int = 3,
        regularization: float = 1.0,
        mask: float = 0.15,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive(type(self).__name__.lower(), temperature=temperature, sharpen=sharpen)
        ranges.not_negative(type(self).__name__.lower(), regularization=regularization)
        if not 0 < mask < 1:
            raise ValueError(f"{type(self).__name__.lower()}: mask must be a share between 0 and 1, got {mask}")
        self.views = replace(self.views, mask=mask, masked_views=tuple(range(1, self.views.large)))
        widths = self.projector_widths(hidden, hidden, dim)
        self.projector = MLP(width, *widths, norm=norm, activation=nn.GELU)
        init_as_vision_transformer(self.projector)
        count = at_most(prototypes, run.images, each=16)
        self.prototypes = Prototypes(widths[-1], count)
        self.sharpen = sharpen
        self.temperature = temperature
        self.criterion = self._criterion(temperature, iterations, regularization)

    def _criterion(self, temperature: float, iterations: int, regularization: float) -> MSNLoss:
        over_ranks = self.run.group is not None
        return MSNLoss(temperature, iterations, regularization, gather_distributed=over_ranks)

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        masks = {view - 1: mask for view, mask in batch.masks.items()}
        anchors = student.projector(student.encode(batch.views[1:], masks).pooled)
        with torch.no_grad():
            targets = teacher.projector(teacher.encode(batch.views[:1]).pooled)
        prototypes = student.prototypes.unit_weight(step)
        student.note(projection=anchors.detach()[: len(targets)])
        with torch.no_grad():
            unit = nn.functional.normalize(targets, dim=1)
            no_bias = torch.zeros(prototypes.shape[0], device=targets.device)
            student.note(codes=Codes(unit, prototypes.detach(), no_bias, self.temperature * self.sharpen))
        return self.criterion(anchors, targets, prototypes, self.sharpen)


class PMSN(MSN):
    """MSN whose prototypes are used by a power law, as the classes of natural images are, and not all alike.

    power: the k-th most used prototype has a share in proportion to k ** -power.
    """

    about = About(
        "self-distillation, masked", "sharp targets, prototypes by a power law", "Assran et al. 2022, arXiv 2210.07277"
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 2048,
        dim: int = 256,
        prototypes: int = 1024,
        temperature: float = 0.1,
        sharpen: float = 0.25,
        iterations: int = 0,
        regularization: float = 1.0,
        mask: float = 0.15,
        power: float = 0.25,
        norm: str = "batch",
    ):
        ranges.not_negative("pmsn", power=power)
        self.power = power
        super().__init__(
            width,
            run,
            hidden=hidden,
            dim=dim,
            prototypes=prototypes,
            temperature=temperature,
            sharpen=sharpen,
            iterations=iterations,
            regularization=regularization,
            mask=mask,
            norm=norm,
        )

    def _criterion(self, temperature: float, iterations: int, regularization: float) -> MSNLoss:
        over_ranks = self.run.group is not None
        return PMSNLoss(temperature, iterations, regularization, self.power, gather_distributed=over_ranks)
