"""Views of files by DALI: each file is decoded once, every view's window is cut and resized, on the GPU or the CPU.

DALI decides nothing here: the order, the windows and what is done about a broken file are ours, so that a run sees the
same crops whoever executes them. A file that DALI can't decode would end its pipeline; so each file's structure is read
first, and all but plain JPEG files are decoded by Pillow and handed over as pixels.
"""

import itertools
import re
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastjem.data.batches import Crops, Key
from fastjem.data.folder import ImageFolder, none_readable, read_image, readable
from fastjem.data.parameters import Parameters
from fastjem.data.views import ViewSpec
from fastjem.errors import UserError
from fastjem.kernels.augment import columns as table

LOADERS = ("auto", "dali", "dali-cpu", "memory", "torch")
SHARE = 0.65  # of the JPEG files, for a GPU's fixed-function decoder: DALI's own default
SHARES = (0.0, 0.12, 0.25, 0.5, SHARE, 0.9)  # what `tune` compares
Bad = tuple[str, str]  # (path, reason)
# (keys of a batch, heights and widths [B, 2] of its images) -> a table [B, P] of each view: kernels.augment.columns
Tables = Callable[[Sequence[Key], np.ndarray], Sequence[np.ndarray]]

_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # what ends coded pixels; 00 is a coded FF, D0 to D7 are restarts
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: Huffman-coded
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_HARMLESS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comments, applications' own


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width), the right way up, of a JPEG file whose structure is whole: 8 bits, gray or YCbCr, up to its end.

    None for everything else, of which Pillow will say whether it is an image. Nothing is decoded: some 0.1 ms. As
    strict as DALI's own parser: where that finds no marker in a header, its threads crash (2.4), while a decoder that
    fails is an error that can be caught.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, size, turned, scanned = 2, None, False, False
    while (found := _MARKER.search(data, at) if scanned else _MARKER.match(data, at)) is not None:
        kind, at = data[found.end() - 1], found.end()
        if kind == _END:
            if size is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 2**62):
                return None
            return size[::-1] if turned else size
        length = int.from_bytes(data[at : at + 2], "big")
        segment = data[at + 2 : at + length] if kind in _FRAMES or kind == _EXIF else b""
        if kind in _FRAMES:
            if size is not None or len(segment) < 6 or segment[0] != 8 or segment[5] not in (1, 3):
                return None
            size = struct.unpack(">HH", segment[1:5])
            if 0 in size:
                return None
        elif segment[:6] == b"Exif\0\0":
            turned = 5 <= _orientation(segment) <= 8
        elif kind == _SCAN and size is not None:
            scanned = True
        elif kind not in _HARMLESS:
            return None
        at += length
    return None


def _orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        return int(exif.get(0x0112, 1))
    except Exception:  # whatever is wrong with it: Pillow and DALI take such an image as it is
        return 1


@dataclass
class _Fed:
    """What DALI is given for a batch, kept until its views come out."""

    keys: Sequence[Key]
    encoded: list[np.ndarray]  # of each image: its file's bytes, or its pixels as a PPM file
    sizes: np.ndarray  # [B, 2] heights and widths
    original: np.ndarray  # [B] bool: its file's bytes
    tables: Sequence[np.ndarray]
    unreadable: list[Bad]
    windows: list[np.ndarray] = field(init=False)  # of each view the corners [B, 2] and the extents [B, 2]

    def __post_init__(self) -> None:
        columns = ([table.TOP, table.LEFT], [table.HEIGHT, table.WIDTH])
        self.windows = [np.ascontiguousarray(np.asarray(t)[:, c], dtype=np.int32) for t in self.tables for c in columns]


