"""Which patches a transformer doesn't see.

Names, arguments and defaults are lightly's; the same seeds give the same masks.
"""

import math
import random
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastjem.functional import checks

Device = torch.device | str | None


def random_token_mask(
    size: tuple[int, int], mask_ratio: float = 0.6, mask_class_token: bool = False, device: Device = None
) -> tuple[Tensor, Tensor]:
    """Indices of the tokens kept and of those masked, [B, kept] and [B, L - kept], in random order.

    `kept = int((L - 1) (1 - mask_ratio)) + 1`, the class token (index 0) always first among them; with
    `mask_class_token` it is a token like the others, and `kept = int(L (1 - mask_ratio))`.
    """
    batch, length = size
    spared = int(not mask_class_token)
    kept = int((length - spared) * (1 - mask_ratio)) + (spared if length else 0)
    noise = torch.rand(batch, length, device=device)
    if spared:
        noise[:, :1] = -1
    order = noise.argsort(1)
    return order[:, :kept], order[:, kept:]


def _square(op: str, length: int, prefix: int) -> int:
    patches = length - prefix
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        checks.fail(op, f"sequence_length must be num_prefix_tokens = {prefix} and a square of patches", length)
    return side


def _with_prefix(prefix: int, kept: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
    return torch.cat([first, kept + prefix], 1), masked + prefix


def random_grid_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.75,
    grid_size: int = 4,
    num_prefix_tokens: int = 1,
    device: Device = None,
) -> tuple[Tensor, Tensor]:
    """As `random_token_mask`, but cells of `grid_size` x `grid_size` patches are kept or masked as a whole."""
    batch, length = size
    side = _square("random_grid_token_mask", length, num_prefix_tokens)
    if side % grid_size:
        checks.fail("random_grid_token_mask", f"the patches' side {side} must be a multiple of grid_size", grid_size)
    cells = side // grid_size
    patches = torch.arange(side * side, device=device).reshape(cells, grid_size, cells, grid_size)
    patches = patches.transpose(1, 2).reshape(cells * cells, grid_size**2)  # of each cell
    order = torch.rand(batch, cells * cells, device=device).argsort(1)
    kept = int(cells * cells * (1 - mask_ratio))
    parts = (patches[some].reshape(batch, -1) for some in (order[:, :kept], order[:, kept:]))
    return _with_prefix(num_prefix_tokens, *parts)


def random_prefix_mask(size: tuple[int, int], max_prefix_length: int, device: Device = None) -> Tensor:
    """[B, L]: true from a random position below `max_prefix_length` on."""
    start = torch.randint(0, max_prefix_length, (size[0], 1), device=device)
    return torch.arange(size[1], device=device) >= start


def random_inverse_block_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.65,
    num_prefix_tokens: int = 1,
    min_aspect: float = 0.5,
    max_aspect: float | None = None,
    roll: bool = True,
    device: Device = None,
) -> tuple[Tensor, Tensor]:
    """Indices kept and masked, [B, kept] and [B, L - kept]: one rectangle of random aspect ratio is kept.

    With `roll` it is rolled around the edges (CAPI, arXiv 2502.08769).
    """
    batch, length = size
    side = _square("random_inverse_block_mask", length, num_prefix_tokens)
    patches = side * side
    seen = patches - int(patches * mask_ratio)
    low = math.log(min_aspect)
    high = math.log(max_aspect or 1 / min_aspect)
    visible = torch.zeros(batch, side, side, dtype=torch.bool)
    for grid in visible:
        if seen == patches:
            grid.fill_(True)
        if seen in (0, patches):
            continue
        bounds = max(low, math.log(seen / patches)), min(high, math.log(patches / (seen + 1e-5)))
        aspect = math.exp(torch.empty(1).uniform_(*bounds).item())
        height, width = (min(side, math.ceil(math.sqrt(area))) for area in (seen * aspect, seen / aspect))
        top, left = (int(torch.randint(0, side - extent + 1, (1,))) for extent in (height, width))
        block = torch.zeros_like(grid)
        block[top : top + height, left : left + width] = True
        grid.view(-1)[block.flatten().nonzero().flatten()[:seen]] = True  # rounded up, the rectangle may be too large
        if roll:
            shifts = tuple(int(torch.randint(0, side, (1,))) for _ in range(2))
            grid.copy_(grid.roll(shifts, (0, 1)))
    order = (~visible).flatten(1).int().argsort(dim=1, stable=True)  # visible ones first
    kept, masked = _with_prefix(num_prefix_tokens, order[:, :seen], order[:, seen:])
    return kept.to(device), masked.to(device)


