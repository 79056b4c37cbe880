"""MMCR: Yerxa et al. 2023, arXiv 2303.03307."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import of_global_batch
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.functional.decompositions import singular_values
from fastjem.functional.precision import in_float32
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.parts import MLP


class MMCR(Method):
    """The means of each image's views, of length one, should fill all directions: their nuclear norm is large, which it
    can only be where an image's views agree.

    local: weight of each image's own views' nuclear norm, which is small where they agree.
    """

    about = About("decorrelation", "the means of views fill all directions", "Yerxa et al. 2023, arXiv 2303.03307")
    views = Views(large=4, recipe="byol")
    no_graph = "the host waits for its singular values"
    combines = frozenset({"large_views", "no_momentum_encoder"})
    refuses = {"small_views": "compares the means over an image's views, of which a small one would be a part"}
    projector_options = ("hidden", "dim")
    momentum = ("encoder", "projector")
    defaults = Defaults(
        "lars",
        1.7,
        1e-6,
        momentum=0.99,
        final_momentum=0.99,
        small=("adamw", 1e-3),
        source="pretrain_imagenet.py: LARS, 4.8 at batch 2048, wd 1e-6; tau 0.99",
    )
    presets = {
        "cifar": Preset(
            "mmcr, pretrain_cifar_stl.py: Adam, 1e-3 at batch 32 (of 40 views, here 8)",
            Defaults("adamw", 1e-3 * 8**0.5, 1e-6),
            {"hidden": 512, "dim": 128},
            {"large": 8},
        )
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int | None = None,
        dim: int = 512,
        local: float = 0.0,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.not_negative("mmcr", local=local)
        hidden = hidden or 4 * width  # the paper's 8192 for ResNet-50's 2048
        self.projector = MLP(width, *self.projector_widths(hidden, hidden, dim), norm=norm)
        self.local = local

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        count = len(batch.views)
        online = normalize(student.project(batch.views), dim=1).unflatten(0, (count, -1)).transpose(0, 1)
        momentum = online
        if teacher.momentum:
            with torch.no_grad():
                momentum = normalize(teacher.project(batch.views), dim=1).unflatten(0, (count, -1)).transpose(0, 1)

        def mmcr(online: Tensor, momentum: Tensor) -> Tensor:
            means = F.mmcr(online, momentum, lmda=0.0)
            if not self.local:
                return means
            # Of the trained encoder's views alone, as loss_mmcr_momentum.py; `F.mmcr`'s, as lightly's, is of both's.
            of_images = singular_values(in_float32(online)).sum() / online.shape[0]
            return means + self.local * of_images

        return of_global_batch(mmcr, self.run.group, [online.shape[0]] * self.run.ranks, online, momentum)
