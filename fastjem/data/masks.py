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
from fastjem.ops import direct

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

    On MPS, which has no float64, their first 23 bits in float32 (`fastjem.kernels.masks.philox`).

    Args:
        samples: [B] int64, the images' numbers in their source; the numbers are drawn on their device.
        view: the view's number, or the first one's of `views`, whose images follow one another: V B in all.
    """

    def __init__(self, samples: Tensor, seed: int, epoch: int, view: int, views: int = 1):
        self.samples = samples
        self.seed = seed
        self.epoch = epoch
        self.view = view
        self.views = views
        self.next_block = FIRST_MASK_BLOCK

    def __call__(self, count: int) -> Tensor:
        first = self.next_block
        self.next_block += math.ceil(count / 4)
        return drawn_by_sample(self.samples, self.epoch, self.view, count, self.seed, first, self.views)


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
    scores = _drawn("random_mask", uniform, batch, grid, grid[0] * grid[1])
    return _hide_highest(scores, hidden_patches(grid, share), grid)


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
    drawn = _drawn("even_block_mask", uniform, batch, grid, 4 * RECTANGLES + height * width)
    # Patches are hidden in the order of the first rectangle over them, those under none last, and those with the same
    # rectangle by lot.
    scores = direct.call("even_block_scores", drawn, height, width)
    return _hide_highest(scores, hidden_patches(grid, share), grid)


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
    drawn = _drawn("inverse_block_mask", uniform, batch, grid, centres + patches)
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
    drawn = _drawn("inverse_rectangle_mask", uniform or Generated(batch, generator, device), batch, grid, 3)
    low = max(math.log(aspect), math.log(max(seen, 1) / width**2))
    high = max(min(-math.log(aspect), math.log(height**2 / max(seen, 1))), low)
    return direct.call("inverse_rectangle_masks", drawn, height, width, seen, low, high)


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

    An image tries `STEPS` candidates at most, one after the other.
    """
    for name, share in (("images", images), ("low", low), ("high", high)):
        _check_share(f"block_mask: {name}", share)
    if high < low or not 0 < aspect <= 1:
        raise ValueError(f"block_mask: needs low <= high and 0 < aspect <= 1, got {low}, {high} and {aspect}")
    height, width = grid
    drawn = _drawn("block_mask", uniform or Generated(batch, generator, device), batch, grid, 2 + 4 * STEPS)
    wanted = None
    if uniform is None:
        place = drawn[:, 0].argsort().argsort()  # [B]: a random permutation; the first ones have masks
        count = int(batch * images)
        share = low + (place + drawn[:, 1]) * ((high - low) / max(count, 1))
        wanted = (share * (height * width)).floor().where(place < count, 0)
    most = height * width if most is None else most
    options = (images, low, high, least, most, aspect, math.ceil(attempts))
    return direct.call("block_masks", drawn, wanted, height, width, *options)


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
    count = 2 * targets + (targets + 1) * PLACES * 2
    if targets < 1 or min(grid) < 2:
        raise ValueError(
            f"multi_block_mask: needs a target and a grid of 2 x 2 or more, got {targets} and {tuple(grid)}"
        )
    drawn = _drawn("multi_block_mask", uniform or Generated(batch, generator, device), batch, grid, count)
    target = _block_size(grid, target_scale, target_aspect, of_target)
    of_context = _block_size(grid, context_scale, (1.0, 1.0), of_context)
    arguments = (height, width, list(target), list(of_context), targets, keep)
    context, indices = direct.call("multi_block_masks", drawn, *arguments)
    return MultiBlock(context, indices)


def visible(hidden: Tensor, count: int | None = None) -> Tensor:
    """[B, H, W] bool -> [B, count] int64: the first `count` patches that aren't hidden, ascending.

    count: None takes the batch's smallest number, for which a GPU has to be waited for.
    """
    hidden = hidden.flatten(1)
    if count is None:
        count = int((~hidden).sum(1).min())
    return hidden.int().argsort(dim=1, stable=True)[:, :count]


def _drawn(name: str, uniform: Uniform, batch: int, grid: Grid, count: int) -> Tensor:
    """[B, count] of `uniform`, dense.

    Raises:
        ValueError: where it gives something else, and of a grid without patches.
    """
    if min(grid) < 1:
        raise ValueError(f"{name}: grid must have a patch, got {tuple(grid)}")
    drawn = uniform(count)
    if drawn.shape != (batch, count) or drawn.dtype not in (torch.float32, torch.float64):
        contract = f"{name}: uniform({count}) must give [{batch}, {count}] float32 or float64"
        raise ValueError(f"{contract}, got {tuple(drawn.shape)} {str(drawn.dtype).removeprefix('torch.')}")
    return drawn.contiguous()


def _hide_highest(scores: Tensor, count: int, grid: Grid) -> Tensor:
    """[B, H, W] bool: true at the `count` highest of the scores [B, H W]."""
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    return hidden.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True).view(len(scores), *grid)


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: share must be between 0 and 1, got {share}")


def _block_size(grid: Grid, scale: tuple[float, float], aspect: tuple[float, float], uniform: float) -> Grid:
    """Height and width of I-JEPA's blocks, of a patch at least; both leave a row and a column of the grid free."""
    area = int(grid[0] * grid[1] * (scale[0] + uniform * (scale[1] - scale[0])))
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    height = round(math.sqrt(area * ratio))
    width = round(math.sqrt(area / ratio))
    return max(1, min(height, grid[0] - 1)), max(1, min(width, grid[1] - 1))


def hidden_indices(hidden: Tensor, count: int) -> Tensor:
    """[B, H, W] bool -> [B, count] int64: the first `count` patches that are hidden, ascending.

    Where a sampler of `SAMPLERS` drew the mask, `hidden_patches` says how many there are, the same in every image.
    """
    return visible(~hidden, count)
