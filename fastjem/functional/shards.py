"""Parameters in shards (FSDP2's DTensors), of which each rank has its own part."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjem.functional import checks


def is_distributed(x: Tensor) -> bool:
    if type(x) in checks.PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, any other tensor as it is."""
    return x.to_local() if is_distributed(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def one_layout(op: str, contract: str, tensors: Sequence[Tensor], at: str = "") -> tuple[Any, Any] | None:
    """The mesh and the placements of all tensors, None of plain ones; ValueError where they differ, or are partial."""
    layouts = [
        (x.device_mesh, x.placements) if is_distributed(x) else None  # pyright: ignore[reportAttributeAccessIssue]
        for x in tensors
    ]
    is_partial = any(p.is_partial() for layout in layouts if layout for p in layout[1])
    if is_partial or any(layout != layouts[0] for layout in layouts):
        came = " and ".join("a plain tensor" if layout is None else str(layout[1]) for layout in layouts)
        if len({layout and layout[1] for layout in layouts}) == 1 and not is_partial:
            first, *others = dict.fromkeys(layout[0] for layout in layouts if layout)
            came = f"placements {layouts[0] and layouts[0][1]} on {first} and the same on {others[0]}"
        checks.fail(op, contract, came + at)
    return layouts[0]
