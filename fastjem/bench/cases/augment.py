"""Views from a table of parameters, drawn as SimCLR's recipe says (jitter 0.8, 0.8, 0.8, 0.2; blur for one in two)."""

import math
import os

import torch
from torch import Tensor

import fastjem.functional as F
from fastjem.bench.case import Case, Draw
from fastjem.kernels.augment import columns as table
from fastjem.kernels.augment import reference

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def draw_table(draw: Draw, rows: int, blur: bool, height: int, width: int) -> Tensor:
    """[rows, P]: parameters of views of images `height` x `width`; the windows have 0.3 to 1 of their sides."""
    u = torch.rand(rows, 14, generator=draw.generator, device=draw.device)  # a column for each number that is drawn
    p = torch.zeros(rows, table.COLUMNS, device=draw.device)
    p[:, table.HEIGHT] = (height * (0.3 + 0.7 * u[:, 0])).floor()
    p[:, table.WIDTH] = (width * (0.3 + 0.7 * u[:, 1])).floor()
    p[:, table.TOP] = (u[:, 2] * (height + 1 - p[:, table.HEIGHT])).floor()
    p[:, table.LEFT] = (u[:, 3] * (width + 1 - p[:, table.WIDTH])).floor()
    p[:, table.FLIP] = (u[:, 4] < 0.5).float()
    jitter = u[:, 5:6] < 0.8
    p[:, table.BRIGHTNESS : table.HUE] = torch.where(jitter, 0.2 + 1.6 * u[:, 6:9], 1)
    p[:, table.HUE] = torch.where(jitter[:, 0], 0.4 * u[:, 9] - 0.2, 0)
    p[:, table.ORDER] = (24 * u[:, 10]).floor()
    p[:, table.GRAYSCALE] = (u[:, 11] < 0.2).float()
    if blur:
        p[:, table.SIGMA] = torch.where(u[:, 12] < 0.5, 0.1 + 1.9 * u[:, 13], 0)
    return p


def torchvision():
    """One image after the other, as a loader's workers do it; on floats, so that results compare."""
    from torchvision.transforms.v2 import functional as V

    steps = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)

    def one(image: Tensor, row: list[float]) -> Tensor:
        x = image.permute(2, 0, 1).float() / 255
        if row[table.FLIP]:
            x = V.horizontal_flip(x)
        for i in table.ORDERS[int(row[table.ORDER])]:
            if row[table.BRIGHTNESS + i] != (0 if i == 3 else 1):
                x = steps[i](x, row[table.BRIGHTNESS + i])
        if row[table.GRAYSCALE]:
            x = V.rgb_to_grayscale(x, num_output_channels=3)
        if sigma := row[table.SIGMA]:
            radius = min(math.ceil(3 * sigma), (x.shape[1] - 1) // 2)  # torchvision's reflection allows no more
            x = V.gaussian_blur(x, [2 * radius + 1] * 2, [sigma, sigma])
        return V.normalize(x, MEAN, STD)

    def run(images: Tensor, parameters: Tensor) -> Tensor:
        return torch.stack([one(*pair) for pair in zip(images, parameters.tolist(), strict=True)])

    return run


def triton_augment():
    """What it shares with ours: flip, brightness, saturation, greyscale, normalisation. Its contrast is about 0.5 where
    others' is about the image's mean, and it has no hue, blur or order. It takes floats of a channel after the other,
    so that conversion is in its time."""
    os.environ.setdefault("TRITON_AUGMENT_SUPPRESS_FIRST_RUN_MESSAGE", "1")
    from triton_augment.functional import fused_augment  # pyright: ignore[reportMissingImports]

    def run(images: Tensor, parameters: Tensor) -> Tensor:
        x = (images.permute(0, 3, 1, 2).float() / 255).contiguous()
        height, width = x.shape[2:]
        p = parameters.T.contiguous()  # each factor's numbers side by side, as its kernel reads them
        return fused_augment(
            x, top=0, left=0, height=height, width=width, flip_horizontal=p[table.FLIP] > 0,
            brightness_factor=p[table.BRIGHTNESS], saturation_factor=p[table.SATURATION],
            grayscale=p[table.GRAYSCALE] > 0, mean=tuple(MEAN), std=tuple(STD),
        )  # fmt: skip

    return run


def without_contrast_and_hue(p: Tensor) -> Tensor:
    p[:, table.CONTRAST] = 1
    p[:, [table.HUE, table.ORDER, table.SIGMA]] = 0
    return p


def case(
    batch: int, size: int, dtype: torch.dtype = torch.float32, blur: bool = True, simple: bool = False, **options
) -> Case:
    """uint8 pixels and the table are read, the result is written. `simple`: of what triton-augment does, too."""

    def inputs(draw: Draw) -> tuple[Tensor, Tensor]:
        coarse = torch.rand(batch, 3, 8, 8, generator=draw.generator, device=draw.device)
        images = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
        parameters = draw_table(draw, batch, blur and not simple, size, size)
        if simple:
            parameters = without_contrast_and_hue(parameters)
        return images.byte().permute(0, 2, 3, 1).contiguous(), parameters

    without = ", no contrast, hue, blur" if simple else "" if blur else ", no blur"
    peers = {"triton-augment": triton_augment} if simple else {"torchvision": torchvision}
    return Case(
        "augment", f"{batch} x {size} x {size}{without}", inputs,
        lambda x, p: reference.augment(x, p, MEAN, STD, dtype, False, False, 128.0),
        lambda x, p: F.augment(x, p, mean=MEAN, std=STD, dtype=dtype), dtype=dtype, peers=peers, loops=("torchvision",),
        bytes=batch * (size * size * 3 * (1 + dtype.itemsize) + 4 * table.COLUMNS), **options,
    )  # fmt: skip


def crop_case(count: int, source: int, size: int, bicubic: bool = False, **options) -> Case:
    """Of each window, about 0.42 of the image, every pixel is read; the views are written."""

    def inputs(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.randint(256, (count, source, source, 3), generator=draw.generator, device=draw.device)
        indices = torch.randint(count, (count,), generator=draw.generator, device=draw.device)
        return images.byte(), indices, draw_table(draw, count, False, source, source)

    return Case(
        "crop_resize", f"{count} x {source} -> {size}" + (", bicubic" if bicubic else ""), inputs,
        lambda images, indices, parameters: reference.crop_resize(images, indices, parameters, (size, size), bicubic),
        lambda images, indices, parameters: F.crop_resize(images, indices, parameters, size=size, bicubic=bicubic),
        dtype=torch.uint8,
        bytes=count * 3 * (int(0.42 * source * source) + size * size), **options,
    )  # fmt: skip


CASES = [
    case(16, 224, devices=("cpu",)),
    case(256, 32, blur=False, devices=("cpu",)),
    case(2048, 224, torch.bfloat16, devices=("cuda",)),
    case(8192, 32, torch.bfloat16, blur=False, devices=("cuda",)),
    case(2048, 224, simple=True, devices=("cuda",)),
    crop_case(256, 32, 32, devices=("cpu",)),
    crop_case(8192, 32, 32, devices=("cuda",)),
    crop_case(16, 256, 224, bicubic=True),
]
