"""Masks as augmentation: which patches a transformer doesn't see, drawn for a whole batch on its device.

Every function draws on the device it is given and waits for nothing, so that masks cost no host sync; a generator of
that device makes them repeatable. Masks are bool [B, H, W] over the grid of patches, true where a patch is hidden.
lightly's forms, drawn on the host, are in `fastjem.nn`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Device = torch.device | str | None
Grid = tuple[int, int]
STEPS = 48  # candidates of a block mask: the slowest of 40,000 images, 14 x 14 to 37 x 37 patches, needed 37


@dataclass(frozen=True)
class MultiBlock:
    """I-JEPA's masks of a batch."""

    context: Tensor  # [B, H, W] bool, true where the context encoder doesn't look
    targets: Tensor  # [B, T, h * w] int64: the patches of each target block, ascending


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: Device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device if generator and device is None else device)


def _hide(scores: Tensor, count: int, grid: Grid) -> Tensor:
    """The `count` highest of the scores [B, H * W]."""
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    return hidden.scatter_(1, scores.topk(count, dim=1, sorted=False).indices, True).view(-1, *grid)


def _share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: share must be between 0 and 1, got {share}")


def hidden_patches(grid: Grid, share: float) -> int:
    """How many of H W patches the samplers in `SAMPLERS` hide in every image: H W - int(H W (1 - share))."""
    patches = grid[0] * grid[1]
    return patches - int(patches * (1 - share))


def random_mask(
    batch: int, grid: Grid, share: float = 0.75, *, generator: torch.Generator | None = None, device: Device = None
) -> Tensor:
    """[B, H, W]: `hidden_patches` anywhere (MAE, arXiv 2111.06377: `random_masking` of models_mae.py)."""
    _share("random_mask", share)
    return _hide(_uniform((batch, grid[0] * grid[1]), generator, device), hidden_patches(grid, share), grid)


def even_block_mask(
    batch: int, grid: Grid, share: float = 0.75, *, generator: torch.Generator | None = None, device: Device = None
) -> Tensor:
    """[B, H, W]: rectangles of an aspect in 0.3 .. 1 / 0.3, one on another until `hidden_patches` are covered (BEiT,
    arXiv 2106.08254, algorithm 1), the same number in every image.

    A rectangle covers 8 % (BEiT's 16 patches of 196) to 40 % of the patches.
    """
    _share("even_block_mask", share)
    (height, width), rectangles = grid, 32
    random = _uniform((4, batch, rectangles, 1), generator, device)
    area, aspect = height * width * (0.08 + 0.32 * random[0]), (1 / 0.3) ** (2 * random[1] - 1)
    tall, broad = (area * aspect).sqrt().round().clamp(1, height), (area / aspect).sqrt().round().clamp(1, width)
    top, left = (random[2] * height).floor(), (random[3] * width).floor()
    at = torch.arange(height * width, device=random.device)
    row, column = at // width, at % width
    # Around the edges: inside them, as BEiT's, they would hide the centre of nearly every image.
    inside = ((row - top) % height < tall) & ((column - left) % width < broad)  # [B, 32, L]
    # The first rectangle over a patch is its turn; patches under none come last, and within a rectangle by lot.
    turn = torch.where(inside.any(1), inside.int().argmax(1), rectangles)
    turn = turn + _uniform(turn.shape, generator, random.device)
    return _hide(-turn, hidden_patches(grid, share), grid)


