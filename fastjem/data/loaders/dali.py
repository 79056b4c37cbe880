"""Crops by DALI: each image is decoded once, every view's window is cut and resized, on the GPU or the CPU.

DALI decides nothing here: the order, the windows and what is done about a broken file are ours, so that a run sees the
same crops whoever executes them. A file that DALI can't decode would end its pipeline; so each file's structure is read
first, and all but plain JPEG files are decoded by Pillow and handed over as pixels. Images that are read as float32
(`Levels.floats`) are all handed over as arrays, which nothing decodes.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastjem.data.batch import Crops
from fastjem.data.loaders import ahead
from fastjem.data.loaders.jpeg import jpeg_size
from fastjem.data.loaders.memory import holds_floats
from fastjem.data.loaders.protocol import Budget, Key, Order, labels_of, mask_keys
from fastjem.data.parameters import Parameters, column
from fastjem.data.picture import Bands, to_image
from fastjem.data.size import height_and_width
from fastjem.data.source import Source, read_or_next, rule_of
from fastjem.data.upload import pinned, uploaded
from fastjem.data.views import ViewSpec

DECODER_SHARE = 0.65  # of the JPEG files, for a GPU's fixed-function decoder: DALI's own default
DECODER_SHARES = (0.0, 0.12, 0.25, 0.5, DECODER_SHARE, 0.9)  # what `measure_shares` compares
LONG_ENOUGH = 1000  # batches of a run in which measuring the decoder's share is worth the time
# (keys of a batch, heights and widths [B, 2] of its images) -> a table [B, P] of each view
Tables = Callable[[Sequence[Key], np.ndarray], Sequence[np.ndarray]]


class _Encoded(NamedTuple):
    """One image as DALI is given it."""

    sample: int  # the image that was really read
    data: np.ndarray  # [bytes] uint8: its file's, or its pixels as a PPM file; of floats [H, W, C] float32
    size: tuple[int, int]  # height and width
    original: bool  # the file's own bytes, which DALI decodes
    unreadable: list[tuple[str, str]]  # (path, reason) of images before it that can't be read


@dataclass
class _EncodedBatch:
    """What DALI is given for a batch, kept until its views come out."""

    keys: Sequence[Key]
    images: list[_Encoded]
    tables: Sequence[np.ndarray]  # V x [B, P]
    unreadable: list[tuple[str, str]]
    windows: list[np.ndarray] = field(init=False)  # of each view the corners [B, 2] and the extents [B, 2]

    def __post_init__(self) -> None:
        self.windows = [
            np.ascontiguousarray(table[:, columns], dtype=np.int32)
            for table in self.tables
            for columns in ([column.TOP, column.LEFT], [column.HEIGHT, column.WIDTH])
        ]

    def crops(self, views: list[torch.Tensor], source: Source) -> Crops:
        index = [image.sample for image in self.images]
        tables = [torch.from_numpy(table) for table in self.tables]
        keys = mask_keys(index, [sample for _, sample in self.keys], len(source))
        labels = labels_of(source, index)
        return Crops(views, tables, torch.tensor(index), self.keys[0][0], labels, self.unreadable, keys)


class DaliLoader:
    """Crops of a sequence of batches, made ahead by DALI's threads.

    The windows are cut first and then resized with antialiasing, as torchvision's RandomResizedCrop does: on the CPU
    within 1 level of it for bilinear views (of float32 images 0.02 levels), but for the outermost 4 pixels, where DALI
    repeats the edge (up to 20 levels). A GPU's decoders have other pixels than a CPU's.

    Args:
        order: the (epoch, sample) keys of each batch; all batches at most as large as `batch`.
        tables: who draws the parameters.
        device: "cpu", or "cuda" for decoding and resizing on the current GPU.
        threads: DALI's, and as many that read files.
        prefetch: batches made ahead.
        decoder_share: of the JPEG files, for a GPU's fixed-function decoder, see `measure_shares`; 0 if all pixels are
            to be the same on another GPU of this architecture.
        wanted_on: where batches go, those that the CPU makes too; None: they stay on `device`.

    Raises:
        UserError: if no image of the source can be read.
        RuntimeError: DALI's own, where it can't run; `why_not` tells beforehand.
    """

    def __init__(
        self, source: Source, specs: Sequence[ViewSpec], order: Iterable[Sequence[Key]], tables: Tables, *,
        batch: int, device: str = "cpu", threads: int = 2, prefetch: int = 2, decoder_share: float = DECODER_SHARE,
        wanted_on: torch.device | None = None,
    ):  # fmt: skip
        self.source = source
        self.specs = list(specs)
        self.order = order
        self.tables = tables
        self.batch = batch
        self.device = device
        self.threads = max(threads, 1)
        self.prefetch = prefetch
        self.decoder_share: float | None = decoder_share
        self.wanted_on = torch.device(device) if wanted_on is None else wanted_on
        self.floats = holds_floats(source)
        where = "GPU" if device == "cuda" else "CPU"
        self.reads = f"images are decoded by DALI on the {where}"
        if self.floats:
            self.reads = f"images are decoded by Pillow, and cut and resized by DALI on the {where}"
        self.failures = 0  # pipelines that a file broke, though it looked whole
        self.suspects: set[int] = set()  # samples that DALI isn't given again

    def __iter__(self) -> Iterator[Crops]:
        ahead.begins(self.source, self.order)
        batches = ahead.followed(self._batches(), self.source, self.order)
        if self.device == "cpu":
            batches = pinned(batches, self.wanted_on)
        return uploaded(batches, self.wanted_on)  # of a GPU's own views tables, index and labels

    def _batches(self) -> Iterator[Crops]:
        again: deque[_EncodedBatch] = deque()  # handed to a pipeline that broke
        waiting: deque[_EncodedBatch] = deque()  # handed to DALI, and not come out yet
        with ThreadPoolExecutor(self.threads) as pool:
            encoded = self._read_ahead(pool)

            def feed() -> tuple:
                waiting.append(again.popleft() if again else next(encoded))  # StopIteration is the end for DALI too
                return ([image.data for image in waiting[-1].images], *waiting[-1].windows)

            pipeline = self._build(feed)
            while True:
                try:
                    outputs = pipeline.run(stream_of(self.device))
                except StopIteration:
                    return
                except RuntimeError:
                    if not any(image.original for batch in waiting for image in batch.images):
                        raise
                    self.failures += 1
                    again = deque([*self._by_pillow(waiting), *again])
                    waiting.clear()
                    pipeline = self._build(feed)
                    continue
                # The dynamic executor never writes again to memory that someone holds: no copy is needed.
                views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
                yield waiting.popleft().crops(views, self.source)

    def at(self, specs: Sequence[ViewSpec], order: Order) -> "DaliLoader":
        loader = DaliLoader(
            self.source, specs, order, drawn(specs, order.seed), batch=self.batch, device=self.device,
            threads=self.threads, prefetch=self.prefetch, decoder_share=self.decoder_share or 0.0,
            wanted_on=self.wanted_on,
        )  # fmt: skip
        loader.suspects = self.suspects  # one set: what one of them finds the others needn't
        return loader

    def _build(self, feed: Callable[[], tuple]) -> Any:
        return build_pipeline(
            feed, self.specs, batch=self.batch, device=self.device, threads=self.threads, prefetch=self.prefetch,
            decoder_share=self.decoder_share, floats=self.floats,
        )  # fmt: skip

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[_EncodedBatch]:
        """The batches in their order, each read by the pool while those before it are used."""
        reading: deque = deque()
        for keys in self.order:
            reading.append((keys, [pool.submit(self._read, sample) for _, sample in keys]))
            if len(reading) > self.prefetch:
                yield self._gathered(*reading.popleft())
        while reading:
            yield self._gathered(*reading.popleft())

    def _gathered(self, keys: Sequence[Key], images: Sequence[Any]) -> _EncodedBatch:
        return self._encoded_batch(keys, [image.result() for image in images])

    def _encoded_batch(self, keys: Sequence[Key], images: list[_Encoded]) -> _EncodedBatch:
        sizes = np.array([image.size for image in images])
        unreadable = [one for image in images for one in image.unreadable]
        return _EncodedBatch(keys, images, self.tables(keys, sizes), unreadable)

    def _by_pillow(self, batches: Iterable[_EncodedBatch]) -> list[_EncodedBatch]:
        """The same batches without a file that DALI decodes: which one broke it is not in its message."""
        out = []
        refused: set[int] = set()  # samples that DALI was to decode, and Pillow can't
        whole: set[int] = set()  # those that Pillow can
        for batch in batches:
            images = [self._read(sample, by_dali=False) for _, sample in batch.keys]
            decoded = self._encoded_batch(batch.keys, images)
            decoded.unreadable = list(dict.fromkeys([*batch.unreadable, *decoded.unreadable]))
            out.append(decoded)
            for (_, sample), image, given in zip(batch.keys, images, batch.images, strict=True):
                if given.original:
                    (refused if image.unreadable else whole).add(sample)
        self.suspects |= refused or whole  # Pillow mostly refuses it too; else any of them may have been it
        return out

    def _read(self, sample: int, by_dali: bool = True) -> _Encoded:
        """An image's bytes, or Pillow's pixels of it; one that can't be read is replaced by the next that can."""
        rule = rule_of(self.source)
        by_dali = by_dali and sample not in self.suspects and (rule is None or rule.plain)

        def read(at: int) -> tuple[np.ndarray, tuple[int, int], bool]:
            data = self.source.read(at)
            if by_dali and isinstance(data, bytes) and (size := jpeg_size(data)) is not None:
                return np.frombuffer(data, np.uint8), size, True
            image = to_image(data, rule)
            pixels = np.ascontiguousarray(image) if isinstance(image, Bands) else ppm(image)
            return pixels, (image.height, image.width), False

        found = read_or_next(self.source, sample, read)
        return _Encoded(found.sample, *found.value, found.unreadable)


