"""Tables of augmentation parameters, and pictures to try them on."""

import pytest
import torch
from torch import Tensor

from fastjem.kernels.augment import columns as table


def neutral(rows: int) -> Tensor:
    """[B, P]: nothing is done."""
    parameters = torch.zeros(rows, table.COLUMNS)
    parameters[:, [table.BRIGHTNESS, table.CONTRAST, table.SATURATION]] = 1
    return parameters


def view_table(rows: int, seed: int = 0, height: int = 5, width: int = 6, **columns: float) -> Tensor:
    """[B, P]: every step in most rows, strong ones; `columns` (by their names in small letters) are the same in all."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(rows, 16, generator=g)
    p = neutral(rows)
    p[:, table.HEIGHT], p[:, table.WIDTH] = (u[:, 0] * height).ceil(), (u[:, 1] * width).ceil()
    p[:, table.TOP] = (u[:, 2] * (height - p[:, table.HEIGHT] + 1)).floor()
    p[:, table.LEFT] = (u[:, 3] * (width - p[:, table.WIDTH] + 1)).floor()
    p[:, table.FLIP] = (u[:, 4] < 0.5).float()
    on = u[:, 5:9] < 0.8
    p[:, table.BRIGHTNESS : table.HUE] = torch.where(on[:, :3], 0.2 + 1.6 * u[:, 9:12], 1)
    p[:, table.HUE] = torch.where(on[:, 3], u[:, 12] - 0.5, 0)
    p[:, table.ORDER] = torch.arange(rows) * 7 % 24  # all of them in 24 rows
    p[:, table.GRAYSCALE] = (u[:, 13] < 0.2).float()
    p[:, table.SIGMA] = torch.where(u[:, 14] < 0.6, 0.1 + 3.2 * u[:, 14], 0)
    p[:, table.SOLARIZE] = (u[:, 15] < 0.3).float()
    for name, value in columns.items():
        p[:, getattr(table, name.upper())] = value
    return p


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """[B, H, W, 3] uint8: smooth colours, edges, a little noise, and areas of black, white, gray and red."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 330 - 40
    edges = torch.nn.functional.interpolate(torch.rand(count, 3, 5, 3, generator=g), (height, width)) * 100 - 50
    x = smooth + edges + torch.randn(count, 3, height, width, generator=g) * 6
    x = x.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    for i, colour in enumerate(((0, 0, 0), (255, 255, 255), (127, 127, 127), (255, 0, 0), (200, 200, 90))):
        x[:, height // 2 : height // 2 + 3, 3 * i : 3 * i + 2] = torch.tensor(colour, dtype=torch.uint8)
    return x


def torchvisions(image: Tensor, row: Tensor) -> Tensor:
    """[H, W, 3] levels -> [3, H, W] levels by torchvision's functions: of uint8 on uint8, of floats on floats from 0 to
    1."""
    V = pytest.importorskip("torchvision.transforms.v2.functional")
    white = 255 if image.dtype == torch.uint8 else 1
    x = image.permute(2, 0, 1)
    x = x if white == 255 else x / 255
    row = row.tolist()
    if row[table.FLIP]:
        x = V.horizontal_flip(x)
    steps = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for i in table.ORDERS[int(row[table.ORDER])]:
        factor = row[table.BRIGHTNESS + i]
        if factor != (0 if i == 3 else 1):
            x = steps[i](x, factor)
    if row[table.GRAYSCALE]:
        x = V.rgb_to_grayscale(x, num_output_channels=3)
    if sigma := row[table.SIGMA]:
        largest = [(size - 1) // 2 for size in (x.shape[2], x.shape[1])]
        radii = [min(int(torch.tensor(3 * sigma).ceil()), most) for most in largest]
        x = V.gaussian_blur(x, [2 * r + 1 for r in radii], [sigma, sigma])
    if row[table.SOLARIZE]:
        x = V.solarize(x, 128 if white == 255 else 128 / 255)
    return x if white == 255 else x * 255