def inverse_block_mask(
    batch: int,
    grid: Grid,
    share: float = 0.8,
    *,
    block: int = 3,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: what is seen are squares, and int(H W (1 - share)) patches in every image (data2vec 2.0,
    arXiv 2212.07525, section 3.3; defaults of its base_images_only_task.yaml).

    Centres are drawn anywhere, so many that squares without overlap would cover 1 - share + adjust; single patches are
    then added or taken away at random to make the number right.
    """
    _share("inverse_block_mask", share)
    if block % 2 == 0:
        raise ValueError(f"inverse_block_mask: block must be odd, got {block}")
    patches = grid[0] * grid[1]
    centres = int(patches * ((1 - share + adjust) / block**2))
    at = (_uniform((batch, centres), generator, device) * patches).long().clamp(max=patches - 1)
    seen = torch.zeros(batch, patches, device=at.device).scatter_(1, at, 1.0).view(batch, 1, *grid)
    seen = torch.nn.functional.max_pool2d(seen, block, stride=1, padding=block // 2).flatten(1)
    scores = seen + _uniform((batch, patches), generator, seen.device)  # seen ones first, in random order
    return ~_hide(scores, patches - hidden_patches(grid, share), grid)


# With the same number of patches in every image, as a batch of what is hidden, or of what is seen, needs.
SAMPLERS = {"even_block": even_block_mask, "random": random_mask, "inverse_block": inverse_block_mask}


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
    generator: torch.Generator | None = None,
    device: Device = None,
) -> Tensor:
    """[B, H, W]: rectangles in int(images B) of the images, as BEiT (arXiv 2106.08254, algorithm 1) draws them for
    iBOT and DINOv2; defaults are DINOv2's.

    Args:
        low, high: the share of patches aimed at: image i of n has one drawn between the i-th and the next of n + 1 even
            steps from low to high; which images these are is random.
        least, most: patches of one rectangle (None: as many as are still wanted); 4 in DINOv2, 16 for iBOT's 14 x 14.
        aspect: height over width is log-uniform between this and its inverse.
        attempts: candidates in a row that may not fit before an image is left as it is.

    All images try one candidate at a time side by side, `STEPS` times: on the CPU until the last is ready, elsewhere
    always, as finding out would be a sync.
    """
    for name, share in (("images", images), ("low", low), ("high", high)):
        _share(f"block_mask: {name}", share)
    if high < low or not 0 < aspect <= 1:
        raise ValueError(f"block_mask: needs low <= high and 0 < aspect <= 1, got {low}, {high} and {aspect}")
    height, width = grid
    count = int(batch * images)
    u = _uniform((STEPS, 4, batch), generator, device)
    first = _uniform((batch, 2), generator, u.device)
    place = first[:, 0].argsort().argsort()  # [B]: a random permutation; the first `count` have masks
    step = (high - low) / max(count, 1)
    wanted = ((low + (place + first[:, 1]) * step) * (height * width)).floor().where(place < count, 0)
    rows = torch.arange(height, device=u.device)[:, None]
    columns = torch.arange(width, device=u.device)
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=u.device)
    masked, failed = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for area, ratio, top, left in u:
        active = (masked < wanted) & (failed < attempts)
        if u.device.type == "cpu" and not active.any():
            break
        room = (wanted - masked).clamp(max=height * width if most is None else most)
        area = least + area * (room - least)
        ratio = ((2 * ratio - 1) * math.log(1 / aspect)).exp()
        h, w = (area * ratio).clamp(min=0).sqrt().round(), (area / ratio).clamp(min=0).sqrt().round()
        top, left = (top * (height - h + 1)).floor()[:, None, None], (left * (width - w + 1)).floor()[:, None, None]
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
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    keep: int = 10,
    sizes: tuple[float, float] | None = None,
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
        sizes: the two uniform numbers, of target and context; None: from torch's generator of the host.
    """
    height, width = grid
    of_target, of_context = torch.rand(2).tolist() if sizes is None else sizes
    h, w = _block_size(grid, target_scale, target_aspect, of_target)
    inside = torch.arange(h)[:, None] * width + torch.arange(w)  # patches of a block at the corner
    corner = _corners((batch, targets), grid, (h, w), generator, device)
    at = corner[..., 0] * width + corner[..., 1]
    indices = at[..., None] + inside.flatten().to(at.device)  # [B, T, h w]
    taken = torch.zeros(batch, targets, height * width, dtype=torch.bool, device=at.device).scatter_(2, indices, True)
    size = _block_size(grid, context_scale, (1.0, 1.0), of_context)
    rows, columns = torch.arange(height, device=at.device)[:, None], torch.arange(width, device=at.device)
    context = torch.zeros(batch, height * width, dtype=torch.bool, device=at.device)
    found = torch.zeros(batch, dtype=torch.bool, device=at.device)
    for excluded in range(targets, -1, -1):
        top, left = _corners((batch, 20), grid, size, generator, at.device)[..., None, None].unbind(2)
        block = (rows >= top) & (rows < top + size[0]) & (columns >= left) & (columns < left + size[1])
        block = block.flatten(2) & ~taken[:, :excluded].any(1, keepdim=True)  # [B, 20, H W]
        enough = block.sum(2) > keep
        first = enough.int().argmax(1)  # the first that is right, or the first
        block = block[torch.arange(batch, device=at.device), first]
        context = context.where(found[:, None], block)
        found = found | enough.any(1)
    return MultiBlock(~context.view(batch, height, width), indices)


def _block_size(grid: Grid, scale: tuple[float, float], aspect: tuple[float, float], uniform: float) -> Grid:
    area = int(grid[0] * grid[1] * (scale[0] + uniform * (scale[1] - scale[0])))
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def _corners(
    shape: tuple[int, ...], grid: Grid, size: Grid, generator: torch.Generator | None, device: Device
) -> Tensor:
    """[*shape, 2] int64: top and left, below grid - size each, as the reference's randint has them."""
    u = _uniform((*shape, 2), generator, device)
    room = torch.tensor([grid[0] - size[0], grid[1] - size[1]], dtype=u.dtype).to(u.device, non_blocking=True)
    return (u * room).floor().minimum(room - 1).long()


def visible(hidden: Tensor, count: int | None = None) -> Tensor:
    """[B, H, W] bool -> [B, count] int64: the first `count` patches that aren't hidden, ascending.

    count: None takes the batch's smallest number, for which a GPU has to be waited for.
    """
    hidden = hidden.flatten(1)
    if count is None:
        count = int((~hidden).sum(1).min())
    return hidden.int().argsort(dim=1, stable=True)[:, :count]
