"""What the augmentations do to real images: the views and the masks of some of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import fastjem.functional as F
from fastjem.data.levels import Levels
from fastjem.data.loaders.torch import crop
from fastjem.data.masking import drawn_masks
from fastjem.data.parameters import Parameters
from fastjem.data.picture import Bands, Picture, shown
from fastjem.data.source import decode_named, path_named
from fastjem.data.views import MaskSpec, Views, ViewSpec

GREY, INK = (128, 128, 128), (40, 40, 40)  # hidden patches, and the frames of I-JEPA's targets


@dataclass(frozen=True)
class Sample:
    path: str
    image: Image.Image  # whole, without augmentation
    views: list[Image.Image]


def titles(views: Views, mask: bool) -> list[str]:
    """One a view, in their order; mask: whether a masked one stands last."""
    large = [f"large {i + 1}" for i in range(views.large)] if views.large > 1 else ["view"]
    small = [f"small {i + 1}" for i in range(views.small)]
    return [*large, *small, *(["masked"] if mask else [])]


def samples(
    files: Iterable[tuple[int, str]],
    specs: Sequence[ViewSpec],
    *,
    root: str,
    images: int,
    seed: int = 0,
    epoch: int = 0,
    mask: MaskSpec | None = None,
    read: Callable[[int], list[Picture]] | None = None,
    levels: Levels | None = None,
) -> list[Sample]:
    """The views that training with that seed sees in that epoch of the first `images` files that can be read.

    Args:
        files: (index, name) of images of the source at `root`.
        mask: of a last view, which shows what a transformer sees of the view that the mask is for.
        levels: how the run reads its images.
        read: of an index, the images of each source that belong together; None: there is one source.
    """
    parameters = Parameters(specs)
    found: list[Sample] = []
    for index, name in files:
        try:
            images_of_it = read(index) if read else [decode_named(root, name, levels)]
        except Exception:  # whatever a decoder may raise on a broken file
            continue
        image = images_of_it[0]
        of_views = [images_of_it[v % len(images_of_it)] for v in range(len(specs))]
        heights = [[one.height] for one in of_views]
        widths = [[one.width] for one in of_views]
        table = parameters(seed, epoch, index, heights, widths)
        views = [picture(crop(one, spec, row[0]), row) for one, spec, row in zip(of_views, specs, table, strict=True)]
        if mask:
            views.append(masked(views[mask.view], mask, seed, epoch, index))
        found.append(Sample(path_named(root, name), shown(image), views))
        if len(found) == images:
            break
    return found


def picture(pixels: np.ndarray, row: np.ndarray) -> Image.Image:
    """A crop [H, W, C] and its row [1, P] of the table: the view, before it is normalised."""
    channels = pixels.shape[2]
    mean, std = (0.0,) * channels, (1.0,) * channels
    x = F.augment(torch.from_numpy(pixels.copy())[None], torch.from_numpy(row), mean=mean, std=std)
    return shown(Bands((x[0] * 255).permute(1, 2, 0).numpy()))


def masked(view: Image.Image, spec: MaskSpec, seed: int, epoch: int, sample: int) -> Image.Image:
    """What a transformer sees of a view in that epoch: hidden patches are grey, and I-JEPA's targets, which its context
    doesn't see, are framed.
    """
    hidden, targets = drawn_mask(spec, seed, epoch, sample)
    columns = spec.grid[1]
    patch = view.width // columns
    pixels = np.array(view)
    covered = np.kron(hidden.numpy(), np.ones((patch, patch), bool))
    pixels[: covered.shape[0], : covered.shape[1]][covered] = GREY
    shown = Image.fromarray(pixels)
    pen = ImageDraw.Draw(shown)
    for target in targets.tolist():  # patches of a rectangle, ascending
        top, left = divmod(target[0], columns)
        bottom, right = divmod(target[-1], columns)
        pen.rectangle((left * patch, top * patch, (right + 1) * patch - 1, (bottom + 1) * patch - 1), outline=INK)
    return shown


def drawn_mask(spec: MaskSpec, seed: int, epoch: int, sample: int) -> tuple[Tensor, Tensor]:
    """(hidden patches [h, w] bool, patches of target blocks [T, P] int64) of one image; T = 0 but for "multi_block"."""
    # Sizes that a batch shares are those of the step of this number, as an image's own step isn't known here.
    drawn = drawn_masks(replace(spec, images=1.0), seed, epoch, torch.tensor([sample]), step=epoch)
    targets = torch.empty(0, 0, dtype=torch.int64) if drawn.targets is None else drawn.targets[0]
    return drawn.hidden[0], targets
