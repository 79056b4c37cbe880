"""What several methods are made of: the encoder's calls, MLP heads, prototypes, a queue, defaults."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastjem.collectives import gather_rows

SHORT = 10_000  # steps of a run below which papers' values, made for a hundred times as many, are replaced


@dataclass(frozen=True)
class Defaults:
    """What the paper trained with. The learning rate is for 256 images: the paper's, brought there from the paper's
    batch by the optimiser's rule (`fastjem.optim.scaled`), and from there to the batch of the run.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    final_weight_decay: float | None = None
    clip: float = 0.0
    momentum: float = 0.99  # of the momentum encoder at the start; it ends at `final_momentum`, on a cosine
    final_momentum: float = 1.0
    warmup_epochs: float = 10
    source: str = ""
    short: tuple[str, float] | None = None  # optimiser and rate of a short run, where the paper's hardly move anything
    least_momentum: float = 0.9  # in a run however short

    def of_run(self, steps: int, *, own: bool = False) -> "Defaults":
        """In a run of so many steps: a short one may have another optimiser, unless the user chose one or a rate
        (`own`), and the momentum encoder remembers at most a tenth of it."""
        optimizer, rate = self.optimizer, self.learning_rate
        if self.short and steps < SHORT and not own:
            optimizer, rate = self.short
        momentum = min(self.momentum, max(1 - 10 / steps, self.least_momentum))
        return replace(self, optimizer=optimizer, learning_rate=rate, momentum=momentum)

    def unlike(self, paper: "Defaults") -> str:
        """In words, if the optimiser isn't the paper's."""
        if self.optimizer == paper.optimizer:
            return ""
        theirs = f"{paper.optimizer} at {paper.learning_rate}, which --optimizer {paper.optimizer} brings back"
        return f"in so short a run {self.optimizer} at {self.learning_rate} in place of the paper's {theirs}"


@dataclass
class Parts:
    """The encoder and its heads, the live ones or their momentum copies: what a method computes with.

    `seen` collects figures of health: `embedding` [B, D] of the encoder, `projection` [B, D], `codes` [B, K] logits.
    """

    encoder: nn.Module
    heads: Mapping[str, nn.Module]
    seen: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> nn.Module:
        try:
            return self.__dict__["heads"][name]
        except KeyError:
            raise AttributeError(name) from None

    def embed(self, views: Sequence[Tensor]) -> Tensor:
        """V tensors [B, 3, H, W] -> [V B, D] in the views' order; views of one size go through in one call."""
        groups = [list(group) for _, group in itertools.groupby(views, key=lambda view: view.shape)]
        x = torch.cat([self.encoder(torch.cat(group) if len(group) > 1 else group[0]) for group in groups])
        self.seen.setdefault("embedding", x.detach()[: len(views[0])])
        return x

    def project(self, views: Sequence[Tensor]) -> Tensor:
        """[V B, D] through encoder and projector."""
        z = self.heads["projector"](self.embed(views))
        self.seen.setdefault("projection", z.detach()[: len(views[0])])
        return z


def mlp(
    *widths: int,
    norm: str = "batch",
    activation: type[nn.Module] = nn.ReLU,
    last_norm: bool = False,
    last_affine: bool = True,
    last_bias: bool = True,
) -> nn.Sequential:
    """Linear layers with norm and activation between them; `last_norm` normalises the output too.

    A linear layer before a norm has no bias. norm: "batch", "layer" or "none".
    """
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = norm != "none" and (last_norm or not last)
        layers.append(nn.Linear(inner, outer, bias=last_bias if last and not normed else not normed))
        if normed:
            affine = last_affine or not last
            layers.append(
                nn.BatchNorm1d(outer, affine=affine)
                if norm == "batch"
                else nn.LayerNorm(outer, elementwise_affine=affine)
            )
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Scores [N, K] against prototypes of length one: `linear(x, normalize(weight))`.

    Normalised in the forward pass, so that no step forgets it. Frozen for the first steps by a gradient scale, which
    needs no host decision.
    """

    def __init__(self, width: int, prototypes: int, frozen_steps: int = 0):
        super().__init__()
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(prototypes, width), dim=1))
        self.frozen_steps = frozen_steps

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        weight = nn.functional.normalize(self.weight, dim=1)
        if self.frozen_steps and weight.requires_grad:
            live = (step >= self.frozen_steps).to(weight.dtype)
            weight = weight * live + weight.detach() * (1 - live)
        return nn.functional.linear(x, weight)


class Queue(nn.Module):
    """The last `length` keys of all ranks, unit vectors from the start; pointer and rows are saved with the weights."""

    rows: Tensor
    pointer: Tensor
    used: Tensor

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("rows", nn.functional.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("used", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def begin(self, keys: Tensor) -> Tensor:
        """Before the first `push` all rows become copies of these unit vectors [N, D]; afterwards nothing changes.

        Against random directions, which no image resembles, all images would learn to point the same way.

        Returns the rows, which no later `push` writes to.
        """
        copies = keys[torch.arange(len(self.rows), device=keys.device) % len(keys)].to(self.rows.dtype)
        rows = torch.where(self.used, self.rows, copies)
        self.rows.copy_(rows)
        return rows

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Unit vectors [N, D] over the oldest rows, around the end; without a host sync."""
        keys = keys[-len(self.rows) :].to(self.rows.dtype)
        at = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.rows)
        self.rows.index_copy_(0, at, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.rows))
        self.used.fill_(True)


@torch.no_grad()
def unit_keys(keys: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' rows [N, D], of length one: what a `Queue` takes."""
    keys = nn.functional.normalize(keys.detach().to(torch.promote_types(keys.dtype, torch.float32)), dim=1)
    return keys if group is None else gather_rows(keys, group)[0]


def at_most(most: int, images: int, *, each: int) -> int:
    """`most`, or the largest power of two so that there are `each` images for one, at least 8. images = 0: not known.

    16 for prototypes (DINO's 65536 have 20 of ImageNet's images each), 4 for a queue's keys: an image rarely meets its
    own older key.
    """
    return min(most, max(1 << max(images // each, 1).bit_length() - 1, 8)) if images else most


def frozen(epochs: float, steps_per_epoch: int, steps: int) -> int:
    """Steps for which prototypes stay fixed: so many epochs, at most a tenth of the run."""
    return min(round(epochs * steps_per_epoch), steps // 10 if steps else 1 << 62)


def linear_warmup(step: Tensor, start: float, end: float, steps: int) -> Tensor:
    """0-dim, on the step's device."""
    return start + (end - start) * (step / max(steps, 1)).clamp(max=1)
