"""Masks as augmentation: which patches a transformer doesn't see, drawn for a whole batch on its device.

Every function draws on a device and waits for nothing, so that masks cost no host sync. Masks are bool [B, H, W] over
the grid of patches, true where a patch is hidden. A run's masks are drawn (`fastjem.data.masking`) from `Keyed`
numbers: each image's follow (seed, epoch, sample, view) and nothing else. Without these the samplers take torch's
generator. lightly's forms, drawn on the host, are in `fastjem.nn`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastjem.data.philox import FIRST_MASK_BLOCK, drawn_by_sample
from fastjem.kernels.arithmetic import widest_dtype

Device = torch.device | str | None
Grid = tuple[int, int]
STEPS = 48  # candidates of a block mask: the slowest of 40,000 images, 14 x 14 to 37 x 37 patches, needed 37
RECTANGLES = 32  # of an even block mask
TARGET_SCALE = (0.15, 0.2)  # the share of an image's patches that a target of I-JEPA's has
PLACES = 20  # that I-JEPA's context tries before one target more is allowed in it


class Uniform(Protocol):
    """Who draws for B images: [B, count], uniform in (0, 1), other numbers at each call."""

    def __call__(self, count: int) -> Tensor: ...


class Generated:
    """Float32 numbers of torch's generator: they depend on the batch."""

    def __init__(self, batch: int, generator: torch.Generator | None = None, device: Device = None):
        self.batch = batch
        self.generator = generator
        self.device = generator.device if generator and device is None else device

    def __call__(self, count: int) -> Tensor:
        return torch.rand(self.batch, count, generator=self.generator, device=self.device)


class Keyed:
    """Float64 numbers keyed (seed, epoch, sample, view): the same for an image in whatever batch it comes.

    On MPS, which has no float64, their first 23 bits in float32 (`philox_on_device`).

    Args:
        samples: [B] int64, the images' numbers in their source; the numbers are drawn on their device.
        view: the view's number.
    """

    def __init__(self, samples: Tensor, seed: int, epoch: int, view: int):
        self.samples = samples
        self.seed = seed
        self.epoch = epoch
        self.view = view
        self.next_block = FIRST_MASK_BLOCK

    def __call__(self, count: int) -> Tensor:
        device = self.samples.device
        epoch = torch.full((), self.epoch, device=device)
        view = torch.full((), self.view, device=device)
        first = self.next_block
        self.next_block += math.ceil(count / 4)
        return drawn_by_sample(self.samples, epoch, view, count, self.seed, first)


@dataclass(frozen=True)
class MultiBlock:
    """I-JEPA's masks of a batch."""

    context: Tensor  # [B, H, W] bool, true where the context encoder doesn't look
    targets: Tensor  # [B, T, h * w] int64: the patches of each target block, ascending


def hidden_patches(grid: Grid, share: float) -> int:
    """How many of H W patches the samplers in `SAMPLERS` hide in every image: H W - int(H W (1 - share))."""
    patches = grid[0] * grid[1]
    return patches - int(patches * (1 - share))


