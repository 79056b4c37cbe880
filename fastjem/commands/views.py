"""`fastjem views`: a picture of what the augmentations do to real images."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastjem.checkpoints import write_atomically
from fastjem.data import shapes
from fastjem.data.folder import ImageFolder
from fastjem.data.views import RECIPES, Value
from fastjem.errors import UserError, nearest
from fastjem.methods import METHODS, views_of
from fastjem.report.run import spread
from fastjem.report.views import INK, MASKS, Sample, samples, titles

PAPER = (255, 255, 255)
MARGIN, LINE = 8, 20  # pixels
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class ViewsOptions:
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


def main(options: ViewsOptions) -> int:
    print(draw_views(**dataclasses.asdict(options)))
    return 0


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
    folder = ImageFolder(data or shapes.folder() / "train")
    specs = views.specs(image_size, patch=patch_size if mask else 1, blur=blur, changes=view)
    # evenly spread over the folder first; the others stand in for files that can't be read
    order = dict.fromkeys([*spread(len(folder), images).tolist(), *range(len(folder))])
    files = ((i, folder.path(i)) for i in order)
    drawn = {"mask": mask, "share": views.mask or 0.75, "patch": patch_size}
    shown = samples(files, specs, images=images, seed=seed, epoch=epoch, **drawn)
    if not shown:
        raise UserError(f"none of the files in {folder.root} can be read")
    sheet, file = grid(shown, titles(views, mask), folder.root, cell=min(max(image_size, 96), 224)), io.BytesIO()
    sheet.save(file, Image.registered_extensions()[out.suffix.lower()])
    try:
        write_atomically(out, file.getvalue())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return out
