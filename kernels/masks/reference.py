"""The specification; conventions are in kernels/__init__.py.

Numbers that were drawn are uniform in (0, 1), of float64 or float32, and are computed with in the device's widest
dtype: a rectangle whose side is rounded another way is another mask. `fastjem.data.masks` says what the masks are for.
"""

import math

import torch
from torch import Tensor

from ..arithmetic import widest
from .philox import philox_on_device


def keyed_uniform(
    samples: Tensor,  # [B] int64
    step: Tensor | None,  # 0-dim int64, in the epoch's place
    epoch: int,
    view: int,
    views: int,
    first: int,
    count: int,
    seed: int,  # 64 bits, as a signed number
) -> Tensor:
    """[views B, count] float64, uniform in (0, 1): Philox's of the words (sample, epoch, view, block), view by view.

    Of the views from `view` on, and of the blocks from `first` on, four numbers each. On MPS float32.
    """
    device = samples.device
    epoch_word = torch.full((), epoch, device=device) if step is None else step
    view_words = torch.arange(view, view + views, device=device)[:, None, None]
    block = torch.arange(first, first + math.ceil(count / 4), device=device)
    drawn = philox_on_device([samples[:, None], epoch_word, view_words, block], seed)  # [4, V, B, blocks]
    return drawn.permute(1, 2, 3, 0).flatten(2)[..., :count].reshape(views * samples.shape[0], count)


