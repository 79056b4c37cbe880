"""What losses need of torch.distributed: sizes and gathering of uneven batches, all without gradients.

No collective here is differentiable on purpose. Each loss computes the gradient of the *global* loss for this rank's
rows by itself and multiplies it by the number of ranks, because DistributedDataParallel divides by it.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def sizes_of_ranks(n: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Each rank's number of rows, on the host: the one synchronisation of a distributed loss."""
    mine = torch.tensor([n], device=device)
    sizes = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return torch.cat(sizes).tolist()


def gather_rows(x: Tensor, group: dist.ProcessGroup, dim: int = 0) -> tuple[Tensor, int]:
    """All ranks' `x` concatenated along `dim` (where they may differ in length), and where this rank's part begins."""
    x = x.detach().movedim(dim, 0).contiguous()
    sizes = sizes_of_ranks(len(x), group, x.device)
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    everything = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return everything.movedim(0, dim), sum(sizes[: dist.get_rank(group)])


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x
