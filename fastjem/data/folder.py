"""A folder of images: which files there are, and one file's pixels."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from fastjem.errors import UserError

T = TypeVar("T")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class ImageFolder:
    """The image files below a folder, nested or flat; nothing is opened until it is asked for.

    `labels` is the index of each file's first-level folder in `classes`; a flat folder has one class, "".
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root} is {'a file, no' if self.root.exists() else 'not a'} folder")
        base, found, seen = os.fspath(self.root), [], set()
        for folder, subfolders, files in os.walk(base, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            found += [
                os.path.relpath(os.path.join(folder, name), base) if folder != base else name
                for name in files
                if name.lower().endswith(ENDINGS) and not name.startswith(".")
            ]
        if not found:
            raise UserError(f"{root} has no images; files ending in {' '.join(ENDINGS)} are read, in subfolders too")
        # One array of bytes instead of a list of strings: a fork of a worker copies no reference counts.
        self.files = np.array(sorted(os.fsencode(name) for name in found))
        first = [os.fsdecode(name).split(os.sep)[0] if os.sep in os.fsdecode(name) else "" for name in self.files]
        self.classes = sorted(set(first))
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([index[name] for name in first])

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[i]))

    def image(self, i: int) -> Image.Image:
        """The i-th file as 8-bit RGB, the right way up. Whatever is wrong with the file raises."""
        return read_image(self.path(i))


def read_image(path: str) -> Image.Image:
    """Any mode (16-bit, grayscale, palette, CMYK, with alpha) and EXIF orientation -> 8-bit RGB."""
    with Image.open(path) as image:
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would clip these at 255
            values = np.asarray(image).astype(np.float64)
            if image.mode == "F":
                values = np.nan_to_num(values, posinf=0, neginf=0)
            top = values.max(initial=0)
            scale = (
                255.0
                if top <= 1 and image.mode == "F"
                else 1.0
                if top <= 255
                else 255 / 65535
                if top <= 65535
                else 255 / top
            )
            image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")


def reason(error: Exception, path: str) -> str:
    """What a decoder said of a file, in one line and without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    said = (lines[0] if lines else type(error).__name__).replace(f" '{path}'", "").replace(f": '{path}'", "")
    return said.partition(" <_io")[0]


def readable(folder: ImageFolder, sample: int, read: Callable[[int], T]) -> tuple[T | None, list[tuple[str, str]]]:
    """`read` of the sample's file, or of the next that can be read (None: there is none); and those that can't."""
    unreadable = []
    for i in range(len(folder)):
        at = (sample + i) % len(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of harmless EXIF trouble, once per file
                return read(at), unreadable
        except Exception as error:  # whatever a decoder may raise on a broken file
            unreadable.append((folder.path(at), reason(error, folder.path(at))))
    return None, unreadable


def none_readable(unreadable: Sequence[tuple[str, str]]) -> UserError:
    path, why = unreadable[0]
    return UserError(f"none of the files can be read; the first: {path}: {why}")
