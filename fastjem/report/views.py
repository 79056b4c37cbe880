"""What the augmentations do to real images: samples of views, and a picture of them."""

import dataclasses
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import fastjem.functional as F
from fastjem.checkpoints import write_atomically
from fastjem.data import masks, shapes
from fastjem.data.loaders.torch import crop
from fastjem.data.parameters import Parameters
from fastjem.data.source import decode_named, open_source
from fastjem.data.views import RECIPES, Value, Views, ViewSpec
from fastjem.errors import UserError, nearest
from fastjem.methods import METHODS, views_of
from fastjem.report.run import spread

GREY, PAPER, INK = (128, 128, 128), (255, 255, 255), (40, 40, 40)
MARGIN, LINE = 8, 20  # pixels
MASKS = (*masks.SAMPLERS, "block", "multi_block")
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Config:
    """What a method's augmentations do to your own images: a picture, rows images, columns views."""

    data: str = field(default="", metadata={"help": "folder of images, nested or flat; none: the embedded data set"})
    out: str = field(default="views.png", metadata={"help": "the picture"})
    method: str = field(default="simclr", metadata={"help": f"one of {', '.join(METHODS)}"})
    recipe: str | None = field(default=None, metadata={"help": f"in place of the method's: {', '.join(RECIPES)}"})
    view: dict[str, Value] = field(default_factory=dict, metadata={"help": "fields of its views: flip=0 ..."})
    image_size: int = 224
    images: int = 6
    small_views: int | None = field(default=None, metadata={"help": "multi-crop's; none at 64 pixels and less"})
    blur: bool | None = field(default=None, metadata={"help": "as the recipe says; off at 64 pixels and less"})
    mask: str | None = field(
        default=None, metadata={"help": f"a last view through such a mask: {', '.join(MASKS)}; none: the method's"}
    )
    patch_size: int = field(default=16, metadata={"help": "pixels, of a mask"})
    seed: int = field(default=0, metadata={"help": "the run's"})
    epoch: int = field(default=0, metadata={"help": "the run's"})


def main(config: Config) -> int:
    print(draw_views(**dataclasses.asdict(config)))
    return 0


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
    root: str,
    images: int,
    seed: int = 0,
    epoch: int = 0,
    mask: str = "",
    share: float = 0.75,
    patch: int = 16,
) -> list[Sample]:
    """The views that training with that seed sees in that epoch of the first `images` files that can be read.

    files: (index in the data, name in the source at `root`). With a mask, one of `MASKS`, a last view shows one draw of
    it on the first: hidden patches are grey; I-JEPA's targets, which its context doesn't see, are framed.
    """
    out, parameters = list[Sample](), Parameters(specs)
    for i, name in files:
        try:
            image = decode_named(root, name)
        except Exception:  # whatever a decoder may raise on a broken file
            continue
        table = parameters(seed, epoch, i, image.height, image.width)
        views = [picture(crop(image, spec, row[0]), row) for spec, row in zip(specs, table, strict=True)]
        if mask:
            views.append(masked(views[0], mask, share, patch, np.random.default_rng((seed, epoch, i))))
        out.append(Sample(os.path.join(root, name), image, views))
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


def grid(shown: Sequence[Sample], columns: Sequence[str], root: Path, *, cell: int) -> Image.Image:
    """Rows are images, the first column the file itself; cells of `cell` pixels, small views at their share of it."""
    font = ImageFont.load_default(13)
    sizes = [round(cell * view.width / shown[0].views[0].width) for view in shown[0].views]
    widths = [cell, *(max(size, round(font.getlength(title))) for size, title in zip(sizes, columns, strict=True))]
    lefts = [MARGIN + sum(widths[:i]) + MARGIN * i for i in range(len(widths))]
    width = lefts[-1] + widths[-1] + MARGIN
    sheet = Image.new("RGB", (width, LINE + MARGIN + (cell + LINE + MARGIN) * len(shown)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, ["image", *columns], strict=True):
        pen.text((left, MARGIN // 2), title, INK, font)
    for row, sample in enumerate(shown):
        top = LINE + MARGIN + row * (cell + LINE + MARGIN)
        scale = cell / max(sample.image.size)
        fitted = (max(round(sample.image.width * scale), 1), max(round(sample.image.height * scale), 1))
        sheet.paste(sample.image.resize(fitted, magnify(scale)), (MARGIN, top))
        for left, size, view in zip(lefts[1:], sizes, sample.views, strict=True):
            sheet.paste(view.resize((size, size), magnify(size / view.width)), (left, top))
        name = shorten(os.path.relpath(sample.path, root), width - 2 * MARGIN, font)
        pen.text((MARGIN, top + cell + 2), name, INK, font)
    return sheet


def magnify(scale: float) -> Image.Resampling:
    """Pixels stay pixels when they are magnified."""
    return Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC


def shorten(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The end of a name tells files apart."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def draw_views(
    data: str | os.PathLike[str] = "",
    out: str | os.PathLike[str] = "views.png",
    *,
    method: str = "simclr",
    recipe: str | None = None,
    view: Mapping[str, Value] | None = None,
    image_size: int = 224,
    images: int = 6,
    small_views: int | None = None,
    blur: bool | None = None,
    mask: str | None = None,
    patch_size: int = 16,
    seed: int = 0,
    epoch: int = 0,
) -> Path:
    """A picture of what a method sees: rows are images of the folder, columns the views it trains on.

    Args:
        data: none: the embedded data set.
        recipe: another augmentation in place of the method's own.
        view: changed fields of its views, as for `fastjem.data.views.Views.specs`.
        blur: None: as in pretraining, where 64 pixels and less aren't blurred.
        mask: one of `MASKS` in place of the method's own, if it has one, in a last column. The share of the patches is
            the method's, or 75 %; "block" has DINOv2's (10 to 50 %), "multi_block" I-JEPA's, whose targets are framed.
        patch_size: of the mask.
        seed, epoch: the views are those that a run with this seed sees in this epoch.

    Raises:
        UserError: for what can't be drawn, with the reason.
    """
    if method not in METHODS:
        raise nearest("method", method, METHODS)
    for name, least, value in (("images", 1, images), ("image-size", 8, image_size), ("patch-size", 1, patch_size)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: the picture's name must end in {', '.join(FORMATS)}")
    views = views_of(method, image_size, small_views, recipe)
    if mask is None:
        mask = views.masking if views.mask else ""
    elif mask not in MASKS:
        raise nearest("mask", mask, MASKS)
    if mask and (image_size % patch_size or image_size < 2 * patch_size):
        what = "no multiple of" if image_size % patch_size else "less than two of"
        raise UserError(f"--image-size {image_size} is {what} --patch-size {patch_size}")
    folder = open_source(data or shapes.folder() / "train")
    specs = views.specs(image_size, patch=patch_size if mask else 1, blur=blur, changes=view)
    # evenly spread over the folder first; the others stand in for files that can't be read
    order = dict.fromkeys([*spread(len(folder), images).tolist(), *range(len(folder))])
    files = ((i, folder.name(i)) for i in order)
    drawn = {"mask": mask, "share": views.mask or 0.75, "patch": patch_size}
    shown = samples(files, specs, root=folder.root, images=images, seed=seed, epoch=epoch, **drawn)
    if not shown:
        raise UserError(f"none of the files in {folder.root} can be read")
    sheet, file = grid(shown, titles(views, mask), folder.root, cell=min(max(image_size, 96), 224)), io.BytesIO()
    sheet.save(file, Image.registered_extensions()[out.suffix.lower()])
    try:
        write_atomically(out, file.getvalue())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return out
