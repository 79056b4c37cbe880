"""Crops of files by NVIDIA DALI: it decodes each image once, crops and resizes it for all views, on the GPU or the CPU.

Windows come from our tables and the order of samples from us, so that a view is the torch loader's, up to rounding (a
level) and the outermost pixels, for which DALI repeats the window's edge where Pillow leaves weights out.
"""

import io
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastjem.data.folder import ImageFolder, read_image
from fastjem.data.loader import Batch, Order, nothing_readable, readable
from fastjem.data.parameters import Parameters
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError
from fastjem.kernels import reference_augment as column

AHEAD = 2  # batches that DALI works on while one is trained on
UPRIGHT = (None, 1)


class DaliLoader:
    """Batches of crops from step `start` to `stop`, as `fastjem.data.loader.ViewLoader`.

    JPEG goes to DALI as it is. What its decoder wouldn't turn into the same pixels as Pillow (other formats, CMYK, EXIF
    rotation) or would stop at (truncated) is decoded by Pillow, and a file that Pillow can't read either is named and
    replaced by the next. Where DALI stops at a file nevertheless, its pipeline is built again, and the batches that
    were under way go through Pillow.

    Args:
        threads: of DALI.
        device: a CUDA device decodes and resizes there; the CPU needs no GPU.

    Raises:
        UserError: where DALI isn't installed or doesn't run on that device, with its reason.
    """

    def __init__(
        self,
        folder: ImageFolder,
        specs: Sequence[ViewSpec],
        *,
        batch: int,
        seed: int = 0,
        start: int = 0,
        stop: int,
        threads: int = 2,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.folder, self.specs, self.seed, self.threads = folder, list(specs), seed, max(threads, 1)
        self.device, self.local = torch.device(device), batch // ranks
        self.order = Order(len(folder), batch, seed, start, stop, rank, ranks)
        self.parameters = Parameters(specs)
        try:
            import nvidia.dali
        except ImportError as error:
            raise UserError(f"DALI: {error}; pip install 'fastjem[dali]' brings it") from None
        self.dali = nvidia.dali
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG")
        one = np.frombuffer(file.getvalue(), np.uint8), *[np.array([0, 0, 8, 8], np.int32)] * len(specs)
        try:
            self._pipeline(iter([[[x] for x in one]])).run()
        except RuntimeError as error:
            raise UserError(f"DALI doesn't run on {self.device}: {str(error).strip().splitlines()[0]}") from None

    def _pipeline(self, source: Iterator) -> Any:
        """source: (files' bytes, windows of each view [B, 4]) of a batch at a time."""
        from nvidia.dali import fn, types

        gpu = self.device.type == "cuda"
        pipeline = self.dali.Pipeline(
            self.local, self.threads, (self.device.index or 0) if gpu else None, exec_dynamic=True,
            prefetch_queue_depth=AHEAD,
        )  # fmt: skip
        with pipeline:
            files, *windows = fn.external_source(lambda: next(source), num_outputs=1 + len(self.specs))
            images = fn.decoders.image(files, device="mixed" if gpu else "cpu", jpeg_fancy_upsampling=True)
            crops = []
            for window, spec in zip(windows, self.specs, strict=True):
                cut = fn.slice(images, start=window[:2], shape=window[2:], axes=(0, 1))
                kind = types.INTERP_CUBIC if spec.bicubic else types.INTERP_LINEAR
                crops.append(fn.resize(cut, size=(spec.size, spec.size), interp_type=kind, antialias=True))
            pipeline.set_outputs(*crops)
        return pipeline

    def __iter__(self) -> Iterator[Batch]:
        order, under_way, again = iter(self.order), deque[tuple](), deque[list]()

        def source() -> Iterator[tuple]:
            while True:
                careful = bool(again)
                keys = again.popleft() if again else next(order, None)
                if keys is None:
                    return
                files, tables, unreadable = self._read(keys, careful)
                under_way.append((keys, careful, tables, unreadable))
                yield files, *(table[:, column.TOP : column.WIDTH + 1].astype(np.int32) for table in tables)

        pipeline = self._pipeline(source())
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            except RuntimeError:
                if any(careful for _, careful, *_ in under_way):
                    raise  # at what Pillow has read: that isn't the files' fault
                again.extend(keys for keys, *_ in under_way)
                under_way.clear()
                pipeline = self._pipeline(source())
                continue
            _, _, tables, unreadable = under_way.popleft()
            crops = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            yield Batch(crops, [torch.from_numpy(table) for table in tables], unreadable)

    def _read(self, keys: list[tuple[int, int]], careful: bool) -> tuple[list[np.ndarray], np.ndarray, list]:
        """Bytes that DALI can decode, tables [V, B, P], and what couldn't be read."""
        files, sizes, unreadable = [], [], []
        for _, sample in keys:
            found, bad = readable(self.folder, sample, lambda at: encoded(self.folder.path(at), careful))
            if found is None:
                raise nothing_readable(bad)
            files.append(found[0])
            sizes.append(found[1])
            unreadable += bad
        samples, (heights, widths) = [sample for _, sample in keys], zip(*sizes, strict=True)
        epoch = keys[0][0]  # a batch lies in one epoch
        return files, self.parameters(self.seed, epoch, samples, heights, widths), unreadable


def encoded(path: str, careful: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """The file's bytes, or if DALI shouldn't see these the same pixels as BMP; and (height, width)."""
    with open(path, "rb") as file:
        data = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not careful
            whole = data.rstrip(b"\0")[-2:] == b"\xff\xd9"
            if plain and whole and image.getexif().get(0x0112) in UPRIGHT:
                return np.frombuffer(data, np.uint8), (image.height, image.width)
        image = read_image(path)  # 8-bit RGB, upright
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return np.frombuffer(buffer.getvalue(), np.uint8), (image.height, image.width)
