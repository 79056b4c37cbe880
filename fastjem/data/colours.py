"""What the table of parameters does to crops of any number of channels, once they are on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.data.parameters import column
from fastjem.data.size import Size
from fastjem.kernels.augment.reference import blur_matrix

THRESHOLD = 128  # of solarizing


def augmented(
    crops: Tensor,
    table: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Crops [B, H, W, C] uint8 -> views [B, C, H, W]: `fastjem.functional.augment`, and for C other than 3 what of it
    needs no colours.

    Red, green and blue are one operator. Other channels are flipped, brightened, blurred, solarized and normalised each
    by itself, in plain torch; contrast is around the mean of them all; saturation, hue and grayscale are left out.
    """
    if crops.shape[3] == 3:
        return F.augment(crops, table, mean=mean, std=std, dtype=dtype, channels_last=channels_last)
    p = table[:, :, None, None, None]  # p[:, SIGMA] is [B, 1, 1, 1]
    x = crops.permute(0, 3, 1, 2).to(table.dtype)
    x = x.flip(3).where(p[:, column.FLIP] > 0.5, x)
    x = _brightness_and_contrast(x, p)
    rows, columns = (blur_matrix(table[:, column.SIGMA], size)[:, None] for size in x.shape[2:])
    x = rows @ x @ columns.mT
    x = (255 - x).where((p[:, column.SOLARIZE] > 0.5) & (x >= THRESHOLD), x)
    channel_mean, channel_std = torch.tensor([list(mean), list(std)], device=x.device, dtype=x.dtype)[:, :, None, None]
    x = ((x / 255 - channel_mean) / channel_std).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _brightness_and_contrast(x: Tensor, p: Tensor) -> Tensor:
    """[B, C, H, W] in levels, by the columns p [B, P, 1, 1, 1], in the order that the table says."""
    brightness, contrast = (column.JITTER.index(name) for name in ("brightness", "contrast"))
    first = [order.index(brightness) < order.index(contrast) for order in column.ORDERS]  # brightness comes first
    number = p[:, column.ORDER].clamp(0, len(column.ORDERS) - 1).long()
    brightness_first = torch.tensor(first, device=x.device)[number]

    def brighter(y: Tensor) -> Tensor:
        return (y * p[:, column.BRIGHTNESS]).clamp(0, 255)

    def sharper(y: Tensor) -> Tensor:
        mean = y.mean((1, 2, 3), keepdim=True)
        return (y * p[:, column.CONTRAST] + mean * (1 - p[:, column.CONTRAST])).clamp(0, 255)

    return sharper(brighter(x)).where(brightness_first, brighter(sharper(x)))


def windows(images: Tensor, indices: Tensor, table: Tensor, *, size: Size, bicubic: bool) -> Tensor:
    """`fastjem.functional.crop_resize` of images [N, H, W, C] uint8 of any number of channels, three at a time."""
    channels = images.shape[3]
    if channels == 3:
        return F.crop_resize(images, indices, table, size=size, bicubic=bicubic)
    chosen, numbers = images[indices], torch.arange(len(indices), device=indices.device)
    out = []
    for first in range(0, channels, 3):
        three = chosen[..., first : first + 3]
        missing = 3 - three.shape[3]
        three = torch.cat([three, three[..., :1].expand(-1, -1, -1, missing)], 3) if missing else three
        out.append(F.crop_resize(three.contiguous(), numbers, table, size=size, bicubic=bicubic))
    return torch.cat(out, 3)[..., :channels].contiguous()