class DaliViews:
    """Crops of a sequence of batches, made ahead by DALI's threads.

    The windows are cut first and then resized with antialiasing, as torchvision's RandomResizedCrop does: on the CPU
    within 1 level of it for bilinear views, but for the outermost 4 pixels, where DALI repeats the edge (up to 20
    levels). A GPU's decoders have other pixels than a CPU's.

    Args:
        order: the (epoch, sample) keys of each batch; all batches at most as large as `batch`.
        tables: who draws the parameters.
        device: "cpu", or "cuda" for decoding and resizing on the current GPU.
        threads: DALI's, and as many that read files.
        prefetch: batches made ahead.
        hardware: the share of files for a GPU's fixed-function JPEG decoder, see `tune`; 0 if all pixels are to be the
            same on another GPU of this architecture.

    Raises:
        UserError: if no file of the folder can be read.
        RuntimeError: DALI's own, where it can't run; `choose` tells beforehand.
    """

    def __init__(
        self, folder: ImageFolder, specs: Sequence[ViewSpec], order: Iterable[Sequence[Key]], tables: Tables, *,
        batch: int, device: str = "cpu", threads: int = 2, prefetch: int = 2, hardware: float = SHARE,
    ):  # fmt: skip
        self.folder, self.specs, self.order, self.tables = folder, list(specs), order, tables
        self.batch, self.device, self.threads = batch, device, max(threads, 1)
        self.prefetch, self.hardware = prefetch, hardware
        self.failures = 0  # pipelines that a file broke, though it looked whole
        self.suspects: set[int] = set()  # samples that DALI isn't given again

    def __iter__(self) -> Iterator[Crops]:
        again: deque[_Fed] = deque()  # handed to a pipeline that broke
        waiting: deque[_Fed] = deque()  # handed to DALI, and not come out yet
        with ThreadPoolExecutor(self.threads) as pool:
            source = self._read_ahead(pool)

            def feed() -> tuple:
                waiting.append(again.popleft() if again else next(source))  # StopIteration is the end for DALI too
                return (waiting[-1].encoded, *waiting[-1].windows)

            pipeline = self._build(feed)
            while True:
                try:
                    outputs = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError:
                    if not any(batch.original.any() for batch in waiting):
                        raise
                    self.failures += 1
                    again = deque([*self._by_pillow(waiting), *again])
                    waiting.clear()
                    pipeline = self._build(feed)
                    continue
                batch = waiting.popleft()
                # The dynamic executor never writes again to memory that someone holds: no copy is needed.
                views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
                yield Crops(views, [torch.from_numpy(table) for table in batch.tables], batch.unreadable)

    def _build(self, feed: Callable[[], tuple]) -> Any:
        return pipeline(
            feed, self.specs, batch=self.batch, device=self.device, threads=self.threads, prefetch=self.prefetch,
            hardware=self.hardware,
        )  # fmt: skip

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[_Fed]:
        ahead: deque = deque()
        for keys in itertools.chain(self.order, itertools.repeat(None)):
            if keys is not None:
                ahead.append((keys, [pool.submit(self._read, sample) for _, sample in keys]))
            if not ahead:
                return
            if keys is None or len(ahead) > self.prefetch:
                keys, files = ahead.popleft()
                yield self._fed(keys, [file.result() for file in files])

    def _fed(self, keys: Sequence[Key], read: list) -> _Fed:
        encoded, sizes, original, bad = zip(*read, strict=True)
        sizes = np.array(sizes)
        unreadable = [one for some in bad for one in some]
        return _Fed(keys, list(encoded), sizes, np.array(original), self.tables(keys, sizes), unreadable)

    def _by_pillow(self, batches: Iterable[_Fed]) -> list[_Fed]:
        """The same batches without a file that DALI decodes: which one broke it is not in its message."""
        out, refused, whole = [], set(), set()
        for batch in batches:
            read = [self._read(sample, plain=False) for _, sample in batch.keys]
            fed = self._fed(batch.keys, read)
            fed.unreadable = list(dict.fromkeys([*batch.unreadable, *fed.unreadable]))
            out.append(fed)
            for (_, sample), (*_, bad), given in zip(batch.keys, read, batch.original, strict=True):
                if given:
                    (refused if bad else whole).add(sample)
        self.suspects |= refused or whole  # Pillow mostly refuses it too; else any of them may have been it
        return out

    def _read(self, sample: int, plain: bool = True) -> tuple[np.ndarray, tuple[int, int], bool, list[Bad]]:
        """A file's bytes, or Pillow's pixels of it; one that can't be read is replaced by the next that can."""
        plain = plain and sample not in self.suspects

        def read(at: int) -> tuple[np.ndarray, tuple[int, int], bool]:
            path = self.folder.path(at)
            with open(path, "rb") as file:
                data = file.read()
            if plain and (size := jpeg_size(data)) is not None:
                return np.frombuffer(data, np.uint8), size, True
            image = read_image(path)
            return ppm(image), (image.height, image.width), False

        found, unreadable = readable(self.folder, sample, read)
        if found is None:
            raise none_readable(unreadable)
        return *found, unreadable


