"""SigLIP between images: Zhai et al. 2023, arXiv 2303.15343, of two images in place of image and text."""

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


class SigLIP(Method):
    """Of each two images of the two sources it must tell whether they belong together: a sigmoid for each, no softmax.

    Both sources go through one encoder, and through a linear projection of each one's own.
    """

    about = About(
        "contrastive pairs", "pairs that don't belong together push away", "Zhai et al. 2023, arXiv 2303.15343"
    )
    views = Views(large=2, recipe="pairs", sources=2)
    refuses = OF_TWO_SOURCES
    defaults = Defaults(
        "adamw",
        1e-3 / math.sqrt(64),
        1e-4,
        short=("adamw", 1e-3),
        source="section 4: 1e-3 at batch 16,384 and more, wd 1e-4 (big_vision)",
    )

    def __init__(
        self, width: int, run: RunFacts = RunFacts(), *, dim: int = 512, temperature: float = 0.1, bias: float = -10.0
    ):
        super().__init__(width, run)
        ranges.positive("siglip", temperature=temperature)
        ranges.finite("siglip", bias=bias)
        self.projectors = PairHeads(width, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        x, y = embeddings_of_pairs(student, batch.views)
        scale = self.log_scale.exp()
        student.note(logit_scale=scale.detach(), logit_bias=self.bias.detach())
        return F.siglip_loss(normalize(x, dim=1), normalize(y, dim=1), scale, self.bias, group=self.run.group)
