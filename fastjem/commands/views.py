"""`fastjem views`: a picture of what the augmentations do to real images."""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastjem import fields
from fastjem.checkpoints import write_atomically
from fastjem.config import MOST_VIEWS
from fastjem.data import shapes
from fastjem.data.levels import levels_of, parsed_range, survey
from fastjem.data.masking import MASKINGS, MASKINGS_OF_RUNS, masks_of_run
from fastjem.data.size import height_and_width, in_patches, shorter, written
from fastjem.data.source import Levelled, decode_all, open_sources
from fastjem.data.spread import spread
from fastjem.data.stages import Sizes
from fastjem.data.views import RECIPES, MaskSpec, Value, Views, ViewSpec
from fastjem.errors import UserError, nearest
from fastjem.methods import METHODS, combinations, views_of
from fastjem.printing import printable, say
from fastjem.reading import why_not
from fastjem.report.views import INK, Sample, samples, titles

PAPER = (255, 255, 255)
MARGIN, LINE = 8, 20  # pixels
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class ViewsOptions:
    """What a method's augmentations do to your own images: a picture, rows images, columns views."""

    data: str | None = field(
        default=None, metadata={"help": "images, as --data of pretrain; none: the embedded data set", "path": True}
    )
    out: str = field(default="views.png", metadata={"help": "the picture", "path": True})
    method: str = field(default="simclr", metadata={"help": f"one of {', '.join(METHODS)}"})
    preset: str = field(default="imagenet", metadata={"help": "of the method: fastjem methods NAME lists them"})
    recipe: str | None = field(default=None, metadata={"help": f"in place of the method's: {', '.join(RECIPES)}"})
    view: dict[str, Value] = field(default_factory=dict, metadata={"help": "fields of its views: flip=0 ..."})
    image_size: int | str = field(
        default=224,
        metadata={
            "help": "of the large views; of several, as in 112:75%,224, the last",
            "sides": True,
            "metavar": "PIXELS",
        },
    )
    channels: int = field(default=3, metadata={"help": "of the images; more than three are shown by the first three"})
    value_range: str = field(
        default="auto",
        metadata={"help": "LOW,HIGH: black and white of images that aren't 8-bit; auto: by the data set"},
    )
    images: int = 6
    large_views: int | None = field(default=None, metadata={"help": "whole ones of an image; none: the method's"})
    small_views: int | None = field(default=None, metadata={"help": "multi-crop's; none at 64 pixels and less"})
    blur: bool | None = field(default=None, metadata={"help": "as the recipe says; off at 64 pixels and less"})
    mask: str | None = field(
        default=None,
        metadata={
            "help": f"a last view through a mask: a run's --mask 0.75, or {', '.join(MASKINGS)}; none: the method's"
        },
    )
    masking: str | None = field(default=None, metadata={"help": f"of --mask 0.75: {' | '.join(MASKINGS_OF_RUNS)}"})
    patch_size: int = field(default=16, metadata={"help": "pixels, of a mask"})
    seed: int = field(default=0, metadata={"help": "the run's"})
    epoch: int = field(default=0, metadata={"help": "the run's"})


def main(options: ViewsOptions) -> int:
    say(draw_views(options), sys.stdout)
    return 0


def grid(shown: Sequence[Sample], columns: Sequence[str], root: str, *, cell: int) -> Image.Image:
    """Rows are images, the first column the file itself; cells of `cell` pixels, the longer side of a large view, with
    small views at their share of it."""
    font = ImageFont.load_default(13)
    views = shown[0].views
    longest = max(views[0].size)
    sizes = [(round(cell * view.width / longest), round(cell * view.height / longest)) for view in views]
    titled = zip(sizes, columns, strict=True)
    widths = [cell, *(max(width, round(font.getlength(title))) for (width, _), title in titled)]
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
            sheet.paste(view.resize(size, magnify(size[0] / view.width)), (left, top))
        name = shorten(printable(os.path.relpath(sample.path, root)), width - 2 * MARGIN, font)
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


