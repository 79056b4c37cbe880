"""A folder of images, or a file of arrays that stands for one: which there are, and one image's pixels."""

import functools
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
ARRAYS = (".npz", ".npy")


def is_rgb(x) -> bool:
    """Whether an array or a tensor is [N, H, W, 3] or [N, 3, H, W] uint8, and not empty."""
    uint8 = str(x.dtype).rpartition(".")[2] == "uint8"
    return x.ndim == 4 and uint8 and 0 not in x.shape and 3 in (x.shape[1], x.shape[3])


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What a .npz or .npy file holds: `images` [N, H, W, 3] uint8, stored so or as [N, 3, H, W]; in a .npz file perhaps
    `labels` [N] int64 and `classes`, the names that they number.

    Raises:
        UserError: for anything else, with what came.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        found = {"images": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # a broken archive raises whatever zipfile, zlib or numpy may
        raise UserError(f"{path} can't be read as .npz or .npy: {str(error).partition('. ')[0]}") from None
    if "images" not in found:
        raise UserError(f"{path} must hold an array `images`, and may hold `labels`; it holds {sorted(found)}")
    x = found["images"]
    if not is_rgb(x):
        raise UserError(f"{path}: images must be [N, H, W, 3] or [N, 3, H, W] uint8, got {x.shape} {x.dtype}")
    out = {"images": x if x.shape[3] == 3 else x.transpose(0, 2, 3, 1)}
    if "labels" in found:
        labels = found["labels"]
        if labels.size != len(x) or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: labels must be [{len(x)}] integers, got {labels.shape} {labels.dtype}")
        out["labels"] = labels.astype(np.int64).reshape(-1)
        if "classes" in found:
            out["classes"] = found["classes"]
            if out["labels"].min() < 0 or out["labels"].max() >= found["classes"].size:
                raise UserError(f"{path}: labels must number the {found['classes'].size} classes")
    return out


@functools.lru_cache(maxsize=4)
def _held(path: str, changed: int) -> dict[str, np.ndarray]:
    return read_arrays(path)


def held(path: str) -> dict[str, np.ndarray]:
    """`read_arrays`, once a process for each version of the file: forks share its pages."""
    return _held(path, os.stat(path).st_mtime_ns)


class ImageFolder:
    """The image files below a folder, nested or flat; nothing is opened until it is asked for.

    `labels` is the index of each file's first-level folder in `classes`; a flat folder has one class, "".

    A .npz or .npy file (`read_arrays`) is a folder whose files are called 0, 1, 2, ...: `arrays` is then true.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        self.arrays = self.root.suffix in ARRAYS and self.root.is_file()
        if self.arrays:
            found = held(os.fspath(root))
            self.files = np.array([b"%d" % i for i in range(len(found["images"]))])
            names, self.labels = np.unique(found.get("labels", np.zeros(len(self.files), int)), return_inverse=True)
            given = found.get("classes")
            self.classes = [str(i if given is None else given[i]) for i in names] if len(names) > 1 else [""]
            return
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
    root, name = os.path.split(path)
    if root.endswith(ARRAYS) and os.path.isfile(root):
        return Image.fromarray(held(root)["images"][int(name)])
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
    return (lines[0] if lines else type(error).__name__).replace(f" '{path}'", "").partition(" <_io")[0]


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
