"""What heads, losses and methods are made of: the one MLP, prototypes, queue and centre.

**Made without memory.** A module may be made on the meta device, then given memory by `to_empty`: `load_state_dict`, or
`reset_parameters` of every module that has it (torch's convention), fills it.

**What moves once a step.** A queue and a centre change with each batch. Where an optimiser's step has several
micro-batches, they must change once for all of them, as with one batch of all their rows. So each has two ways: at once
(`push`, `move`), and in two parts: `hold` with each micro-batch, then `step_ends` once. What is held lies in buffers of
fixed size that aren't saved; nothing waits for the device.
"""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from fastjem.collectives import (
    Agreement,
    default_group,
    gather_rows,
    mean_of_ranks,
    sum_and_count_of_ranks,
    sum_of_rows,
)
from fastjem.functional import checks
from fastjem.ops.transforms import refuse_vmap

NORMS = ("batch", "layer", "none")


class MLP(nn.Sequential):
    """Linear layers with a norm and an activation after each but the last.

    Args:
        widths: in, hidden ..., out.
        norm: "batch", "layer" or "none".
        activation: its class.
        last_norm: normalise the output too.
        last_affine: that norm has a scale and a shift.
        last_bias: the last linear layer has a bias, where no norm follows.
        bias: of every linear layer; None: where no norm follows.
    """

    def __init__(
        self,
        *widths: int,
        norm: str = "batch",
        activation: type[nn.Module] = nn.ReLU,
        last_norm: bool = False,
        last_affine: bool = True,
        last_bias: bool = True,
        bias: bool | None = None,
    ):
        if norm not in NORMS:
            raise ValueError(f"MLP: norm must be one of {', '.join(NORMS)}, got {norm!r}")
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(pairwise(widths)):
            last = i == len(widths) - 2
            normed = norm != "none" and (last_norm or not last)
            has_bias = bias if bias is not None else not normed and (last_bias or not last)
            layers.append(nn.Linear(width_in, width_out, bias=has_bias))
            affine = last_affine or not last
            if normed and norm == "batch":
                layers.append(nn.BatchNorm1d(width_out, affine=affine))
            elif normed:
                layers.append(nn.LayerNorm(width_out, elementwise_affine=affine))
            if not last:
                layers.append(activation())
        super().__init__(*layers)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or a plain Sequential of some: a part of an MLP needn't be one."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def init_as_vision_transformer(module: nn.Module) -> None:
    """Linear layers' weights from a normal distribution of deviation 0.02, cut off; biases 0. DINO's heads have it."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """Scores against prototypes of unit length: `linear(x, normalize(weight))`, [N, D] -> [N, K].

    Normalised in the forward pass, so that no step forgets it. Frozen for the first steps by a factor on the gradient,
    which needs no decision on the host.

    Args:
        width: D.
        prototypes: K.
        frozen_steps: so many steps the weight gets a gradient of zero.
    """

    def __init__(self, width: int, prototypes: int, frozen_steps: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, width))
        self.frozen_steps = frozen_steps
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(normalize(torch.randn_like(self.weight), dim=1))

    def unit_weight(self, step: Tensor) -> Tensor:
        """[K, D], rows of length one: what `fastjem.functional.prototype_head_cross_entropy` takes. step: 0-dim."""
        weight = normalize(self.weight, dim=1)
        if self.frozen_steps and weight.requires_grad:
            live = (step >= self.frozen_steps).to(weight.dtype)
            weight = weight * live + weight.detach() * (1 - live)
        return weight

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return linear(x, self.unit_weight(step))


@torch.no_grad()
def unit_keys(keys: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' rows [N, D], of length one, at least float32: what a `Queue` takes. A rank may have none."""
    with Agreement("unit_keys", group) as ranks:
        keys = normalize(keys.detach().to(torch.promote_types(keys.dtype, torch.float32)), dim=1)
        ranks.rows_of(keys)
    return keys if group is None else gather_rows(keys, group, ranks.sizes)[0]


@torch.no_grad()
def push_rows(queue: Tensor, pointer: Tensor, rows: Tensor) -> None:
    """Rows [N, D] over the oldest ones of a queue [L, D], around its end; `pointer` ([] or [1] int64) moves on."""
    refuse_vmap("push_rows", queue, rows)
    length = len(queue)
    skipped = max(rows.shape[0] - length, 0)  # later rows of this very call would replace them
    rows = rows.detach()[skipped:].to(queue)
    places = (pointer + skipped + torch.arange(rows.shape[0], device=queue.device)) % length
    queue.index_copy_(0, places, rows)
    pointer.add_(skipped + rows.shape[0]).remainder_(length)


