"""Tables of augmentation parameters, and pictures to try them on."""

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
