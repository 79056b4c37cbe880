"""The specification of the image operators; columns.py describes their table of parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    GRAYSCALE,
    HUE,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    WIDTH,
)


def _gray(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]"""
    red, green, blue = x.split(1, 1)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """HSV with the hue turned. Each channel is the largest value less the chroma times a trapezium of the hue."""
    red, green, blue = x.split(1, 1)
    top = x.amax(1, True)
    chroma = top - x.amin(1, True)
    over = 1 / chroma.where(chroma > 0, 1)
    sixths = ((red - green) * over + 4).where(top != green, (blue - red) * over + 2)
    sixths = sixths.where(top != red, (green - blue) * over) + 6 * turns
    sixths = sixths - 6 * (sixths / 6).floor()  # [0, 6]: red, yellow, green, cyan, blue, magenta, red
    distances = [(sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()]
    return top - chroma * (1 - torch.cat(distances, 1).clamp(0, 1))


def blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """[B] -> [B, size, size]: one axis of a Gaussian blur with reflected borders (the edge pixel isn't repeated).

    The radius is ceil(3 sigma), at most (size - 1) // 2: torchvision's kernel of that size. Sigma 0: the identity.
    """
    at = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    to = at[:, None]
    source = at[None, :]
    width = sigma[:, None, None].clamp_min(1e-6)
    radius = (3 * sigma).ceil().clamp(0, (size - 1) // 2)[:, None, None]

    def weight(distance: Tensor) -> Tensor:
        return (-0.5 * (distance / width).square()).exp().where(distance.abs() <= radius, 0)

    before = weight(to + source).where(source > 0, 0)
    behind = weight(2 * (size - 1) - to - source).where(source < size - 1, 0)
    matrix = weight(to - source) + before + behind
    return matrix / matrix.sum(2, keepdim=True)


def augment(
    images: Tensor,  # [B, H, W, 3] uint8
    parameters: Tensor,  # [B, P]
    mean: list[float],  # of red, green, blue; 1 is white
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    exact: bool,
    threshold: float,
) -> Tensor:
    """[B, 3, H, W]: flip, colour jitter, grayscale, blur, solarize, `(x / 255 - mean) / std`, by the table's rows.

    The steps are torchvision's on tensors, in levels (0 to 255). Between them values stay fractions; with `exact` they
    become whole where torchvision's uint8 does (cut off, after a blur rounded). Arithmetic is in the table's dtype.
    """
    p = parameters[:, :, None, None, None]  # p[:, HUE] is [B, 1, 1, 1]

    def whole(y: Tensor) -> Tensor:
        return y.clamp(0, 255).floor() if exact else y.clamp(0, 255)

    def blend(y: Tensor, other: Tensor, factor: Tensor) -> Tensor:
        return whole(y * factor + other * (1 - factor)).where(factor != 1, y)

    x = images.permute(0, 3, 1, 2).to(parameters.dtype)
    x = x.flip(3).where(p[:, FLIP] > 0.5, x)
    orders = torch.tensor(ORDERS, device=x.device)[parameters[:, ORDER].clamp(0, 23).long()]  # [B, 4]
    for step in orders[:, :, None, None, None].unbind(1):  # [B, 1, 1, 1]: the step that comes next for each image
        gray = whole(_gray(x)) if exact else _gray(x)
        turned = _hue(x, p[:, HUE])
        steps = (
            whole(x * p[:, BRIGHTNESS]),
            blend(x, gray.mean((2, 3), keepdim=True), p[:, CONTRAST]),
            blend(x, gray, p[:, SATURATION]),
            whole(turned * (255.999 / 255) if exact else turned).where(p[:, HUE] != 0, x),
        )
        for i, y in enumerate(steps):
            x = y.where(step == i, x)
    x = whole(_gray(x)).where(p[:, GRAYSCALE] > 0.5, x)
    rows, columns = (blur_matrix(parameters[:, SIGMA], size)[:, None] for size in x.shape[2:])
    x = rows @ x @ columns.mT
    x = x.round() if exact else x
    x = (255 - x).where((p[:, SOLARIZE] > 0.5) & (x >= threshold), x)
    channel_mean, channel_std = torch.tensor([mean, std], device=x.device, dtype=x.dtype)[:, :, None, None]
    x = ((x / 255 - channel_mean) / channel_std).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def resize_matrix(start: Tensor, length: Tensor, source: int, size: int, bicubic: bool) -> Tensor:
    """[B], [B] -> [B, size, source]: one axis of cutting [start, start + length) and resizing it, antialiased.

    Pillow's and torch's `interpolate(antialias=True)`: a triangle of radius 1 or Keys' cubic (a = -0.5) of radius 2,
    widened by the scale where that is above 1; pixels outside the window have no weight, the rest are normalised.
    """
    start, length = start[:, None, None], length[:, None, None]
    start = start.clamp(0, source - 1).floor()
    length = length.floor().clamp_min(1).minimum(source - start)
    scale = length / size
    pixel = torch.arange(source, device=start.device, dtype=start.dtype)
    centre = start + scale * (torch.arange(size, device=start.device, dtype=start.dtype)[:, None] + 0.5)
    x = ((pixel + 0.5 - centre) / scale.clamp_min(1)).abs()
    if bicubic:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = near.where(x < 1, far.where(x < 2, 0))
    else:
        weight = (1 - x).clamp_min(0)
    weight = weight.where((pixel >= start) & (pixel < start + length), 0)
    return weight / weight.sum(2, keepdim=True)


def crop_resize(
    images: Tensor,  # [N, H, W, 3] uint8
    indices: Tensor,  # [B] int64
    parameters: Tensor,  # [B, P]
    size: Sequence[int],  # height and width
    bicubic: bool,
) -> Tensor:
    """[B, *size, 3] uint8: the windows TOP, LEFT, HEIGHT, WIDTH of images `indices`, resized with antialiasing.

    Columns first, rounded to levels, then rows, as torch does on uint8. Windows are cut to the image.
    """
    top, left, height, width = parameters[:, : WIDTH + 1].unbind(1)
    x = images[indices].permute(0, 3, 1, 2).to(parameters.dtype)
    across = resize_matrix(left, width, images.shape[2], size[1], bicubic)[:, None]
    down = resize_matrix(top, height, images.shape[1], size[0], bicubic)[:, None]
    x = (x @ across.mT + 0.5).floor().clamp(0, 255)
    x = (down @ x + 0.5).floor().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
