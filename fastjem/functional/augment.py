"""Images: a table of augmentation parameters carried out on a batch. Not differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjem.functional import checks
from fastjem.kernels.augment.columns import COLUMNS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def augment(
    images: Tensor,
    parameters: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    exact: bool = False,
    threshold: float = 128,
) -> Tensor:
    """Flip, colour jitter, grayscale, Gaussian blur, solarize and `(x / 255 - mean) / std` in one operator.

    Args:
        images: [B, H, W, 3] uint8, red, green and blue last.
        parameters: [B, 13] float32 on the images' device, a row per image. Its columns (named in
            `fastjem.kernels.augment.columns`): 0-3 the crop, not looked at here; 4 flip (0 or 1); 5, 6, 7 factors of
            brightness, contrast and saturation (1: none); 8 hue in turns, -0.5 to 0.5 (0: none); 9 the order of these
            four, an index into `itertools.permutations(range(4))`; 10 grayscale (0 or 1); 11 the blur's sigma in
            pixels (0: none); 12 solarize (0 or 1). Float64 is computed in float64, by plain torch.
        mean, std: of red, green and blue, where white is 1.
        dtype: of the result: float32, bfloat16 or float16.
        channels_last: the result is [B, 3, H, W] in either case; in memory the channels then come last.
        exact: round after each step as torchvision does on uint8, for comparisons. Otherwise fractions of a level stay.
        threshold: of solarizing: levels (0 to 255) from it on are inverted.

    Definitions are torchvision's for tensors (v2.functional): contrast around the mean of the gray image, hue in HSV, a
    true Gaussian with reflected borders and radius ceil(3 sigma), at most what fits the image. An order or a sigma out
    of its range is taken as the nearest in it.

    Returns:
        [B, 3, H, W].

    Raises:
        ValueError: for other shapes and dtypes.
    """
    _check_images("augment", "images must be [B, H, W, 3] uint8", images)
    _check_table("augment", parameters, len(images))
    checks.one_device("augment", (images, parameters))
    if dtype not in DTYPES and not (dtype == parameters.dtype == torch.float64):
        checks.fail("augment", "dtype must be float32, bfloat16 or float16", dtype)
    mean = [checks.host_number("augment", "mean", x) for x in mean]
    std = [checks.host_number("augment", "std", x) for x in std]
    if len(mean) != 3 or len(std) != 3 or not all(x > 0 for x in std):
        checks.fail("augment", "mean and std must be 3 numbers each, std positive", f"{mean} and {std}")
    threshold = checks.host_number("augment", "threshold", threshold)
    return torch.ops.fastjem.augment(images, parameters, mean, std, dtype, channels_last, exact, threshold)


def crop_resize(
    images: Tensor, indices: Tensor, parameters: Tensor, *, size: int | Sequence[int], bicubic: bool = False
) -> Tensor:
    """Cut a window out of each of the images asked for and resize it, antialiased.

    Args:
        images: [N, H, W, 3] uint8: all images, in memory.
        indices: [B] int64: which ones, on the same device; the same one may come more than once.
        parameters: [B, 13] float32 as for `augment`: columns 0-3 are the window's top, left, height and width in
            pixels; what lies outside the image is cut off.
        size: of the result, in pixels: height and width, or the side of a square.
        bicubic: Keys' cubic (a = -0.5) in place of the triangle (bilinear).

    Returns:
        [B, height, width, 3] uint8, within a level of torch's `interpolate(antialias=True)` of the window as uint8.

    Raises:
        ValueError: for other shapes and dtypes.
    """
    _check_images("crop_resize", "images must be [N, H, W, 3] uint8", images)
    if not isinstance(indices, Tensor) or indices.dim() != 1 or indices.dtype != torch.int64 or indices.shape[0] == 0:
        came = f"{checks.shape(indices)} {getattr(indices, 'dtype', '')}".strip()
        checks.fail("crop_resize", "indices must be [B] int64", came)
    _check_table("crop_resize", parameters, len(indices))
    checks.one_device("crop_resize", (images, indices, parameters))
    return torch.ops.fastjem.crop_resize(images, indices, parameters, _height_and_width(size), bicubic)


def _height_and_width(size: object) -> list[int]:
    """Of `crop_resize`: both sides."""
    if not isinstance(size, Sequence) or isinstance(size, str):
        return [checks.integer("crop_resize", "size", size, 1)] * 2
    if len(size) != 2:
        checks.fail("crop_resize", "size must be a number of pixels, or height and width", size)
    return [checks.integer("crop_resize", "size", side, 1) for side in size]


def _check_images(op: str, contract: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape:
        checks.fail(op, contract, checks.shape(images))
    if images.dtype != torch.uint8:
        checks.fail(op, contract, images.dtype)


def _check_table(op: str, parameters: Tensor, rows: int) -> None:
    is_table = isinstance(parameters, Tensor) and parameters.shape == (rows, COLUMNS)
    if not is_table or parameters.dtype not in (torch.float32, torch.float64):
        # The message is made here and not before, as a symbolic number of rows that is printed is symbolic no more.
        came = parameters.dtype if is_table else checks.shape(parameters)
        checks.fail(op, f"parameters must be [{rows}, {COLUMNS}] float32, a row per image", came)
