"""Files that others made, opened with bounds: which are taken, how many bytes and pixels, and by which decoders."""

import errno
import importlib.util
import io
import logging
import math
import os
import stat
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, features

ORIENTATION = 0x0112  # the EXIF tag
LARGEST_FILE = 2**30  # bytes


def _opens_heif() -> bool:
    """Whether the plugin `pillow_heif` is there; Pillow has no decoder of its own for what telephones write."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    try:
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener(thumbnails=False)
    except Exception:  # one that doesn't fit this Pillow, or lacks a library
        return False
    return True


# Pillow has forty decoders, among them one that starts Ghostscript; whatever a file is called, these alone are tried.
# The last ones need parts that a build of Pillow may lack, or a plugin.
_DECODERS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    **({"AVIF": (".avif",)} if importlib.util.find_spec("PIL._avif") is not None else {}),
    **({"JPEG2000": (".jp2", ".j2k", ".jpx", ".j2c", ".jpc", ".jpf")} if features.check_codec("jpg_2000") else {}),
    **({"HEIF": (".heic", ".heif")} if _opens_heif() else {}),
}
FORMATS = tuple(_DECODERS)
ENDINGS = tuple(ending for endings in _DECODERS.values() for ending in endings)

PNG = b"\x89PNG\r\n\x1a\n"
NEEDED_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # of a PNG file, for its pixels
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DEFLATED = (8, 32946)  # compressions of TIFF files by zlib
BITS, SAMPLES = 258, 277  # TIFF tags: bits of each sample, and samples of a pixel
# By EXIF orientation: whether rows and columns change places first, then whether rows, and columns, are reversed.
TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A regular file's bytes.

    A pipe would be waited for, a device may never end: both are told by what they are before they are opened, and the
    open file is looked at again, as the name may have changed hands in between.

    Raises:
        OSError: for what isn't a regular file, is larger than `LARGEST_FILE`, or can't be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise too_large()
        data = file.read(size + 1)
        while len(data) > size and (more := file.read(2**20)):  # it grows, or its size isn't told, as in /proc
            data += more
            if len(data) > LARGEST_FILE:
                raise too_large()
    return data


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """A regular file, open and unbuffered; OSError for anything else."""
    _check_regular(os.stat(path))
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = io.FileIO(os.open(path, flags), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def too_large() -> OSError:
    """What is raised for a file, or a part of one that is an image's file, beyond `LARGEST_FILE`."""
    return OSError(errno.EFBIG, f"larger than {LARGEST_FILE / 2**30:g} GiB")


def check_size(width: int, height: int, channels: int = 1) -> None:
    """ValueError for more pixels than Pillow decodes: twice its `MAX_IMAGE_PIXELS`, which a program may set."""
    if Image.MAX_IMAGE_PIXELS is None:
        return
    most = 2 * Image.MAX_IMAGE_PIXELS
    if width * height > most:
        raise ValueError(f"{width} x {height} pixels, more than the {most:,} that are read")
    if width * height * channels > 4 * most:
        raise ValueError(f"{width} x {height} x {channels} values, more than the {4 * most:,} that are read")


def open_image(data: bytes) -> Image.Image:
    """An image file's bytes -> the image as Pillow opens it, header alone; of `FORMATS`, whatever it is called.

    Raises:
        Exception: whatever Pillow raises on a broken file.
    """
    try:
        return _opened(data)
    except Exception:
        pixels = pixels_alone(data)
        if len(pixels) == len(data):
            raise
    return _opened(pixels)


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(*image.size)
    return image


def pixels_alone(data: bytes) -> bytes:
    """A PNG file without what its pixels don't need; any other file as it is.

    Pillow refuses a whole image for a text or a colour profile of more than a megabyte. Nothing is decompressed here.
    """
    if not data.startswith(PNG):
        return data
    kept = [PNG]
    at = len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in NEEDED_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def stored(data: bytes, channels: int = 3) -> Image.Image | np.ndarray:
    """What an image file holds, decoded and the right way up: Pillow's image, or values [H, W, C] where Pillow has no
    mode for them (several channels of more than 8 bits, or more than 4 of them).

    Args:
        channels: that are wanted; Pillow drops a TIFF file's fifth.

    Raises:
        Exception: whatever a decoder raises on a broken file.
    """
    if deep_png(data):
        return _values_of_png(data)
    if data.startswith(TIFF) and _for_tifffile(data, channels):
        return _values_of_tiff(data)
    with open_image(data) as image:
        try:
            image.load()
        except ValueError:  # a PNG file's text may stand behind its pixels
            pixels = pixels_alone(data)
            if len(pixels) == len(data):
                raise
            return stored(pixels, channels)
        # The EXIF data of an image whose orientation is 1, or none, aren't worth a copy.
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def deep_png(data: bytes) -> bool:
    """Whether it is a PNG file of 16 bits and several channels; Pillow drops the lower 8 bits of these."""
    return data.startswith(PNG) and data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")


def _values_of_png(data: bytes) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    check_size(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), 4)
    with open_image(data) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
    values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return upright(values.permute(1, 2, 0).numpy(), orientation)


def _for_tifffile(data: bytes, channels: int) -> bool:
    """Whether Pillow can't open this TIFF file, or would change or drop some of what is wanted."""
    try:
        with open_image(data) as image:
            if not isinstance(image, TiffImagePlugin.TiffImageFile):
                return False
            samples = image.tag_v2.get(SAMPLES, 1)
            deep = max(image.tag_v2.get(BITS, (1,))) > 8
    except Image.DecompressionBombError:
        raise
    except Image.UnidentifiedImageError:
        return True
    return samples > 1 and (deep or channels not in (1, 3))


def _values_of_tiff(data: bytes) -> np.ndarray:
    """[H, W, C] of the first page."""
    try:
        import tifffile
    except ModuleNotFoundError:
        raise ValueError("Pillow has no mode for this TIFF file; tifffile may read it: pip install tifffile") from None
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it says of a file isn't for the terminal
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        check_size(page.imagewidth, page.imagelength, page.samplesperpixel)
        _check_inflated(page, data)
        values = page.asarray()
        axes = page.axes
        orientation = int(page.tags.valueof(ORIENTATION, 1))
    if values.ndim == 2:
        values = values[:, :, None]
    elif axes == "SYX":
        values = np.moveaxis(values, 0, 2)
    elif axes != "YXS":
        raise ValueError(f"a TIFF file of axes {axes}, not rows, columns and channels")
    return upright(values, orientation)


def _check_inflated(page: Any, data: bytes) -> None:
    """ValueError where a compressed part of a TIFF page holds more than its pixels: zlib would inflate it all."""
    if page.compression not in DEFLATED:
        return
    most = math.prod(page.chunks) * page.dtype.itemsize
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        if len(zlib.decompressobj().decompress(data[start : start + length], most + 1)) > most:
            raise ValueError("a part of the TIFF file holds more than its pixels")


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, C] as they were stored -> [H, W, C] turned as the EXIF orientation says."""
    transposed, rows, columns = TURNS.get(orientation, (0, 0, 0))
    values = values.swapaxes(0, 1) if transposed else values
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


def size_of(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image once it is turned as EXIF says, by the header alone.

    `Image.getexif` and not the PNG plugin's, which decodes the whole image for tags that may stand behind its pixels.
    Of TIFF files Pillow's own size is turned already.
    """
    if image.format == "TIFF":
        return image.height, image.width
    transposed, _, _ = TURNS.get(Image.Image.getexif(image).get(ORIENTATION, 1), (0, 0, 0))
    return (image.width, image.height) if transposed else (image.height, image.width)