def stream_of(device: str) -> Any:
    """What DALI's outputs are ordered on: torch's current stream of a GPU, where without one DALI would keep the host
    waiting for each batch; None on the CPU."""
    return torch.cuda.current_stream() if device == "cuda" else None


def ppm(image: Image.Image) -> np.ndarray:
    """8-bit RGB pixels as the bytes of a file that DALI decodes by copying."""
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)


def build_pipeline(
    feed: Callable[[], tuple], specs: Sequence[ViewSpec], *, batch: int, device: str = "cpu", threads: int = 2,
    prefetch: int = 2, decoder_share: float | None = DECODER_SHARE, floats: bool = False,
) -> Any:  # fmt: skip
    """DALI's graph: files and windows in, a [H, W, 3] uint8 view of each spec out; with `floats` images [H, W, C]
    float32 in and views [H, W, C] float32 out.

    One for the GPU can be described without a GPU, but not run.
    """
    from nvidia.dali import Pipeline, fn
    from nvidia.dali import types as dali_types

    types: Any = dali_types  # its names are made when it is loaded: no type checker sees them
    gpu = device == "cuda"
    pipeline = Pipeline(
        batch_size=batch, num_threads=threads, device_id=torch.cuda.current_device() if gpu else None, seed=0,
        prefetch_queue_depth=prefetch, exec_dynamic=True,
    )  # fmt: skip
    with pipeline:
        given, *windows = fn.external_source(source=feed, num_outputs=1 + 2 * len(specs), batch=True)
        if floats:
            images = fn.reshape(given, layout="HWC")
            images = images.gpu() if gpu else images
        else:
            options = {"hw_decoder_load": decoder_share, "jpeg_fancy_upsampling": True} if gpu else {}
            images = fn.decoders.image(given, device="mixed" if gpu else "cpu", output_type=types.RGB, **options)
        views = []
        for spec, corner, extent in zip(specs, windows[::2], windows[1::2], strict=True):
            # cut first: a resize of a region of interest sees pixels outside of it
            cut = fn.slice(images, corner, extent, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
            kind = types.INTERP_CUBIC if spec.bicubic else types.INTERP_LINEAR
            views.append(fn.resize(cut, size=list(height_and_width(spec.size)), interp_type=kind, antialias=True))
        pipeline.set_outputs(*views)
    pipeline.build()
    return pipeline


def why_not(device: str) -> str:
    """Why DALI can't make views on "cpu" or "cuda" here: one line, or "" where it can; tried on one picture."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    picture = ppm(Image.new("RGB", (8, 8), (90, 90, 90)))
    corner = np.zeros((1, 2), np.int32)
    extent = np.full((1, 2), 8, np.int32)
    try:
        (view,) = build_pipeline(lambda: ([picture], corner, extent), [ViewSpec(size=4)], batch=1, device=device).run()
        if not bool((torch.from_dlpack(view.as_tensor()) == 90).all()):
            return "DALI's picture of one colour has others"
    except ImportError:
        return "DALI is not installed; pip install 'fastjem[dali]', or 'fastjem[dali-cuda12]'"
    except Exception as error:  # missing drivers come as any of several
        return " ".join(str(error).split())[:200]
    return ""


def best(device: torch.device | str) -> str:
    """Which loader decodes files best for a run on that device: "dali", "dali-cpu" or "torch"."""
    if torch.device(device).type != "cuda":
        return "torch"
    if why_not("cpu"):
        return "torch"
    return "dali-cpu" if why_not("cuda") else "dali"


def measure_shares(
    measure: Callable[[float], Iterator[Crops]], *, warm: int = 5, batches: int = 20
) -> dict[float, float]:
    """Images a second by each of DECODER_SHARES; `measure(share)` iterates over a `DaliLoader` with that share.

    The best share depends on the GPU, the host's cores and the files: 0.65 is DALI's own, 0.12 NVIDIA's on hosts of 70
    cores. It changes pixels (the decoders round differently), so it is measured once and then written down.
    """
    rates = {}
    for share in (DECODER_SHARES[0], *DECODER_SHARES):  # the first finds the files on the disk, the others in memory
        loaded = measure(share)
        for _ in range(warm):
            next(loaded)
        images = 0
        begin = time.perf_counter()
        for crops in itertools.islice(loaded, batches):
            images += len(crops.views[0])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rates[share] = images / (time.perf_counter() - begin)
    return rates


def drawn(specs: Sequence[ViewSpec], seed: int) -> Tables:
    """The parameters that every loader takes."""
    parameters = Parameters(specs)

    def tables(keys: Sequence[Key], sizes: np.ndarray) -> list[np.ndarray]:
        epoch = keys[0][0]  # a batch lies in one epoch
        heights, widths = sizes.T
        return list(parameters(seed, epoch, [sample for _, sample in keys], heights, widths))

    return tables


def on_cpu(source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget) -> DaliLoader:
    """Decoding and resizing by DALI's threads."""
    return _loader(source, specs, order, budget, "cpu", 0.0)


def on_gpu(source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget) -> DaliLoader:
    """Decoding and resizing on the current GPU. If the budget has no decoder share, the fastest is measured, where the
    run is long enough for that to be worth it; else it is DALI's own.
    """
    share, measured = budget.decoder_share, ""
    if holds_floats(source):  # none of its files is decoded by DALI
        return _loader(source, specs, order, budget, "cuda", share or 0.0)
    if share is None and len(order) >= LONG_ENOUGH:
        rates = measure_shares(lambda share: iter(_loader(source, specs, order, budget, "cuda", share)))
        share = budget.agree(max(rates, key=rates.__getitem__))
        by_share = ", ".join(f"{tried:g}: {rate:.0f}" for tried, rate in rates.items())
        measured = f"; images a second by share: {by_share}"
    if share is None:
        share = DECODER_SHARE
    loader = _loader(source, specs, order, budget, "cuda", share)
    loader.reads += f", {share:.0%} of JPEG files by its fixed-function decoder{measured}"
    return loader


def _loader(
    source: Source, specs: Sequence[ViewSpec], order: Order, budget: Budget, device: str, share: float
) -> DaliLoader:
    return DaliLoader(
        source, specs, order, drawn(specs, order.seed), batch=order.of_rank, device=device, threads=budget.workers,
        decoder_share=share, wanted_on=budget.device,
    )  # fmt: skip