def block_masks(
    drawn: Tensor,  # [N, 2 + 4 tries]: has it a mask, its share; then area, aspect, top and left of each try
    wanted: Tensor | None,  # [N]: how many patches each image wants; None: from its first two numbers
    height: int,
    width: int,
    images: float,
    low: float,
    high: float,
    least: int,
    most: int,
    aspect: float,
    attempts: int,
) -> Tensor:
    """[N, H, W] bool: rectangles of `least` to `most` new patches, one try after the other, until no more are wanted or
    `attempts` in a row didn't fit.
    """
    drawn = widest(drawn)
    if wanted is None:
        share = low + drawn[:, 1] * (high - low)
        wanted = (share * (height * width)).floor().where(drawn[:, 0] < images, 0)
    else:
        wanted = wanted.to(drawn.dtype)
    rows = torch.arange(height, device=drawn.device)[:, None]
    columns = torch.arange(width, device=drawn.device)
    mask = torch.zeros(len(drawn), height, width, dtype=torch.bool, device=drawn.device)
    masked = torch.zeros_like(wanted)
    failed = torch.zeros_like(wanted)
    areas, ratios, tops, lefts = (
        drawn[:, 2:].view(len(drawn), (drawn.shape[1] - 2) // 4, 4).permute(2, 1, 0)
    )  # [tries, N] each
    ratios = ((2 * ratios - 1) * math.log(1 / aspect)).exp()
    for area, ratio, top, left in zip(areas, ratios, tops, lefts, strict=True):
        active = (masked < wanted) & (failed < attempts)
        room = (wanted - masked).clamp(max=most)
        area = least + area * (room - least)
        h = (area * ratio).clamp(min=0).sqrt().round()
        w = (area / ratio).clamp(min=0).sqrt().round()
        top = (top * (height - h + 1)).floor()[:, None, None]
        left = (left * (width - w + 1)).floor()[:, None, None]
        block = (rows >= top) & (rows < top + h[:, None, None]) & (columns >= left)
        block &= columns < left + w[:, None, None]
        new = (block & ~mask).sum((1, 2))
        taken = active & (h < height) & (w < width) & (new > 0) & (new <= room)
        mask |= block & taken[:, None, None]
        masked = masked + new * taken
        failed = (failed + 1).where(~taken, 0)
    return mask


def even_block_scores(
    drawn: Tensor,  # [N, 4 R + H W]: areas, aspects, tops and lefts of R rectangles, a lot for each patch
    height: int,
    width: int,
) -> Tensor:
    """[N, H W], negative: the sooner a rectangle comes over a patch, the higher its score.

    Of the i-th rectangle it is -2 ** i (1 + lot), and of none -2 ** R (1 + lot).
    """
    drawn = widest(drawn)
    rectangles = (drawn.shape[1] - height * width) // 4
    area, aspect, top, left = drawn[:, : 4 * rectangles].view(len(drawn), 4, rectangles).unbind(1)  # [N, R]
    lot = drawn[:, 4 * rectangles :]  # [N, H W]
    area = height * width * (0.08 + 0.32 * area)
    aspect = (1 / 0.3) ** (2 * aspect - 1)
    tall = (area * aspect).sqrt().round().clamp(1, height)
    broad = (area / aspect).sqrt().round().clamp(1, width)
    rows = _covered((top * height).floor(), tall, height)  # [N, H]
    columns = _covered((left * width).floor(), broad, width)  # [N, W]
    covered = (rows[:, :, None] & columns[:, None, :]).flatten(1)  # [N, H W]
    first = torch.where(covered == 0, 2**rectangles, covered & -covered)  # the lowest bit
    return -first * (1 + lot)


def _covered(start: Tensor, length: Tensor, size: int) -> Tensor:
    """[N, R], [N, R] -> [N, size] int64: which of R intervals cover each place, the i-th as bit i.

    Intervals go on around the edge: if they ended there, as BEiT's do, the middle of nearly every image were hidden.
    """
    place = torch.arange(size, device=start.device)
    bit = torch.arange(start.shape[1], device=start.device)
    inside = (place - start.long()[:, :, None]) % size < length.long()[:, :, None]  # [N, R, size]
    return (inside.long() << bit[:, None]).sum(1)


def inverse_rectangle_masks(
    drawn: Tensor,  # [N, 3]: aspect, top, left
    height: int,
    width: int,
    seen: int,
    low: float,  # logarithms of the rectangle's height over width
    high: float,
) -> Tensor:
    """[N, H, W] bool: all but the first `seen` patches of a rectangle that goes on around the edges."""
    drawn = widest(drawn)
    ratio = (low + (high - low) * drawn[:, :1]).exp()  # [N, 1]
    # A ratio at the grid's limit is rounded to it: 1e-4 below, so that a product that should be whole isn't above it.
    tall = ((seen * ratio).sqrt() - 1e-4).ceil().clamp(1, height)
    broad = (seen / tall - 1e-4).ceil().clamp(1, width)
    rows = torch.arange(height, device=drawn.device)
    columns = torch.arange(width, device=drawn.device)
    below = (rows - (drawn[:, 1:2] * height).floor()) % height  # [N, H], from the rectangle's top on
    beside = (columns - (drawn[:, 2:3] * width).floor()) % width  # [N, W]
    place = below[:, :, None] * broad[:, :, None] + beside[:, None, :]  # within the rectangle, row by row
    return ~((beside < broad)[:, None, :] & (place < seen))


def multi_block_masks(
    drawn: Tensor,  # [N, 2 T + (T + 1) 2 places]: top and left of each target; then of contexts, with 0 to T targets in
    height: int,
    width: int,
    target: list[int],  # height and width of a target
    context: list[int],
    targets: int,  # T
    keep: int,
) -> tuple[Tensor, Tensor]:
    """[N, H, W] bool, true outside of the context, and [N, T, h w] int64, the patches of each target, ascending.

    The context is the first place of which more than `keep` patches are in no target. If none is, the last target is
    allowed in, and so on; if none is even then, the last round's first place.
    """
    drawn = widest(drawn)
    corner = _corners(drawn[:, : 2 * targets].view(len(drawn), targets, 2), (height, width), target)
    at = corner[..., 0] * width + corner[..., 1]
    # Made on the device, as the host would wait for a copy: the patches of a block at the corner.
    down, along = (torch.arange(side, device=at.device) for side in target)
    indices = at[..., None] + (down[:, None] * width + along).flatten()  # [N, T, h w]
    taken = torch.zeros(len(drawn), targets, height * width, dtype=torch.bool, device=at.device)
    taken = taken.scatter_(2, indices, True)
    places = (drawn.shape[1] // 2 - targets) // (targets + 1)
    corners = drawn[:, 2 * targets :].view(len(drawn), targets + 1, places, 2)
    corners = _corners(corners, (height, width), context)  # [N, T + 1, places, 2]
    rows = torch.arange(height, device=at.device)[:, None]
    columns = torch.arange(width, device=at.device)
    found = torch.zeros(len(drawn), height * width, dtype=torch.bool, device=at.device)
    is_found = torch.zeros(len(drawn), dtype=torch.bool, device=at.device)
    for allowed in range(targets + 1):  # targets that may lie in the context, the last ones first
        top, left = corners[:, allowed, :, :, None, None].unbind(2)  # [N, places, 1, 1]
        block = (rows >= top) & (rows < top + context[0]) & (columns >= left) & (columns < left + context[1])
        block = block.flatten(2) & ~taken[:, : targets - allowed].any(1, keepdim=True)  # [N, places, H W]
        enough = block.sum(2) > keep
        first = enough.int().argmax(1)  # the first that is right, or the first
        block = block[torch.arange(len(drawn), device=at.device), first]
        found = found.where(is_found[:, None], block)
        is_found = is_found | enough.any(1)
    return ~found.view(len(drawn), height, width), indices


def _corners(uniform: Tensor, grid: tuple[int, int], size: list[int]) -> Tensor:
    """[..., 2] uniform -> [..., 2] int64: top and left, below grid - size each, as I-JEPA's randint has them."""
    rooms = (grid[0] - size[0], grid[1] - size[1])
    places = [(x * room).floor().clamp(max=room - 1) for x, room in zip(uniform.unbind(-1), rooms, strict=True)]
    return torch.stack(places, -1).long()