def draw_views(options: ViewsOptions) -> Path:
    """A picture of what a method sees: rows are images of the folder, columns the views it trains on; its path.

    With a mask there is a last column. The share of the patches that it hides is what `mask` says, or the method's, or
    75 %; "block" has DINOv2's (10 to 50 %), "multi_block" I-JEPA's, whose targets are framed.

    Raises:
        UserError: for what can't be drawn, with the reason.
    """
    _check(options)
    out = Path(options.out)
    size = Sizes.of(options.image_size).last
    views = views_of(options.method, size, options.small_views, options.recipe, options.preset, options.large_views)
    mask = _mask(options, views)
    if options.data is None:
        say(f"fastjem: no data is named: these are images of the embedded data set ({shapes.folder() / 'train'})")
    source = open_sources(options.data or shapes.folder() / "train", views.sources)
    patch = options.patch_size if mask else 1
    specs = views.specs(size, patch=patch, blur=options.blur, changes=options.view, channels=options.channels)
    levels = levels_of(options.channels, parsed_range(options.value_range), survey(source, options.channels))
    # Evenly spread over the folder first; the others stand in for files that can't be read.
    order = dict.fromkeys([*spread(len(source), options.images).tolist(), *range(len(source))])
    shown = samples(
        ((i, source.name(i)) for i in order),
        specs,
        root=source.root,
        images=options.images,
        seed=options.seed,
        epoch=options.epoch,
        mask=mask,
        levels=levels,
        read=lambda i: decode_all(Levelled(source, levels), i),
    )
    if not shown:
        raise UserError(f"none of the files in {source.root} can be read")
    sheet = grid(shown, titles(views, mask is not None), source.root, cell=min(max(*height_and_width(size), 96), 224))
    file = io.BytesIO()
    sheet.save(file, Image.registered_extensions()[out.suffix.lower()])
    try:
        write_atomically(out, file.getvalue())
    except OSError as error:
        raise UserError(f"--out {out}: {why_not(error)}") from None
    return out


def _mask(options: ViewsOptions, views: Views) -> MaskSpec | None:
    """The mask that is asked for, or the method's own on its first view."""
    masking = options.mask
    if masking is None:
        masking = views.masking if views.mask else ""
    if not masking:
        return None
    size = Sizes.of(options.image_size).last
    patch = options.patch_size
    sides = height_and_width(size)
    uneven = any(side % patch for side in sides)
    if uneven or min(sides) < 2 * patch:
        what = "no multiple of" if uneven else "less than two of"
        raise UserError(f"--image-size {written(size)} is {what} --patch-size {patch}")
    grid = in_patches(size, patch)
    if (share := _share(masking)) is not None:
        return masks_of_run([ViewSpec(size=size)], patch, share, options.masking or "random")[0]
    if masking == views.masking and views.mask:
        return MaskSpec(0, grid, views.mask, masking, least=views.least_mask)
    low, high = (0.1, 0.5) if masking == "block" else (0.0, 0.75)
    return MaskSpec(0, grid, high, masking, least=low)


def _share(mask: str | None) -> float | None:
    """A mask that is a share of the patches, as a run's; None for one that is the name of a way to draw it."""
    try:
        return None if mask is None else float(mask)
    except ValueError:
        return None


def _check(options: ViewsOptions) -> None:
    fields.conform(options, "views: {}".format)
    if options.method not in METHODS:
        raise nearest("method", options.method, METHODS)
    share = _share(options.mask)
    if share is not None and not 0 < share < 1:
        raise UserError(f"--mask must be a share of the patches between 0 and 1, got {options.mask}")
    if options.mask is not None and share is None and options.mask not in MASKINGS:
        raise nearest("mask", options.mask, MASKINGS)
    if options.masking is not None and share is None:
        raise UserError(f"--masking {options.masking} is for a share of the patches: --mask 0.75")
    if options.masking is not None and options.masking not in MASKINGS_OF_RUNS:
        raise nearest("masking", options.masking, MASKINGS_OF_RUNS)
    asked = {"large_views": options.large_views is not None, "small_views": bool(options.small_views)}
    asked["mask"] = share is not None
    for option, is_asked in asked.items():
        if is_asked and (reason := combinations.why_not(METHODS[options.method], option)):
            here = reason.partition(": --options")[0]  # which is pretrain's
            raise UserError(f"--{option.replace('_', '-')}: {options.method} {here}")
    parsed_range(options.value_range)
    if options.large_views is not None and options.large_views < 2:
        raise UserError(f"--large-views must be at least 2, got {options.large_views}")
    for option in ("large_views", "small_views"):
        if (getattr(options, option) or 0) > MOST_VIEWS:
            raise UserError(
                f"--{option.replace('_', '-')} must be at most {MOST_VIEWS}, got {getattr(options, option)}"
            )
    smallest = shorter(Sizes.of(options.image_size).pixels[0])
    for name, least in (("images", 1), ("channels", 1), ("image_size", 8), ("patch_size", 1)):
        value = smallest if name == "image_size" else getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if Path(options.out).suffix.lower() not in FORMATS:
        raise UserError(f"--out {options.out}: the picture's name must end in {', '.join(FORMATS)}")
