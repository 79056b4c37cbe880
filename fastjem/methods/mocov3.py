"""MoCo v3: Chen, Xie and He 2021, arXiv 2104.02057."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.collectives import gather_rows
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults, Preset
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.symmetric import mean_over_pairs, of_large
from fastjem.nn.parts import MLP


class MoCoV3(Method):
    """A predictor must find the momentum encoder's key of the other view among the keys of the whole batch; no queue.

    layers: of the projector, 2 for ResNets and 3 for vision transformers, whose predictor's output has a batch norm too
        (predictor_norm).
    frozen_patches: the patch embedding of a vision transformer stays random, without which its training is unstable
        (section 4.1 of the paper).
    """

    about = About("contrastive", "the other images of the batch push away", "Chen et al. 2021, arXiv 2104.02057")
    views = Views(large=2, recipe="mocov3")
    combines = frozenset({"large_views", "small_views", "no_momentum_encoder"})
    projector_options = ("hidden", "dim", "layers")
    momentum = ("encoder", "projector")
    small_widths = {"hidden": 4}
    defaults = Defaults(
        "lars",
        2.4,
        1e-6,
        momentum=0.99,
        small=("adamw", 1e-3),
        source="CONFIG.md, ResNet-50: LARS, 9.6 at batch 4096, wd 1e-6",
    )
    presets = {
        "vit": Preset(
            "CONFIG.md, ViT: AdamW, 2.4e-3 at batch 4096, wd 0.1",
            Defaults("adamw", 6e-4, 0.1, momentum=0.99, warmup_epochs=40),
            {"temperature": 0.2, "layers": 3, "predictor_norm": True},
            {"recipe": "byol"},
        ),
        "cifar": Preset(
            "solo-learn, scripts/pretrain/cifar/mocov3.yaml",
            Defaults("larc", 0.3, 1e-6, momentum=0.99),
            {"temperature": 0.2},
            {"recipe": "byol"},
        ),
    }

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        hidden: int = 4096,
        dim: int = 256,
        layers: int = 2,
        predictor_norm: bool = False,
        temperature: float = 1.0,
        frozen_patches: bool = True,
        norm: str = "batch",
    ):
        super().__init__(width, run)
        ranges.positive("mocov3", temperature=temperature)
        widths = self.projector_widths(*[hidden] * (layers - 1), dim)
        dim = widths[-1]
        self.projector = MLP(width, *widths, norm=norm, last_norm=True, last_affine=False)
        self.predictor = MLP(dim, hidden, dim, norm=norm, last_norm=predictor_norm, last_affine=False, bias=False)
        self.temperature = temperature
        self.frozen = ("patch_embed",) if frozen_patches else ()

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        views = batch.views
        large = self.views.large
        z = student.project(views)
        queries = student.predictor(z).chunk(len(views))
        with torch.no_grad():
            keys = (
                teacher.project(views[:large]).chunk(large) if teacher.momentum else of_large(z.detach(), views, large)
            )
            keys = [normalize(key, dim=1) for key in keys]
        # The factor 2 temperature is the paper's, algorithm 1, of the sum of both directions
        return 4 * self.temperature * mean_over_pairs(self._contrast, queries, keys)

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The loss of this rank's queries against all ranks' keys."""
        candidates = keys
        first = 0
        if self.run.group is not None:
            sizes = [keys.shape[0]] * self.run.ranks
            candidates, first = gather_rows(keys, self.run.group, sizes)
        return F.info_nce(queries, keys, candidates, temperature=self.temperature, label_offset=first)
