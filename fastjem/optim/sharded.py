"""Parameters in shards (FSDP2's DTensors): each rank updates its own part, and norms are of the whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjem import collectives
from fastjem.functional import checks


class Sharding(NamedTuple):
    """How a DTensor is distributed; equal for parameters whose norms are added over the same ranks."""

    mesh: Any  # torch.distributed.device_mesh.DeviceMesh
    dims: tuple[int, ...]  # of the mesh, along which parameters are in shards, and not copies


def _is_distributed(x: Tensor) -> bool:
    if type(x) in checks.PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, any other tensor as it is."""
    return x.to_local() if _is_distributed(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def sharding_of(op: str, parameter: Tensor, *others: Tensor | None) -> Sharding | None:
    """None for a tensor that isn't distributed; ValueError where what goes with a parameter is distributed otherwise."""
    layouts = [
        (x.device_mesh, x.placements) if _is_distributed(x) else None  # pyright: ignore[reportAttributeAccessIssue]
        for x in (parameter, *others)
        if x is not None
    ]
    is_partial = any(p.is_partial() for layout in layouts if layout for p in layout[1])
    if is_partial or any(layout != layouts[0] for layout in layouts):
        came = " and ".join("a plain tensor" if layout is None else str(layout[1]) for layout in layouts)
        checks.fail(op, "a parameter, its gradient and its teacher must be sharded alike", came)
    if layouts[0] is None:
        return None
    mesh, placements = layouts[0]
    return Sharding(mesh, tuple(i for i, p in enumerate(placements) if not p.is_replicate()))


def sum_over_shards(x: Tensor, sharding: Sharding) -> Tensor:
    """The sum over the ranks that have other parts of the same parameters."""
    for dim in sharding.dims:
        x = collectives.sum_over_ranks(x, sharding.mesh.get_group(dim))
    return x