class HeldRows(nn.Module):
    """Rows that a step's micro-batches bring, waiting to be pushed into a queue at its end.

    Args:
        most: rows a step brings at most; of more the last ones stay. The queue they go to must be as long at least.
        width: D.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, most: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(most, width), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def reset_parameters(self) -> None:
        self.rows.zero_()
        self.count.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.reset_parameters()  # a state is saved where nothing is held
        super()._load_from_state_dict(*args)

    @torch.no_grad()
    def hold(self, rows: Tensor) -> None:
        """Rows [N, D] to wait."""
        refuse_vmap("HeldRows", self.rows, rows)
        most = len(self.rows)
        skipped = max(rows.shape[0] - most, 0)
        rows = rows.detach()[skipped:].to(self.rows)
        places = (self.count + skipped + torch.arange(rows.shape[0], device=rows.device)) % most
        self.rows.index_copy_(0, places, rows)
        self.count.add_(skipped + rows.shape[0])

    @torch.no_grad()
    def push_into(self, queue: Tensor, pointer: Tensor) -> None:
        """What `push_rows` of all rows held in one call would do; then none is held.

        How many there are is known on the device only, so every place of the buffer writes: those that hold nothing
        write back what is in the queue.
        """
        most = len(self.rows)
        last = self.count - 1
        # The newest row that came to each place: number `count - 1`, or up to most - 1 before it; below 0 there is none
        number = last - (last - torch.arange(most, device=self.rows.device)) % most
        places = (pointer + number) % len(queue)
        rows = torch.where((number >= 0)[:, None], self.rows.to(queue.dtype), queue[places])
        queue.index_copy_(0, places, rows)
        pointer.add_(self.count).remainder_(len(queue))
        self.count.zero_()


class Queue(nn.Module):
    """The last `length` keys of all ranks, unit vectors from the start; pointer and rows are saved with the weights.

    Args:
        length: L, of the queue.
        width: D.
        held: keys of a step at most that wait for its end (see the module's text); 0: `push` alone is used.
    """

    rows: Tensor  # [L, D]
    pointer: Tensor
    came: Tensor  # 0-dim int64: how many of the rows, the first ones, are keys by now

    def __init__(self, length: int, width: int, held: int = 0):
        super().__init__()
        self.register_buffer("rows", torch.empty(length, width))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("came", torch.zeros((), dtype=torch.long))
        self.held = HeldRows(min(held, length), width) if held else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.rows.copy_(normalize(torch.randn_like(self.rows), dim=1))
        self.pointer.zero_()
        self.came.zero_()

    @torch.no_grad()
    def begin(self, keys: Tensor) -> Tensor:
        """Before the first key came all rows become copies of these unit vectors [N, D]; afterwards nothing changes.

        Against random directions, which no image resembles, all images would learn to point the same way.

        Returns the rows, which no later `push` writes to.
        """
        copies = keys[torch.arange(len(self.rows), device=keys.device) % len(keys)].to(self.rows.dtype)
        rows = torch.where(self.came > 0, self.rows, copies)
        self.rows.copy_(rows)
        return rows

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Unit vectors [N, D] over the oldest rows, around the end; without a host sync."""
        push_rows(self.rows, self.pointer, keys)
        self._count(keys.shape[0])

    def _count(self, keys: int | Tensor) -> None:
        self.came.add_(keys).clamp_(max=len(self.rows))

    def hold(self, keys: Tensor) -> None:
        """Unit vectors [N, D] for `step_ends` to push."""
        if self.held is None:
            raise ValueError("Queue: hold needs Queue(held=...), the keys of a step at most, got 0")
        self.held.hold(keys)

    @torch.no_grad()
    def step_ends(self) -> None:
        """Push what was held since the last call; once per optimiser step."""
        if self.held is not None:
            self._count(self.held.count)
            self.held.push_into(self.rows, self.pointer)


class HeldMean(nn.Module):
    """The mean over rows that a step's micro-batches bring: their sum and their number, until the step ends.

    Args:
        size: of the mean.
    """

    total: Tensor
    rows: Tensor

    def __init__(self, size: tuple[int, ...]):
        super().__init__()
        self.register_buffer("total", torch.zeros(size), persistent=False)
        self.register_buffer("rows", torch.zeros(()), persistent=False)

    def reset_parameters(self) -> None:
        self.total.zero_()
        self.rows.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.reset_parameters()  # a state is saved where nothing is held
        super()._load_from_state_dict(*args)

    @torch.no_grad()
    def hold(self, mean: Tensor, rows: int | Tensor) -> None:
        """A micro-batch's mean over so many rows of this rank."""
        refuse_vmap("HeldMean", self.total, mean)
        self.total.add_(sum_of_rows(mean.detach().to(self.total.dtype), rows).reshape(self.total.shape))
        self.rows.add_(rows)

    @torch.no_grad()
    def move(self, average: Tensor, momentum: float, group: dist.ProcessGroup | None) -> None:
        """`average = momentum * average + (1 - momentum) * mean` over all ranks' rows, in place; then none is held.

        Where no rank held a row the average stays.
        """
        total, rows = sum_and_count_of_ranks(self.total, self.rows, group)
        mean = (total / rows.clamp(min=1)).to(average.dtype)
        weight = (rows > 0).to(average.dtype) * (1 - momentum)
        average.lerp_(mean.reshape(average.shape), weight)
        self.reset_parameters()


def check_center_mode(who: str, mode: str) -> None:
    if mode != "mean":
        raise ValueError(f"{who}: the centre's mode must be mean, got {mode!r}")


@torch.no_grad()
def move_center(
    center: Tensor, mean: Tensor, rows: int | Tensor, momentum: float, group: dist.ProcessGroup | None
) -> None:
    """In place, towards the mean over all ranks' rows, of which this rank's, of the centre's size, is given."""
    refuse_vmap("move_center", center, mean)
    mean = mean_of_ranks(mean.to(center.dtype), rows, group).reshape(center.shape)
    center.mul_(momentum).add_(mean * (1 - momentum))


class Center(nn.Module):
    """DINO's centre: the moving average of the batch's mean. lightly's class, and in two parts (see the module's text).

    Args:
        size: of the centre; `update` takes the mean over the dimensions that are 1 here.
        mode: "mean".
        momentum: what the old centre keeps.
    """

    center: Tensor

    def __init__(self, size: tuple[int, ...], mode: str = "mean", momentum: float = 0.9) -> None:
        super().__init__()
        check_center_mode("Center", mode)
        self.size = size
        self.dim = tuple(i for i, length in enumerate(size) if length == 1)
        self.register_buffer("center", torch.zeros(size))
        self.momentum = momentum
        self.held = HeldMean(size)

    def reset_parameters(self) -> None:
        self.center.zero_()

    @property
    def value(self) -> Tensor:
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move towards the mean of `x` over the dimensions that are 1 in the centre's size, over all ranks.

        `x` has the centre's dimensions. Of one that has fewer, so that the mean is of too few numbers, it is repeated
        over the centre, as in lightly. A rank may come with no rows.
        """
        with Agreement("Center", default_group()) as ranks:
            if x.dim() <= max(self.dim, default=-1):
                checks.fail("Center", f"x must have the dimensions of the centre {self.size}", tuple(x.shape))
            mean = x.mean(self.dim, keepdim=True, dtype=self.center.dtype)
            try:
                mean = mean.expand(self.size)
            except RuntimeError:
                checks.fail("Center", f"the mean of x must be of the centre's size {self.size}", tuple(mean.shape))
            ranks.alike(self.size)
        self.move(mean, math.prod([x.shape[i] for i in self.dim]))

    def move(self, mean: Tensor, rows: int) -> None:
        """Move towards the mean over all ranks' rows, of which this rank's, which a loss may have computed, is given.

        The ranks are all that torch.distributed knows, as in lightly.
        """
        move_center(self.center, mean, rows, self.momentum, default_group())

    def hold(self, mean: Tensor, rows: int | Tensor) -> None:
        """A micro-batch's mean over so many rows of this rank, for `step_ends`."""
        self.held.hold(mean, rows)

    def step_ends(self, group: dist.ProcessGroup | None) -> None:
        """Move once towards the mean of all rows held since the last call, by the ranks of the group."""
        self.held.move(self.center, self.momentum, group)


def linear_warmup(step: Tensor, start: float, end: float, steps: int) -> Tensor:
    """From `start` at step 0 to `end` at `steps` and after: 0-dim, on the step's device."""
    return start + (end - start) * (step / max(steps, 1)).clamp(max=1)
