"""What a JPEG file's structure tells without decoding it."""

import re
import struct

from PIL import Image

from fastjem.data.files import ORIENTATION

MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # what ends coded pixels; 00 is a coded FF, D0 to D7 are restarts
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: Huffman-coded
SCAN, END, EXIF = 0xDA, 0xD9, 0xE1
HARMLESS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comments, applications' own


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width), the right way up, of a JPEG file whose structure is whole: 8 bits, gray or YCbCr, up to its end.

    None for everything else, of which Pillow will say whether it is an image. Nothing is decoded: some 0.1 ms. As
    strict as DALI's own parser: where that finds no marker in a header, its threads crash (2.4), while a decoder that
    fails is an error that can be caught.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    size: tuple[int, int] | None = None
    turned = False  # by its EXIF orientation: height and width change places
    in_pixels = False  # behind the first scan's header, where markers stand anywhere
    while (found := MARKER.search(data, at) if in_pixels else MARKER.match(data, at)) is not None:
        kind = data[found.end() - 1]
        at = found.end()
        if kind == END:
            return _upright(size, turned)
        length = int.from_bytes(data[at : at + 2], "big")
        segment = data[at + 2 : at + length] if kind in FRAMES or kind == EXIF else b""
        if kind in FRAMES:
            if size is not None or len(segment) < 6 or segment[0] != 8 or segment[5] not in (1, 3):
                return None
            size = struct.unpack(">HH", segment[1:5])
            if 0 in size:
                return None
        elif segment[:6] == b"Exif\0\0":
            turned = 5 <= _orientation(segment) <= 8
        elif kind == SCAN and size is not None:
            in_pixels = True
        elif kind not in HARMLESS:
            return None
        at += length
    return None


def _upright(size: tuple[int, int] | None, turned: bool) -> tuple[int, int] | None:
    if size is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 2**62):
        return None
    height, width = size
    return (width, height) if turned else (height, width)


def _orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        return int(exif.get(ORIENTATION, 1))
    except Exception:  # whatever is wrong with it: Pillow and DALI take such an image as it is
        return 1
