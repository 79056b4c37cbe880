"""What losses of pairs of views have in common, whatever their number, and whichever side has a momentum encoder.

The rule is SwAV's and DINO's: each large view is a target of every other view, large or small, and a small view is no
target.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastjem.methods.defaults import at_most
from fastjem.methods.protocol import Branch, RunFacts
from fastjem.nn.parts import Queue, unit_keys

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_over_pairs(loss: Loss, queries: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The mean of `loss(queries[j], targets[i])` over all i and j but i = j: a view isn't compared with itself.

    Args:
        queries: V tensors [B, D], one a view, the large ones first.
        targets: one a large view.
    """
    return _mean([loss(query, target) for j, query in enumerate(queries) for i, target in enumerate(targets) if i != j])


def symmetric(loss: Loss, student: Branch, teacher: Branch, views: Sequence[Tensor], large: int) -> Tensor:
    """The mean over pairs of the loss of two views' projections [B, D]; of two views alone their loss.

    With a momentum encoder the targets are its own. Without, both sides learn, and what `loss` gives for two large
    views stands for both of its directions: it counts twice.

    Args:
        loss: of a query and a target; without a momentum encoder the same in both directions.
        large: how many of the views are large ones.
    """
    return _over_pairs(loss, *_projected(student, teacher, views, large), large)


def made_queue(length: int, width: int, run: RunFacts) -> Queue | None:
    """Of an option `queue`, at most a row for 4 images of the data; None of 0."""
    if not length:
        return None
    length = at_most(length, run.images, each=4)
    return Queue(length, width, held=run.images_per_step or length)


def against_queue(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    queue: Queue,
    student: Branch,
    teacher: Branch,
    views: Sequence[Tensor],
    large: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """`symmetric` of a loss of query, target and the rows [K, D] of a queue, which then waits to take up the second
    large view's projections, of all ranks.

    Of two views without a momentum encoder the first one is the query, as in lightly's `NTXentLoss(memory_bank_size=)`.
    """
    z, targets = _projected(student, teacher, views, large)
    keys = unit_keys((z if targets is None else targets)[1], group)
    negatives = queue.begin(keys).to(z[0].dtype)
    queue.hold(keys)
    return _over_pairs(lambda query, target: loss(query, target, negatives), z, targets, large)


def _projected(
    student: Branch, teacher: Branch, views: Sequence[Tensor], large: int
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """Projections [B, D] of each view, and the momentum encoder's of the large ones; None: there is none."""
    z = student.project(views).chunk(len(views))
    if not teacher.momentum:
        return z, None
    with torch.no_grad():
        return z, teacher.project(views[:large]).chunk(large)


def _over_pairs(loss: Loss, z: Sequence[Tensor], targets: Sequence[Tensor] | None, large: int) -> Tensor:
    if targets is not None:
        return mean_over_pairs(loss, z, targets)
    of_large = [loss(z[i], z[j]) for i in range(large) for j in range(i + 1, large)]
    if len(z) == large:
        return _mean(of_large)
    of_small = [loss(small, target) for small in z[large:] for target in z[:large]]
    return _mean([*of_large, *of_large, *of_small])


def _mean(losses: Sequence[Tensor]) -> Tensor:
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total / len(losses) if len(losses) > 1 else total


def of_large(z: Tensor, views: Sequence[Tensor], large: int) -> Sequence[Tensor]:
    """Of rows [V B, D], those of each large view, as targets of a method that goes without its momentum encoder."""
    return z.chunk(len(views))[:large]


def without_target(views: Sequence[Tensor]) -> list[Tensor]:
    """All views but the second one, which is the only target of methods with one target an image, as MoCo's."""
    return [*views[:1], *views[2:]]