def random_block_mask(
    size: tuple[int, int, int],
    batch_mask_ratio: float = 0.5,
    min_image_mask_ratio: float = 0.1,
    max_image_mask_ratio: float = 0.5,
    min_num_masks_per_block: int = 4,
    max_num_masks_per_block: int | None = None,
    min_block_aspect_ratio: float = 0.3,
    max_block_aspect_ratio: float | None = None,
    max_attempts_per_block: int = 10,
    device: Device = None,
) -> Tensor:
    """[B, H, W], true where masked: rectangles in a part of the images, in each another share (iBOT, DINOv2).

    Drawn with Python's `random` on the host and moved to the device once.

    Args:
        size: (B, H, W).
        batch_mask_ratio: the share of images with masks.
        min_image_mask_ratio, max_image_mask_ratio: the share of patches masked in one of them, evenly between.
        min_num_masks_per_block, max_num_masks_per_block: patches of a rectangle.
        min_block_aspect_ratio, max_block_aspect_ratio: its height over its width.
        max_attempts_per_block: how often to look for room for a rectangle.
        device: of the result.

    Raises:
        ValueError: if a maximum is below its minimum.
    """
    if max_image_mask_ratio < min_image_mask_ratio:
        came = f"{max_image_mask_ratio} and {min_image_mask_ratio}"
        checks.fail("random_block_mask", "max_image_mask_ratio must be at least min_image_mask_ratio", came)
    batch, height, width = size
    count = int(batch * batch_mask_ratio)
    shares = torch.linspace(min_image_mask_ratio, max_image_mask_ratio, count + 1).tolist()
    masks = [
        _blocks(
            (height, width),
            int(height * width * random.uniform(low, high)),
            min_num_masks_per_block,
            max_num_masks_per_block,
            min_block_aspect_ratio,
            max_block_aspect_ratio,
            max_attempts_per_block,
        )
        for low, high in pairwise(shares)
    ]
    masks += [np.zeros((height, width), dtype=bool)] * (batch - count)
    random.shuffle(masks)
    return torch.from_numpy(np.stack(masks)).to(device)


def random_block_mask_image(
    size: tuple[int, int],
    num_masks: int,
    min_num_masks_per_block: int = 4,
    max_num_masks_per_block: int | None = None,
    min_block_aspect_ratio: float = 0.3,
    max_block_aspect_ratio: float | None = None,
    max_attempts_per_block: int = 10,
    device: Device = None,
) -> Tensor:
    """[H, W], true where masked: rectangles until `num_masks` patches are, see `random_block_mask`."""
    mask = _blocks(
        size,
        num_masks,
        min_num_masks_per_block,
        max_num_masks_per_block,
        min_block_aspect_ratio,
        max_block_aspect_ratio,
        max_attempts_per_block,
    )
    return torch.from_numpy(mask).to(device)


def _blocks(
    size: tuple[int, int],
    wanted: int,
    least: int,
    most: int | None,
    min_aspect: float,
    max_aspect: float | None,
    attempts: int,
) -> np.ndarray:
    most = wanted if most is None else most
    max_aspect = 1 / min_aspect if max_aspect is None else max_aspect
    for name, high, low in (("num_masks_per_block", most, least), ("block_aspect_ratio", max_aspect, min_aspect)):
        if high < low:
            checks.fail("random_block_mask", f"max_{name} must be at least min_{name}", f"{high} and {low}")
    mask = np.zeros(size, dtype=bool)
    masked = 0
    while masked < wanted:
        room = min(wanted - masked, most)
        for _ in range(attempts):
            area = random.uniform(least, room)
            aspect = math.exp(random.uniform(math.log(min_aspect), math.log(max_aspect)))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= size[0] or width >= size[1]:
                continue
            top = random.randint(0, size[0] - height)
            left = random.randint(0, size[1] - width)
            block = mask[top : top + height, left : left + width]
            new = block.size - int(block.sum())
            if 0 < new <= room:
                block[:] = True
                masked += new
                break
        else:
            break
    return mask
