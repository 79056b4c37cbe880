"""CLIP between images: Radford et al. 2021, arXiv 2103.00020, of two images in place of image and text."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.pairs import PairHeads, embeddings_of_pairs
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.methods.reasons import OF_TWO_SOURCES


class CLIP(Method):
    """Each image must find its partner, the one of the same name in the other source, among all partners of the batch.

    Both sources go through one encoder, and through a linear projection of each one's own.

    most: of the scale that is learned, 1 / temperature.
    """

    about = About(
        "contrastive pairs", "the other pairs of the batch push away", "Radford et al. 2021, arXiv 2103.00020"
    )
    views = Views(large=2, recipe="pairs", sources=2)
    refuses = OF_TWO_SOURCES
    defaults = Defaults(
        "adamw",
        5e-4 / math.sqrt(128),
        0.2,
        short=("adamw", 1e-3),
        source="table 18 and 19: 5e-4 at batch 32,768 (ViT-B), wd 0.2",
    )

    def __init__(
        self, width: int, run: RunFacts = RunFacts(), *, dim: int = 512, temperature: float = 0.07, most: float = 100.0
    ):
        super().__init__(width, run)
        ranges.positive("clip", temperature=temperature)
        if not 1 <= most < math.inf:
            raise ValueError(f"clip: most, of the scale, must be at least 1 and finite, got {most}")
        self.projectors = PairHeads(width, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.most = most

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        x, y = embeddings_of_pairs(student, batch.views)
        scale = self.log_scale.exp()
        student.note(logit_scale=scale.detach())
        return F.clip_loss(normalize(x, dim=1), normalize(y, dim=1), scale, group=self.run.group)

    @torch.no_grad()
    def step_ends(self, step: Tensor) -> None:
        """The parameter is held within 1 and `most`, as open_clip does: cut off in the loss it would get no gradient
        there and never come back."""
        self.log_scale.clamp_(0, math.log(self.most))
