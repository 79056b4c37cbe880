"""The masks of a run: of which views, drawn how, and what a method is told of them.

How many patches are hidden follows the run and its step, so that a batch's tensors are even; where they are follows
(seed, epoch, sample, view) and nothing else. So masks are the same for any batch size, on any number of ranks, and
behind any resume. The samplers themselves are in `fastjem.data.masks`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjem.data import masks
from fastjem.data.masks import SAMPLERS, Grid, Keyed
from fastjem.data.philox import NO_VIEW, philox
from fastjem.data.size import Size, as_size, in_patches, written
from fastjem.data.views import MaskSpec, Views, ViewSpec
from fastjem.errors import UserError, nearest

MASKINGS = (*SAMPLERS, "block", "multi_block")
# `--masking` of any method, whose encoder is given the visible patches alone. As these are as many in each image of a
# batch, blocks are those that hide as many.
MASKINGS_OF_RUNS = {"random": "random", "block": "even_block", "inverse_block": "inverse_block"}
MOST_SIDE = 1024  # patches on a side of an image, above any
TARGETS = 4  # blocks of an image that I-JEPA predicts


class Masks(NamedTuple):
    """Which patches of a view [B, C, H, W] whom concern; h x w is the grid of its patches, numbered row by row."""

    hidden: Tensor  # [B, h, w] bool: patches that the mask token replaces, or that the encoder isn't given
    visible: Tensor | None = None  # [B, M] int64: the only patches that the encoder is given
    targets: Tensor | None = None  # [B, T, P] int64: the patches of each target block (I-JEPA)


def mask_specs(views: Views, image_size: Size, patch: int) -> list[MaskSpec]:
    """The masks of the large views in patches of `patch` pixels; none where the method hides nothing.

    Raises:
        UserError: for a masking that isn't there, or one that can't be drawn so.
    """
    if not views.mask:
        return []
    check_masking(views)
    grid = in_patches(image_size, patch)
    check_grid(views, grid, patch)
    masked = range(views.large) if views.masked_views is None else views.masked_views
    return [
        MaskSpec(
            view, grid, views.mask, views.masking, views.drops, views.least_mask, views.masked_images
        )
        for view in masked
    ]  # fmt: skip


def masks_of_run(specs: Sequence[ViewSpec], patch: int, share: float, masking: str) -> list[MaskSpec]:
    """A mask on every view, large and small, each over its own grid of patches: `--mask SHARE --masking NAME`.

    Raises:
        UserError: where a view would keep no patch.
    """
    found = []
    for view, spec in enumerate(specs):
        grid = in_patches(spec.size, patch)
        patches = grid[0] * grid[1]
        hidden = masks.hidden_patches(grid, share)
        if hidden >= patches:
            raise UserError(
                f"--mask {share:g} leaves none of the {patches} patches of a view of {written(spec.size)} pixels"
            )
        found.append(MaskSpec(view, grid, share, MASKINGS_OF_RUNS[masking], drops=True))
    return found


def check_masking(views: Views) -> None:
    if views.masking not in MASKINGS:
        raise nearest("masking", views.masking, MASKINGS)
    if views.drops and views.masking == "block":
        raise UserError("block masks hide another number of patches in each image: they can only be replaced")


def check_grid(views: Views, grid: Grid, patch: int) -> None:
    """UserError where patches are too few, in rows and columns, for masks that hide some and leave others."""
    if hides_some(views, grid):
        return
    larger = (_longer(grid, side) for side in range(min(grid), MOST_SIDE))
    enough = next((more for more in larger if hides_some(views, more)), None)
    if enough is None:
        raise UserError(f"a mask of {views.mask:g} hides no patch, or leaves none")
    size, wanted = (written(as_size(rows * patch, columns * patch)) for rows, columns in (grid, enough))
    raise UserError(
        f"--image-size {size} is {grid[0]} x {grid[1]} patches of {patch} pixels, and {views.masking} masks need "
        f"{enough[0]} x {enough[1]}: --image-size {wanted}, or smaller patches (--patch-size)"
    )


def _longer(grid: Grid, side: int) -> Grid:
    """A grid of about the same aspect, `side` its shorter one; of squares, and of those without a patch, a square."""
    shorter = max(min(grid), 1)
    rows, columns = (max(round(one * side / shorter), side) for one in grid)
    return rows, columns


def hides_some(views: Views, grid: Grid) -> bool:
    """Whether masks of so many rows and columns of patches hide some of them and leave others."""
    patches = grid[0] * grid[1]
    in_blocks = min(grid) > 1  # no block is as high or as wide as the grid
    if views.masking == "multi_block":
        return in_blocks and patches * masks.TARGET_SCALE[0] >= 1  # no block of I-JEPA's is smaller than that
    if views.masking == "block":
        return in_blocks
    return 0 < masks.hidden_patches(grid, views.mask) < patches


def drawn_masks(spec: MaskSpec, seed: int, epoch: int, samples: Tensor, step: int = 0) -> Masks:
    """The masks of one view, of the images [B] int64 with these numbers in their source, keyed.

    Args:
        step: of the run, which sizes that the whole batch shares follow ("multi_block").

    Raises:
        UserError: for a masking that isn't there.
    """
    return drawn_together([spec], seed, epoch, samples, step)[spec.view]


def drawn_together(
    specs: Sequence[MaskSpec], seed: int, epoch: int, samples: Tensor, step: int = 0
) -> dict[int, Masks]:
    """By view, what `drawn_masks` gives of each: at once those of views that follow one another and are alike.

    Masks of a dozen views cost a GPU as many launches as those of one.
    """
    runs: list[list[MaskSpec]] = []
    for spec in specs:
        last = runs[-1][-1] if runs else None
        if last is not None and replace(last, view=last.view + 1) == spec:
            runs[-1].append(spec)
        else:
            runs.append([spec])
    found: dict[int, Masks] = {}
    for run in runs:
        uniform = Keyed(samples, seed, epoch, run[0].view, len(run))
        drawn = _of_views_alike(run[0], len(run) * samples.shape[0], uniform, seed, step)
        parts = [
            [None] * len(run) if x is None else x.unflatten(0, (len(run), samples.shape[0])).unbind(0) for x in drawn
        ]
        found |= {spec.view: Masks(*of_view) for spec, *of_view in zip(run, *parts, strict=True)}
    return found


def _of_views_alike(spec: MaskSpec, images: int, uniform: Keyed, seed: int, step: int) -> Masks:
    """Of so many images of one or several views, view by view."""
    if spec.masking not in MASKINGS:
        raise nearest("masking", spec.masking, MASKINGS)
    if spec.masking == "block":
        return Masks(_blocks(spec, images, uniform))
    if spec.masking == "multi_block":
        return _multi_block(images, spec.grid, uniform, of_step(seed, step))
    hidden = SAMPLERS[spec.masking](images, spec.grid, spec.share, uniform=uniform)
    if not spec.drops:
        return Masks(hidden)
    patches = spec.grid[0] * spec.grid[1]
    return Masks(hidden, masks.visible(hidden, patches - masks.hidden_patches(spec.grid, spec.share)))


def _blocks(spec: MaskSpec, images: int, uniform: masks.Uniform) -> Tensor:
    return masks.block_mask(images, spec.grid, images=spec.images, low=spec.least, high=spec.share, uniform=uniform)


def _multi_block(images: int, grid: Grid, uniform: Keyed, sizes: list[float]) -> Masks:
    """I-JEPA's blocks, of which each image's encoder is given as many patches: so many as no target can hold.

    First those of the context; where it has too few, others that are in no target. (The reference cuts all contexts of
    a batch to the smallest by leaving out their last rows, so that what is seen of an image depends on the others.)
    """
    blocks = masks.multi_block_mask(images, grid, targets=TARGETS, sizes=(sizes[0], sizes[1]), uniform=uniform)
    patches = grid[0] * grid[1]
    in_targets = blocks.targets.shape[1] * blocks.targets.shape[2]  # at most
    count = max(patches - in_targets, patches // 8, 1)
    outside = blocks.context.flatten(1)
    in_target = torch.zeros_like(outside).scatter_(1, blocks.targets.flatten(1), True)
    lot = uniform(patches)  # below 1
    order = lot + outside + 2 * in_target
    visible = order.topk(count, dim=1, largest=False, sorted=False).indices.sort(1).values
    hidden = torch.ones_like(outside).scatter_(1, visible, False)
    return Masks(hidden.view(-1, *grid), visible, blocks.targets)


def of_step(seed: int, step: int) -> list[float]:
    """Four numbers that all images of a step share, on all ranks: sizes of masks, which make a batch's tensors even."""
    zero = np.int64(0)
    return philox([np.int64(step), zero, np.int64(NO_VIEW), zero], seed).tolist()


def most_masked(spec: MaskSpec, images: int) -> int:
    """Rows that hold the masked patches of so many images, but for one batch in thousands (whose last ones are left
    out): what `fastjem.functional.masked_rows` is told where looking at the mask would wait.

    Of "block" that is the mean and four deviations of a sum over images; other maskings hide as many in each image.
    """
    patches = spec.grid[0] * spec.grid[1]
    if spec.masking != "block":
        return images * masks.hidden_patches(spec.grid, spec.share)
    mean = (spec.least + spec.share) / 2
    square = (spec.least**2 + spec.least * spec.share + spec.share**2) / 3  # the mean of squares of a uniform share
    variance = spec.images * square - (spec.images * mean) ** 2
    rows = patches * (images * spec.images * mean + 4 * (images * variance) ** 0.5)
    return min(int(rows) + 1, images * patches)