def random_mask(
    batch: int,
    grid: Grid,
    share: float = 0.75,
    *,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: `hidden_patches` anywhere (MAE, arXiv 2111.06377: `random_masking` of models_mae.py)."""
    _check_share("random_mask", share)
    uniform = uniform or Generated(batch, generator, device)
    return _hide_highest(uniform(grid[0] * grid[1]), hidden_patches(grid, share), grid)


def even_block_mask(
    batch: int,
    grid: Grid,
    share: float = 0.75,
    *,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: rectangles of an aspect in 0.3 .. 1 / 0.3, one on another until `hidden_patches` are covered (BEiT,
    arXiv 2106.08254, algorithm 1), the same number in every image.

    A rectangle covers 8 % (BEiT's 16 patches of 196) to 40 % of the patches.
    """
    _check_share("even_block_mask", share)
    height, width = grid
    uniform = uniform or Generated(batch, generator, device)
    drawn = uniform(4 * RECTANGLES + height * width)
    area, aspect, top, left = drawn[:, : 4 * RECTANGLES].view(batch, 4, RECTANGLES).unbind(1)  # [B, 32]
    lot = drawn[:, 4 * RECTANGLES :]  # [B, H W]
    area = height * width * (0.08 + 0.32 * area)
    aspect = (1 / 0.3) ** (2 * aspect - 1)
    tall = (area * aspect).sqrt().round().clamp(1, height)
    broad = (area / aspect).sqrt().round().clamp(1, width)
    rows = _covered((top * height).floor(), tall, height)  # [B, H]
    columns = _covered((left * width).floor(), broad, width)  # [B, W]
    covered = (rows[:, :, None] & columns[:, None, :]).flatten(1)  # [B, H W]
    # Patches are hidden in the order of the first rectangle over them (the lowest bit), those under none last, and
    # those with the same rectangle by lot: a turn from 2 ** rectangle to twice that.
    first = torch.where(covered == 0, 2**RECTANGLES, covered & -covered)
    return _hide_highest(-first * (1 + lot), hidden_patches(grid, share), grid)


def inverse_block_mask(
    batch: int,
    grid: Grid,
    share: float = 0.8,
    *,
    block: int = 3,
    adjust: float = 0.07,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: what is seen are squares, and int(H W (1 - share)) patches in every image (data2vec 2.0,
    arXiv 2212.07525, section 3.3; defaults of its base_images_only_task.yaml).

    Centres are drawn anywhere, so many that squares without overlap would cover 1 - share + adjust; single patches are
    then added or taken away at random to make the number right.
    """
    _check_share("inverse_block_mask", share)
    if block % 2 == 0:
        raise ValueError(f"inverse_block_mask: block must be odd, got {block}")
    patches = grid[0] * grid[1]
    centres = int(patches * ((1 - share + adjust) / block**2))
    uniform = uniform or Generated(batch, generator, device)
    drawn = uniform(centres + patches)
    at = (drawn[:, :centres] * patches).long().clamp(max=patches - 1)
    seen = torch.zeros(batch, patches, device=at.device).scatter_(1, at, 1.0).view(batch, 1, *grid)
    seen = torch.nn.functional.max_pool2d(seen, block, stride=1, padding=block // 2).flatten(1)
    scores = seen + drawn[:, centres:]  # seen ones first, in random order
    return ~_hide_highest(scores, patches - hidden_patches(grid, share), grid)


def inverse_rectangle_mask(
    batch: int,
    grid: Grid,
    share: float = 0.65,
    *,
    aspect: float = 0.5,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: what is seen is one rectangle that goes on around the edges, so that every patch is hidden as often
    (CAPI, arXiv 2502.08769, section 3.2: inverse block masking with roll), in every image `hidden_patches` are.

    aspect: the rectangle's height over width is log-uniform between this and its inverse, as far as the grid allows.
    Where it is rounded up to too many patches the last ones of its last row are hidden.
    """
    _check_share("inverse_rectangle_mask", share)
    height, width = grid
    seen = height * width - hidden_patches(grid, share)
    drawn = (uniform or Generated(batch, generator, device))(3)
    low = max(math.log(aspect), math.log(max(seen, 1) / width**2))
    high = max(min(-math.log(aspect), math.log(height**2 / max(seen, 1))), low)
    ratio = (low + (high - low) * drawn[:, :1]).exp()  # [B, 1]
    # A ratio at the grid's limit is rounded to it: 1e-4 below, so that a product that should be whole isn't above it.
    tall = ((seen * ratio).sqrt() - 1e-4).ceil().clamp(1, height)
    broad = (seen / tall - 1e-4).ceil().clamp(1, width)
    rows = torch.arange(height, device=drawn.device)
    columns = torch.arange(width, device=drawn.device)
    below = (rows - (drawn[:, 1:2] * height).floor()) % height  # [B, H], from the rectangle's top on
    beside = (columns - (drawn[:, 2:3] * width).floor()) % width  # [B, W]
    place = below[:, :, None] * broad[:, :, None] + beside[:, None, :]  # within the rectangle, row by row
    return ~((beside < broad)[:, None, :] & (place < seen))


# With the same number of patches in every image, as a batch of what is hidden, or of what is seen, needs.
SAMPLERS = {
    "even_block": even_block_mask,
    "random": random_mask,
    "inverse_block": inverse_block_mask,
    "inverse_rectangle": inverse_rectangle_mask,
}


def block_mask(
    batch: int,
    grid: Grid,
    *,
    images: float = 0.5,
    low: float = 0.1,
    high: float = 0.5,
    least: int = 4,
    most: int | None = None,
    aspect: float = 0.3,
    attempts: int = 10,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: rectangles in a share of the images, as BEiT (arXiv 2106.08254, algorithm 1) draws them for iBOT and
    DINOv2; defaults are DINOv2's.

    Args:
        images: the share of images with a mask. Of a batch that is int(images B) of them, at random; an image whose
            numbers are given (`uniform`) has one with that probability, whatever the batch.
        low, high: the share of patches aimed at. Of a batch, image i of n has one drawn between the i-th and the next
            of n + 1 even steps from low to high; with `uniform` each image's is drawn from all of low to high.
        least, most: patches of one rectangle (None: as many as are still wanted); 4 in DINOv2, 16 for iBOT's 14 x 14.
        aspect: height over width is log-uniform between this and its inverse.
        attempts: candidates in a row that may not fit before an image is left as it is.

    All images try one candidate at a time side by side, `STEPS` times: on the CPU until the last is ready, elsewhere
    always, as finding out would be a sync.
    """
    for name, share in (("images", images), ("low", low), ("high", high)):
        _check_share(f"block_mask: {name}", share)
    if high < low or not 0 < aspect <= 1:
        raise ValueError(f"block_mask: needs low <= high and 0 < aspect <= 1, got {low}, {high} and {aspect}")
    height, width = grid
    drawn = (uniform or Generated(batch, generator, device))(2 + 4 * STEPS)
    if uniform is None:
        place = drawn[:, 0].argsort().argsort()  # [B]: a random permutation; the first ones have masks
        count = int(batch * images)
        has_mask = place < count
        share = low + (place + drawn[:, 1]) * ((high - low) / max(count, 1))
    else:
        has_mask = drawn[:, 0] < images
        share = low + drawn[:, 1] * (high - low)
    wanted = (share * (height * width)).floor().where(has_mask, 0)
    rows = torch.arange(height, device=drawn.device)[:, None]
    columns = torch.arange(width, device=drawn.device)
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=drawn.device)
    masked = torch.zeros_like(wanted)
    failed = torch.zeros_like(wanted)
    areas, ratios, tops, lefts = drawn[:, 2:].view(batch, STEPS, 4).permute(2, 1, 0)  # [STEPS, B] each
    ratios = ((2 * ratios - 1) * math.log(1 / aspect)).exp()
    for area, ratio, top, left in zip(areas, ratios, tops, lefts, strict=True):
        active = (masked < wanted) & (failed < attempts)
        if drawn.device.type == "cpu" and not active.any():
            break
        room = (wanted - masked).clamp(max=height * width if most is None else most)
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


def multi_block_mask(
    batch: int,
    grid: Grid,
    *,
    targets: int = 4,
    target_scale: tuple[float, float] = TARGET_SCALE,
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    keep: int = 10,
    sizes: tuple[float, float] | None = None,
    uniform: Uniform | None = None,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> MultiBlock:
    """I-JEPA's context and targets (arXiv 2301.08243, section 3; `MaskCollator` of masks/multiblock.py).

    One size of target and one of context for the whole batch, from one uniform number each, which sets area and aspect
    ratio alike; places are each image's own. The context loses what the targets hold; where `keep` patches or less are
    left in 20 tries, the last of the targets is allowed in, and so on. As in the reference, no block touches the grid's
    last row and column.

    Contexts have unequal numbers of patches. `visible` cuts them to the batch's smallest as the reference does, and has
    to wait for the device to know it; on masks drawn on the CPU that costs nothing.

    Args:
        sizes: the two uniform numbers, of target and context: in a run two of
            `fastjem.data.masking.of_step`, as their batch shares them. None: from torch's generator of the host.
    """
    height, width = grid
    of_target, of_context = torch.rand(2).tolist() if sizes is None else sizes
    drawn = (uniform or Generated(batch, generator, device))(2 * targets + (targets + 1) * PLACES * 2)
    size = _block_size(grid, target_scale, target_aspect, of_target)
    corner = _corners(drawn[:, : 2 * targets].view(batch, targets, 2), grid, size)
    at = corner[..., 0] * width + corner[..., 1]
    # Made on the device, as the host would wait for a copy: the patches of a block at the corner.
    down, along = (torch.arange(side, device=at.device) for side in size)
    inside = down[:, None] * width + along
    indices = at[..., None] + inside.flatten()  # [B, T, h w]
    taken = torch.zeros(batch, targets, height * width, dtype=torch.bool, device=at.device).scatter_(2, indices, True)
    size = _block_size(grid, context_scale, (1.0, 1.0), of_context)
    corners = _corners(drawn[:, 2 * targets :].view(batch, targets + 1, PLACES, 2), grid, size)
    rows = torch.arange(height, device=at.device)[:, None]
    columns = torch.arange(width, device=at.device)
    context = torch.zeros(batch, height * width, dtype=torch.bool, device=at.device)
    found = torch.zeros(batch, dtype=torch.bool, device=at.device)
    for allowed in range(targets + 1):  # targets that may lie in the context, the last ones first
        top, left = corners[:, allowed, :, :, None, None].unbind(2)  # [B, 20, 1, 1]
        block = (rows >= top) & (rows < top + size[0]) & (columns >= left) & (columns < left + size[1])
        block = block.flatten(2) & ~taken[:, : targets - allowed].any(1, keepdim=True)  # [B, 20, H W]
        enough = block.sum(2) > keep
        first = enough.int().argmax(1)  # the first that is right, or the first
        block = block[torch.arange(batch, device=at.device), first]
        context = context.where(found[:, None], block)
        found = found | enough.any(1)
    return MultiBlock(~context.view(batch, height, width), indices)


def visible(hidden: Tensor, count: int | None = None) -> Tensor:
    """[B, H, W] bool -> [B, count] int64: the first `count` patches that aren't hidden, ascending.

    count: None takes the batch's smallest number, for which a GPU has to be waited for.
    """
    hidden = hidden.flatten(1)
    if count is None:
        count = int((~hidden).sum(1).min())
    return hidden.int().argsort(dim=1, stable=True)[:, :count]


def _hide_highest(scores: Tensor, count: int, grid: Grid) -> Tensor:
    """[B, H, W] bool: true at the `count` highest of the scores [B, H W]."""
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    return hidden.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True).view(-1, *grid)


def _covered(start: Tensor, length: Tensor, size: int) -> Tensor:
    """[B, R], [B, R] -> [B, size] int64: which of R intervals cover each place, the i-th as bit i.

    Intervals go on around the edge: if they ended there, as BEiT's do, the middle of nearly every image were hidden.
    With a bit for each the table of all R x H x W, 40 times the time on a CPU, need not exist.
    """
    place = torch.arange(size, device=start.device)
    inside = (place - place[:, None, None]) % size <= place[:, None]  # [start, length - 1, place]
    interval = torch.arange(start.shape[1], device=start.device)
    if widest_dtype(start.device) == torch.float32:  # too few digits for a sum of 32 bits
        return (inside.long()[start.long(), length.long() - 1] << interval[:, None]).sum(1)
    # A product of float64 is exact as well, and takes two thirds of the integers' time (256 images of 14 x 14, CPU).
    intervals = inside.double()[start.long(), length.long() - 1]  # [B, R, size]
    return (2.0 ** interval.double() @ intervals).long()


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: share must be between 0 and 1, got {share}")


def _block_size(grid: Grid, scale: tuple[float, float], aspect: tuple[float, float], uniform: float) -> Grid:
    """Height and width of I-JEPA's blocks; both leave a row and a column of the grid free."""
    area = int(grid[0] * grid[1] * (scale[0] + uniform * (scale[1] - scale[0])))
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    height = round(math.sqrt(area * ratio))
    width = round(math.sqrt(area / ratio))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def _corners(uniform: Tensor, grid: Grid, size: Grid) -> Tensor:
    """[..., 2] uniform -> [..., 2] int64: top and left, below grid - size each, as the reference's randint has them."""
    rooms = (grid[0] - size[0], grid[1] - size[1])
    places = [(x * room).floor().clamp(max=room - 1) for x, room in zip(uniform.unbind(-1), rooms, strict=True)]
    return torch.stack(places, -1).long()


def hidden_indices(hidden: Tensor, count: int) -> Tensor:
    """[B, H, W] bool -> [B, count] int64: the first `count` patches that are hidden, ascending.

    Where a sampler of `SAMPLERS` drew the mask, `hidden_patches` says how many there are, the same in every image.
    """
    return visible(~hidden, count)
