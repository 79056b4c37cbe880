"""One window of one 8-bit RGB image, with Pillow's own bits: what a loader's worker cuts, outside of any operator."""

import numpy as np

from .. import _C


def resize_window(
    image: np.ndarray,  # [H, W, 3] uint8
    box: tuple[int, int, int, int],  # left, top, right, bottom, as Pillow's
    bicubic: bool,
    tall_first: bool,
    out: np.ndarray,  # [height, width, 3] uint8, written
) -> None:
    """`out[:] = image.crop(box).resize((width, height), BICUBIC if bicubic else BILINEAR)` of a Pillow image.

    Args:
        tall_first: resize down before across where the height shrinks by more than twice as many pixels as the width,
            as Pillow does from 13 on; else always across first.

    Raises:
        ValueError: for arrays that aren't contiguous [H, W, 3] uint8, and for a box that is empty or leaves the image.
    """
    for name, array in (("image", image), ("out", out)):
        shape = array.shape
        if array.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape or not array.flags.c_contiguous:
            raise ValueError(f"resize_window: {name} must be contiguous [H, W, 3] uint8, got {shape} {array.dtype}")
    if not out.flags.writeable:
        raise ValueError("resize_window: out must be writeable")
    left, top, right, bottom = box
    rows, columns, _ = image.shape
    if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
        raise ValueError(f"resize_window: box must lie in the image of {columns} x {rows}, got {box}")
    height = bottom - top
    width = right - left
    down, across, _ = out.shape
    down_first = tall_first and height > down and height - down > 2 * (width - across)
    _C.resize_window(
        image.ctypes.data, columns, top, left, height, width, down, across, bicubic, down_first, out.ctypes.data
    )
