"""PIRL: Misra and van der Maaten 2020, arXiv 1912.01991."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastjem.functional as F
from fastjem.data.batch import Batch
from fastjem.data.philox import drawn_in_a_step
from fastjem.data.size import height_and_width, written
from fastjem.data.views import Views
from fastjem.methods import ranges
from fastjem.methods.defaults import Defaults
from fastjem.methods.protocol import About, Branch, Method, RunFacts
from fastjem.nn.sample_memory import SampleMemory

SIDE = 3  # pieces of the jigsaw in height and in width
BLOCKS_OF_ORDERS = 1 << 10  # random numbers, by four, that orders have for themselves; negatives take those behind


class PIRL(Method):
    """An image's nine pieces, in random order, and the image itself must both be found by what a memory holds of the
    image, among what it holds of others.

    share: of the pieces' loss; the image's has the rest. memory: how much of an image's row stays in an epoch.
    """

    about = About(
        "contrastive", "a memory of other images pushes away", "Misra and van der Maaten 2020, arXiv 1912.01991"
    )
    views = Views(large=2, recipe="pirl")
    refuses = {
        "large_views": "compares a view and the pieces of another one with what it holds of the image",
        "small_views": "compares a view and the pieces of another one with what it holds of the image",
        "projector": "has three linear heads that belong together: --options dim",
        "mask": "cuts a view into pieces, images of their own, of which a mask over the view says nothing",
    }
    mean_over_images = True
    defaults = Defaults(
        "sgd",
        0.03,
        1e-4,
        warmup_epochs=0,
        short=("lars", 1.2),
        small=("adamw", 1e-3),
        source="section 3.1: SGD, 0.12 at batch 1024, wd 1e-4",
    )

    def __init__(
        self,
        width: int,
        run: RunFacts = RunFacts(),
        *,
        dim: int = 128,
        negatives: int = 32000,
        temperature: float = 0.07,
        share: float = 0.5,
        memory: float = 0.5,
    ):
        super().__init__(width, run)
        ranges.positive("pirl", temperature=temperature)
        ranges.shares("pirl", share=share, memory=memory)
        for size in run.image_sizes or (run.image_size,):
            if run.patch > 1 and any(side // SIDE % run.patch for side in height_and_width(size)):
                raise ValueError(
                    f"pirl: a third of the image's {written(size)} pixels must be whole patches of {run.patch} pixels"
                )
        self.projector = nn.Linear(width, dim)
        self.pieces = nn.Linear(width, dim)
        self.jigsaw = nn.Linear(SIDE * SIDE * dim, dim)
        images = max(run.images, 1)
        self.memory = SampleMemory(images, dim, run.images_per_step // run.ranks or images)
        self.negatives = min(negatives, images)
        self.temperature = temperature
        self.share = share
        self.kept = memory

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        z = student.project(batch.views[:1])
        of_places = self._pieces(batch.views[1], batch.index, step).unflatten(0, (len(z), -1)).unbind(1)
        pieces = student.pieces(student.encode(of_places).pooled).unflatten(0, (-1, len(z)))  # [9, B, dim]
        shuffled = student.jigsaw(pieces.transpose(0, 1).flatten(1))
        with torch.no_grad():
            own = self.memory.of(batch.index)
            others = self._others(step)
            candidates = self.memory.of(others)
            now = self.kept * own + (1 - self.kept) * normalize(z.detach(), dim=1).to(own.dtype)
            self.memory.hold(batch.index, normalize(now, dim=1))

        def contrast(query: Tensor) -> Tensor:
            return F.info_nce(
                query,
                own.to(query.dtype),
                candidates.to(query.dtype),
                temperature=self.temperature,
                ids=batch.index,
                negative_ids=others,
            )

        return self.share * contrast(shuffled) + (1 - self.share) * contrast(z)

    def step_ends(self, step: Tensor) -> None:
        self.memory.step_ends(self.run.group)

    def _others(self, step: Tensor) -> Tensor:
        """[negatives] int64: the images that a step's are contrasted with, the same on all ranks."""
        none = torch.zeros(1, dtype=torch.long, device=step.device)
        drawn = drawn_in_a_step(none, step, self.negatives, self.run.seed, first=BLOCKS_OF_ORDERS)[0]
        return (drawn * self.memory.images).long().clamp(max=self.memory.images - 1)

    def _pieces(self, images: Tensor, index: Tensor, step: Tensor) -> Tensor:
        """[B, C, H, W] -> [9 B, C, h, w]: the pieces of a 3 x 3 grid, each image's in an order of its own, which is
        drawn in each step."""
        return pieces_in_order(images, drawn_in_a_step(index, step, SIDE * SIDE, self.run.seed).argsort(1))


def pieces_in_order(images: Tensor, order: Tensor) -> Tensor:
    """[B, C, H, W] -> [9 B, C, h, w]: the pieces of a 3 x 3 grid, each image's in its order [B, 9].

    Pixels that are left over at the right and at the bottom belong to none.
    """
    height, width = images.shape[2] // SIDE, images.shape[3] // SIDE
    pieces = images[..., : SIDE * height, : SIDE * width].unfold(2, height, height).unfold(3, width, width)
    pieces = pieces.flatten(2, 3).transpose(1, 2)  # [B, 9, C, h, w]
    at = torch.arange(pieces.shape[0], device=images.device)[:, None]
    return pieces[at, order].flatten(0, 1).contiguous()
