"""What the augmentations do to real images: samples of views, and one of their masks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

import fastjem.functional as F
from fastjem.data import masks
from fastjem.data.folder import read_image
from fastjem.data.loader import crop
from fastjem.data.parameters import Parameters
from fastjem.data.views import Views, ViewSpec

GREY, INK = (128, 128, 128), (40, 40, 40)  # hidden patches, and the frames of I-JEPA's targets
MASKS = (*masks.SAMPLERS, "block", "multi_block")


@dataclass(frozen=True)
class Sample:
    path: str
    image: Image.Image
    views: list[Image.Image]


def titles(views: Views, mask: str = "") -> list[str]:
    """One a view, in their order."""
    large = [f"large {i + 1}" if views.large > 1 else "view" for i in range(views.large)]
    return large + [f"small {i + 1}" for i in range(views.small)] + (["masked"] if mask else [])


def samples(
    files: Iterable[tuple[int, str]],
    specs: Sequence[ViewSpec],
    *,
    images: int,
    seed: int = 0,
    epoch: int = 0,
    mask: str = "",
    share: float = 0.75,
    patch: int = 16,
) -> list[Sample]:
    """The views that training with that seed sees in that epoch of the first `images` files that can be read.

    files: (index in the data, path). With a mask, one of `MASKS`, a last view shows one draw of it on the first: hidden
    patches are grey; I-JEPA's targets, which its context doesn't see, are framed.
    """
    out, parameters = list[Sample](), Parameters(specs)
    for i, path in files:
        try:
            image = read_image(path)
        except Exception:  # whatever a decoder may raise on a broken file
            continue
        table = parameters(seed, epoch, i, image.height, image.width)
        views = [picture(crop(image, spec, row[0]), row) for spec, row in zip(specs, table, strict=True)]
        if mask:
            views.append(masked(views[0], mask, share, patch, np.random.default_rng((seed, epoch, i))))
        out.append(Sample(path, image, views))
        if len(out) == images:
            break
    return out


def picture(pixels: np.ndarray, row: np.ndarray) -> Image.Image:
    """A crop [H, W, 3] and its row [1, P] of the table: the view, before it is normalised."""
    x = F.augment(torch.from_numpy(pixels.copy())[None], torch.from_numpy(row), mean=(0, 0, 0), std=(1, 1, 1))
    return Image.fromarray((x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def masked(view: Image.Image, mask: str, share: float, patch: int, random: np.random.Generator) -> Image.Image:
    """What a transformer sees through one draw of a mask; hidden patches are grey."""
    pixels, size = np.array(view), (view.height // patch, view.width // patch)
    seeded, targets = torch.Generator().manual_seed(int(random.integers(1 << 62))), torch.empty(0, 0, dtype=torch.int64)
    if mask == "multi_block":
        drawn = masks.multi_block_mask(1, size, generator=seeded, sizes=tuple(random.random(2)))
        hidden, targets = drawn.context, drawn.targets[0]
    elif mask == "block":
        hidden = masks.block_mask(1, size, images=1.0, generator=seeded)
    else:
        hidden = masks.SAMPLERS[mask](1, size, share, generator=seeded)
    whole = np.kron(hidden[0].numpy(), np.ones((patch, patch), bool))
    pixels[: whole.shape[0], : whole.shape[1]][whole] = GREY
    out = Image.fromarray(pixels)
    pen = ImageDraw.Draw(out)
    for target in targets.tolist():
        (top, left), (bottom, right) = divmod(target[0], size[1]), divmod(target[-1], size[1])
        pen.rectangle((left * patch, top * patch, (right + 1) * patch - 1, (bottom + 1) * patch - 1), outline=INK)
    return out
