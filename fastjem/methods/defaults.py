"""What papers trained with, and what of it a short run or a small data set can't take over."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DEEP = 24  # blocks of a ViT-L, from which on papers' values for large encoders are taken
SMALL = 2_000_000  # parameters of an encoder below which a short run takes `Defaults.small`
SHORT = 10_000  # steps of a run below which papers' values, made for a hundred times as many, are replaced
# AdamW's largest rate in a short run of a transformer; convolutions bear more (SimCLR, test_vit, Fashion-MNIST: 64.0 %,
# at 4e-3 53.4).
TRANSFORMERS_RATE = 1e-3


@dataclass(frozen=True)
class Defaults:
    """What the paper trained with.

    The learning rate is for 256 images: the paper's, brought there from the paper's batch by the optimiser's rule
    (`fastjem.optim.scaled`), and from there to the batch of the run.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    final_weight_decay: float | None = None  # None: it doesn't change
    clip: float = 0.0  # the gradient's largest norm; 0: no clipping
    momentum: float = 0.99  # of the momentum encoder at the start; it ends at `final_momentum`, on a cosine
    final_momentum: float = 1.0
    warmup_epochs: float = 10
    drop_path: float = 0.0  # stochastic depth of the trained encoder
    deep_drop_path: float | None = None  # in encoders of `DEEP` blocks and more; None: the same
    layer_decay: float = 1.0  # of the learning rate, from layer to layer away from the heads
    patch_embed_rate: float = 1.0  # a factor on the patch embedding's learning rate
    source: str = ""
    short: tuple[str, float] | None = None  # optimiser and rate of a short run, where the paper's learn less
    small: tuple[str, float] | None = None  # of a short run of a small encoder or a transformer; None: `short`
    least_momentum: float = 0.9  # in a run however short

    def of_run(
        self, steps: int, *, chosen: bool = False, parameters: int = SMALL, transformer: bool = False
    ) -> "Defaults":
        """In a run of so many steps: a short one may have another optimiser, unless the user has `chosen` one or a
        rate, and the momentum encoder remembers at most a tenth of the run. In a short one nothing is regularised by
        stochastic depth and no layer is slower than others: both are made for runs that could learn too much.

        Args:
            steps: of the optimiser.
            chosen: the user has named an optimiser or a rate.
            parameters: of the encoder.
            transformer: the encoder is one (`fastjem.encoders.is_transformer`) and takes AdamW as small encoders do,
                whatever its size.
        """
        optimizer, rate = self.optimizer, self.learning_rate
        instead = self.short
        if self.small and transformer:
            instead = self.small[0], min(self.small[1], TRANSFORMERS_RATE)
        elif self.small and parameters < SMALL:
            instead = self.small
        if instead and steps < SHORT and not chosen:
            optimizer, rate = instead
        momentum = min(self.momentum, max(1 - 10 / steps, self.least_momentum))
        found = replace(self, optimizer=optimizer, learning_rate=rate, momentum=momentum)
        if steps < SHORT:
            found = replace(found, drop_path=0.0, deep_drop_path=None, layer_decay=1.0, patch_embed_rate=1.0)
        return found

    def drop_path_of(self, blocks: int) -> float:
        """The rate of stochastic depth in an encoder of so many blocks; 0: not known."""
        if blocks >= DEEP and self.deep_drop_path is not None:
            return self.deep_drop_path
        return self.drop_path

    def unlike(self, paper: "Defaults") -> str:
        """In words, if the optimiser or its rate isn't the paper's."""
        if (self.optimizer, self.learning_rate) == (paper.optimizer, paper.learning_rate):
            return ""
        theirs = f"{paper.optimizer} at {paper.learning_rate:.3g}, which --optimizer {paper.optimizer} brings back"
        return f"in so short a run {self.optimizer} at {self.learning_rate} in place of the paper's {theirs}"


@dataclass(frozen=True)
class Preset:
    """What of a method is otherwise on other data than ImageNet, which its own values are for: `--preset NAME`.

    Whatever the user gives comes before it.
    """

    source: str  # who published these values
    defaults: Defaults | None = None  # of the optimiser; None: the method's own
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method
    views: Mapping[str, Any] = field(default_factory=dict)  # fields of its `Views`
    mask: float = 0.0  # `--mask` of an encoder that takes one, where none is given


# What learns most in a few minutes on small data, of contrastive losses: docs/fast.md has what each part is worth.
FAST = Preset("ours, docs/fast.md", views={"large": 4, "recipe": "mocov2"}, mask=0.75)


def at_most(most: int, images: int, *, each: int) -> int:
    """`most`, or the largest power of two so that there are `each` images for one, at least 8. images = 0: not known.

    16 for prototypes (DINO's 65536 have 20 of ImageNet's images each), 4 for a queue's keys: an image rarely meets its
    own older key.
    """
    return min(most, max(1 << max(images // each, 1).bit_length() - 1, 8)) if images else most


def frozen_steps(epochs: float, steps_per_epoch: int, steps: int) -> int:
    """Steps for which prototypes stay fixed: so many epochs, at most a tenth of the run."""
    return min(round(epochs * steps_per_epoch), steps // 10 if steps else 1 << 62)
