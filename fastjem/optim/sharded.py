"""Parameters in shards (FSDP2's DTensors): each rank updates its own part, and norms are of the whole."""

from typing import Any, NamedTuple

from torch import Tensor

from fastjem import collectives
from fastjem.functional.shards import one_layout


class Sharding(NamedTuple):
    """How a DTensor is distributed; equal for parameters whose norms are added over the same ranks."""

    mesh: Any  # torch.distributed.device_mesh.DeviceMesh
    dims: tuple[int, ...]  # of the mesh, along which parameters are in shards, and not copies


def sharding_of(op: str, parameter: Tensor, *others: Tensor | None) -> Sharding | None:
    """None for a tensor that isn't distributed; ValueError where what goes with it is distributed otherwise."""
    contract = "a parameter, its gradient and its teacher must be sharded alike"
    layout = one_layout(op, contract, [parameter, *(x for x in others if x is not None)])
    if layout is None:
        return None
    mesh, placements = layout
    return Sharding(mesh, tuple(i for i, p in enumerate(placements) if not p.is_replicate()))


def sum_over_shards(x: Tensor, sharding: Sharding) -> Tensor:
    """The sum over the ranks that have other parts of the same parameters."""
    for dim in sharding.dims:
        x = collectives.sum_over_ranks(x, sharding.mesh.get_group(dim))
    return x