def drawn(specs: Sequence[ViewSpec], seed: int) -> Tables:
    """A batch lies in one epoch."""
    parameters = Parameters(specs)
    return lambda keys, sizes: parameters(seed, keys[0][0], [sample for _, sample in keys], *sizes.T)


def ppm(image: Image.Image) -> np.ndarray:
    """8-bit RGB pixels as the bytes of a file that DALI decodes by copying."""
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)


def pipeline(
    feed: Callable[[], tuple], specs: Sequence[ViewSpec], *, batch: int, device: str = "cpu", threads: int = 2,
    prefetch: int = 2, hardware: float = SHARE,
) -> Any:  # fmt: skip
    """DALI's graph: files and windows in, a [size, size, 3] uint8 view of each spec out. A GPU is needed to run one
    for it, not to describe it."""
    from nvidia.dali import Pipeline, fn, types

    gpu = device == "cuda"
    made = Pipeline(
        batch_size=batch, num_threads=threads, device_id=torch.cuda.current_device() if gpu else None, seed=0,
        prefetch_queue_depth=prefetch, exec_dynamic=True,
    )  # fmt: skip
    with made:
        encoded, *windows = fn.external_source(source=feed, num_outputs=1 + 2 * len(specs), batch=True)
        options = {"hw_decoder_load": hardware, "jpeg_fancy_upsampling": True} if gpu else {}
        images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB, **options)
        views = []
        for spec, corner, extent in zip(specs, windows[::2], windows[1::2], strict=True):
            # cut first: a resize of a region of interest sees pixels outside of it
            cut = fn.slice(images, corner, extent, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
            kind = types.INTERP_CUBIC if spec.bicubic else types.INTERP_LINEAR
            views.append(fn.resize(cut, size=[spec.size, spec.size], interp_type=kind, antialias=True))
        made.set_outputs(*views)
    made.build()
    return made


def why_not(device: str) -> str:
    """Why DALI can't make views on "cpu" or "cuda" here: one line, or "" where it can; tried on one picture."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    picture = ppm(Image.new("RGB", (8, 8), (90, 90, 90)))
    zeros, eights = np.zeros((1, 2), np.int32), np.full((1, 2), 8, np.int32)
    try:
        (view,) = pipeline(lambda: ([picture], zeros, eights), [ViewSpec(size=4)], batch=1, device=device).run()
        if not bool((torch.from_dlpack(view.as_tensor()) == 90).all()):
            return "DALI's picture of one colour has others"
    except ImportError:
        return "DALI is not installed; pip install 'fastjem[dali]', or 'fastjem[dali-cuda12]'"
    except Exception as error:  # missing drivers come as any of several
        return " ".join(str(error).split())[:200]
    return ""


def choose(loader: str, device: torch.device | str) -> str:
    """`loader` as the user named it -> "dali", "dali-cpu", "memory" or "torch".

    "auto" is "dali" where training runs on a GPU and DALI works there, "dali-cpu" where it works on the GPU's host
    alone, else "torch". A run on the CPU takes DALI when it is named.

    Raises:
        UserError: if the one that was named can't run here, with the reason.
    """
    if loader not in LOADERS:
        raise UserError(f"--loader must be one of {', '.join(LOADERS)}, got {loader}")
    if loader in ("torch", "memory"):
        return loader
    if loader == "auto":
        if torch.device(device).type != "cuda":
            return "torch"
        return "torch" if why_not("cpu") else "dali-cpu" if why_not("cuda") else "dali"
    if why := why_not("cuda" if loader == "dali" else "cpu"):
        raise UserError(f"--loader {loader} can't run here: {why}")
    return loader


def tune(measure: Callable[[float], Iterator[Crops]], *, warm: int = 5, batches: int = 20) -> dict[float, float]:
    """Images a second by each of SHARES: `measure(share)` iterates over a `DaliViews` made with `hardware=share`.

    The best share depends on the GPU, the host's cores and the files: 0.65 is DALI's own, 0.12 NVIDIA's on hosts of 70
    cores. It changes pixels (the decoders round differently), so it is measured once and then written down.
    """
    rates = {}
    for share in (SHARES[0], *SHARES):  # the first one finds the files on the disk, the others in memory
        source = measure(share)
        for _ in range(warm):
            next(source)
        begin, images = time.perf_counter(), 0
        for crops in itertools.islice(source, batches):
            images += len(crops.views[0])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rates[share] = images / (time.perf_counter() - begin)
    return rates
