"""The image operators on the CPU, in C++."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..native import CODES, address
from . import reference


def augment(
    images: Tensor,  # [B, H, W, 3] uint8
    parameters: Tensor,  # [B, P]
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    exact: bool,
    threshold: float,
) -> Tensor:
    if parameters.dtype != torch.float32:
        return reference.augment(images, parameters, mean, std, dtype, channels_last, exact, threshold)
    images = images.contiguous()
    parameters = parameters.contiguous()
    batch, height, width, _ = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((batch, 3, height, width), dtype=dtype, memory_format=layout)
    _C.augment(
        CODES[dtype],
        address(images),
        address(parameters),
        batch,
        height,
        width,
        mean,
        std,
        threshold,
        channels_last,
        exact,
        address(out),
        torch.get_num_threads(),
    )
    return out


def crop_resize(
    images: Tensor,  # [N, H, W, 3] uint8
    indices: Tensor,  # [B] int64
    parameters: Tensor,  # [B, P]
    size: Sequence[int],  # height and width
    bicubic: bool,
) -> Tensor:
    if parameters.dtype != torch.float32:
        return reference.crop_resize(images, indices, parameters, size, bicubic)
    count, height, width, _ = images.shape
    low, high = (int(x) for x in torch.aminmax(indices))
    if low < 0 or high >= count:
        raise IndexError(f"crop_resize: indices must be in [0, {count}), got {low if low < 0 else high}")
    images = images.contiguous()
    indices = indices.contiguous()
    parameters = parameters.contiguous()
    out = torch.empty((len(indices), *size, 3), dtype=torch.uint8)
    _C.crop_resize(
        address(images),
        address(indices),
        address(parameters),
        len(indices),
        height,
        width,
        *size,
        bicubic,
        address(out),
        torch.get_num_threads(),
    )
    return out
