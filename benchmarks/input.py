"""Images a second from files to normalised float32 views, ours and its peers, in turns in one run.

    python benchmarks/input.py FOLDER [--case simclr dino small] [--rounds 3] [--images 192] [--out benchmarks/results]

Every variant ends in what a training step takes, [B, 3, size, size] float32, but the ceilings, which are decoding alone
and decoding and cropping alone. Start-up and the first batches, which fill queues, aren't timed. Ratios are of the best
of the rounds. Processor time is of all processes and threads of a variant, so it says on a busy machine, too, what an
image costs. The images are the folder's, for some variants stored in tar files or a table beside it first. A peer that
isn't installed (webdataset, datasets, lightly) is left out, and the page says so.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from fastjem.bench import machine
from fastjem.data.batch import finish
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.dali import DaliLoader, drawn
from fastjem.data.loaders.memory import ImageArray, MemoryLoader, middle
from fastjem.data.loaders.rgb import to_pixels
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import Source, decode, open_source, path_of
from fastjem.data.views import Views, ViewSpec
from fastjem.machine import available_cores

BATCH, WARM = 32, 2
WORKERS = available_cores()
CASES = {
    "simclr": ("SimCLR, 2 x 224", Views(large=2, recipe="simclr").specs(224)),
    "dino": ("DINO, 2 x 224 + 8 x 96", Views(large=2, small=8, recipe="dino").specs(224)),
    "small": ("SimCLR, 2 x 32, of 10,000 images of 32 x 32 in memory", Views(large=2, recipe="simclr").specs(32)),
}
SHARDS = 4  # tar files
PEERS = ("torchvision", "pillow", "lightly", "webdataset", "datasets")


@dataclass(frozen=True)
class Data:
    """The same images in several ways."""

    folder: Source
    tars: list[str]
    table: str  # "" without pyarrow

    @classmethod
    def stored(cls, folder: Source, root: Path) -> "Data":
        files = [folder.read(i) for i in range(len(folder))]
        tars = [str(root / f"{shard:06}.tar") for shard in range(SHARDS)]
        for shard, path in enumerate(tars):
            with tarfile.open(path, "w") as archive:
                for i in range(shard, len(files), SHARDS):
                    member = tarfile.TarInfo(f"{i:06}.jpg")
                    member.size = len(files[i])
                    archive.addfile(member, io.BytesIO(files[i]))
        if importlib.util.find_spec("pyarrow") is None:
            return cls(folder, tars, "")
        import pyarrow
        from pyarrow import parquet

        rows = [{"bytes": data, "path": folder.name(i)} for i, data in enumerate(files)]
        parquet.write_table(pyarrow.table({"image": rows}), root / "images.parquet")
        return cls(folder, tars, str(root / "images.parquet"))


Variant = Callable[[Data, list[ViewSpec]], Iterator[int]]  # yields the images of each batch


def keys(folder: Source) -> Iterator[list[tuple[int, int]]]:
    """Endless batches in random order; an epoch is as long as the benchmark."""
    random = np.random.default_rng(0)
    samples = itertools.chain.from_iterable(random.permutation(len(folder)).tolist() for _ in itertools.count())
    while True:
        yield [(0, sample) for sample in itertools.islice(samples, BATCH)]


def ours(data: Data, specs: list[ViewSpec], *, colour: bool = True) -> Iterator[int]:
    folder = data.folder
    for crops in DaliLoader(folder, specs, keys(folder), drawn(specs, 0), batch=BATCH, threads=WORKERS):
        if colour:
            finish(crops, specs, "cpu")
        yield len(crops.views[0])


def ceiling(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    return ours(data, specs, colour=False)


def ours_torch(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    return by_torch(data.folder, specs)


def ours_tar(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    return by_torch(open_source(os.path.dirname(data.tars[0]) + "/*.tar"), specs)


def ours_table(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    if not data.table:
        raise ModuleNotFoundError("pyarrow")
    return by_torch(open_source(data.table), specs)


def by_torch(source: Source, specs: list[ViewSpec]) -> Iterator[int]:
    order = Order(samples=len(source), batch=BATCH, stop=10**6)
    batches = iter(TorchLoader(source, specs, order, Budget(workers=WORKERS)))
    try:
        for crops in batches:
            finish(crops, specs, "cpu")
            yield len(crops.views[0])
    finally:
        batches.close()  # type: ignore[attr-defined]


def decoding(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    """The torch loader's decoder, and nothing else."""
    sizes = Transformed(data.folder, lambda image: torch.tensor(image.size), raw=True)
    for each in DataLoader(sizes, BATCH, num_workers=WORKERS):
        yield len(each)


def dali_alone(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    """As well as DALI does it by itself: decoded once, windows of the blur as its sigma asks for. Its jitter isn't
    torchvision's (fixed order, hue in YIQ, contrast around the middle)."""
    from nvidia.dali import fn, pipeline_def, types

    paths = [path_of(data.folder, i) for i in range(len(data.folder))]
    factors = [[[max(1 - x, 0.0), 1 + x] for x in spec.jitter[:3]] for spec in specs]

    @pipeline_def(
        batch_size=BATCH, num_threads=WORKERS, device_id=None, seed=0, enable_conditionals=True, exec_dynamic=True
    )
    def graph():
        encoded, _ = fn.readers.file(files=paths, random_shuffle=True)
        images = fn.decoders.image(encoded, output_type=types.RGB)
        out = []
        for spec, (brightness, contrast, saturation) in zip(specs, factors):  # noqa: B905 (DALI's zip knows no strict)
            kind = types.INTERP_CUBIC if spec.bicubic else types.INTERP_LINEAR
            x = fn.random_resized_crop(
                images, size=[spec.size, spec.size], random_area=spec.scale, interp_type=kind, antialias=True
            )
            b, c, s = (
                fn.random.uniform(range=brightness),
                fn.random.uniform(range=contrast),
                fn.random.uniform(range=saturation),
            )
            hue = fn.random.uniform(range=[-360 * spec.jitter[3], 360 * spec.jitter[3]])
            if fn.random.coin_flip(probability=spec.jitter_probability, dtype=types.BOOL):
                x = fn.color_twist(x, brightness=b, contrast=c, saturation=s, hue=hue)
            if fn.random.coin_flip(probability=spec.grayscale, dtype=types.BOOL):
                gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
                x = fn.cat(gray, gray, gray, axis=2)
            if fn.random.coin_flip(probability=spec.blur, dtype=types.BOOL):
                x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=list(spec.sigma)))
            if spec.solarize > 0:  # noqa: SIM102 (the second is DALI's, per image)
                if fn.random.coin_flip(probability=spec.solarize, dtype=types.BOOL):
                    x = fn.lookup_table(x, keys=list(range(256)), values=SOLARIZED, dtype=types.UINT8)
            x = fn.crop_mirror_normalize(
                x, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(probability=spec.flip),
                mean=[255 * m for m in spec.mean], std=[255 * d for d in spec.std],
            )  # fmt: skip
            out.append(x)
        return tuple(out)

    pipe = graph()
    pipe.build()
    while True:
        views = [torch.from_dlpack(view.as_tensor()) for view in pipe.run()]
        yield len(views[0])


SOLARIZED = [v if v < 128 else 255 - v for v in range(256)]


@dataclass
class Transformed(Dataset):
    """Files in random order through somebody's transform: a list of views."""

    folder: Source
    transform: Callable
    raw: bool = False  # the transform is of the pixels as the torch loader has them

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        sample = int(np.random.default_rng(i).integers(len(self.folder)))
        if self.raw:
            return self.transform(to_pixels(self.folder.read(sample)))
        return self.transform(Image.open(path_of(self.folder, sample)).convert("RGB"))


def loaded(dataset: Dataset, batch: int = BATCH, **options) -> Iterator[int]:
    for views in DataLoader(dataset, batch, num_workers=WORKERS, **options):
        yield len(views[0])


def lightly(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    from lightly.transforms import DINOTransform, SimCLRTransform

    small = sum(spec.size < 224 for spec in specs)
    transform = DINOTransform(n_local_views=small) if small else SimCLRTransform(input_size=224)
    return loaded(Transformed(data.folder, transform))


def transform_of(specs: list[ViewSpec]) -> Callable:
    """torchvision's transforms of one PIL image: a list of views."""
    from torchvision.transforms import InterpolationMode, v2

    def transform(spec: ViewSpec) -> v2.Compose:
        mode = InterpolationMode.BICUBIC if spec.bicubic else InterpolationMode.BILINEAR
        window = spec.size // 20 * 2 + 1
        return v2.Compose([
            v2.RandomResizedCrop(spec.size, spec.scale, interpolation=mode, antialias=True),
            v2.RandomHorizontalFlip(spec.flip),
            v2.RandomApply([v2.ColorJitter(*spec.jitter)], spec.jitter_probability),
            v2.RandomGrayscale(spec.grayscale),
            v2.RandomApply([v2.GaussianBlur(window, spec.sigma)], spec.blur),
            v2.RandomSolarize(128, spec.solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ])  # fmt: skip

    each = [transform(spec) for spec in specs]
    return lambda image: [one(v2.functional.to_image(image)) for one in each]


def torchvision(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    return loaded(Transformed(data.folder, transform_of(specs)))


def webdataset(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    """torchvision's transforms, fed from tar files."""
    import webdataset as wds

    transform = transform_of(specs)
    stream = wds.WebDataset(data.tars, resampled=True, shardshuffle=False, nodesplitter=wds.split_by_node)
    return loaded(stream.shuffle(100).decode("pilrgb").to_tuple("jpg").map_tuple(transform).map(lambda one: one[0]))


def hugging_face(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    """torchvision's transforms, fed from a table that is mapped into memory."""
    import datasets

    transform = transform_of(specs)
    with tempfile.TemporaryDirectory() as cache:
        table = datasets.Dataset.from_parquet(data.table, cache_dir=cache).cast_column("image", datasets.Image())
        table.set_transform(lambda rows: {"views": [transform(image.convert("RGB")) for image in rows["image"]]})
        sampler = RandomSampler(table, replacement=True, num_samples=10**6)
        yield from loaded(table, sampler=sampler, collate_fn=_views_of_rows)


def _views_of_rows(rows: list[dict]) -> list[torch.Tensor]:
    return default_collate([row["views"] for row in rows])


def small_images(folder: Source) -> torch.Tensor:
    """[10000, 32, 32, 3] uint8, the folder's in turn."""
    found = torch.stack([torch.from_numpy(middle(decode(folder, i), 32).copy()) for i in range(len(folder))])
    return found.repeat(-(-10_000 // len(found)), 1, 1, 1)[:10_000]


def ours_memory(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    array = ImageArray(small_images(data.folder))
    for crops in MemoryLoader(array, specs, Order(samples=len(array), batch=512, stop=10**6)):
        finish(crops, specs, "cpu")
        yield len(crops.views[0])


@dataclass
class Arrays(Dataset):
    """Images in memory through somebody's transform."""

    images: np.ndarray
    transform: Callable

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return self.transform(Image.fromarray(self.images[i * 7919 % len(self.images)]))


def torchvision_memory(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    return loaded(Arrays(small_images(data.folder).numpy(), transform_of(specs)), 512)


def lightly_memory(data: Data, specs: list[ViewSpec]) -> Iterator[int]:
    from lightly.transforms import SimCLRTransform

    return loaded(Arrays(small_images(data.folder).numpy(), SimCLRTransform(input_size=32, gaussian_blur=0.0)), 512)


OURS = "ours, torch"
VARIANTS: dict[str, Variant] = {
    OURS: ours_torch,
    "ours, torch, from tar files": ours_tar,
    "ours, torch, from a table": ours_table,
    "ours, DALI on the CPU": ours,
    "DALI alone": dali_alone,
    "lightly, DataLoader": lightly,
    "torchvision v2, DataLoader": torchvision,
    "webdataset, torchvision v2": webdataset,
    "Hugging Face datasets, torchvision v2": hugging_face,
    "decode and crops alone, DALI": ceiling,
    "decode alone, as ours, torch": decoding,
}
IN_MEMORY: dict[str, Variant] = {
    "ours, memory": ours_memory,
    "lightly, DataLoader": lightly_memory,
    "torchvision v2, DataLoader": torchvision_memory,
}


@dataclass(frozen=True)
class Rate:
    images: float  # a second
    cpu: float  # seconds of processor time an image, over all processes; 0 where the system doesn't tell


def rate(variant: Variant, data: Data, specs: list[ViewSpec], images: int) -> Rate:
    """Once queues are full."""
    batches = variant(data, specs)
    for _ in range(WARM):
        next(batches)
    seen = 0
    cpu = processor_time()
    begin = time.perf_counter()
    while seen < images:
        seen += next(batches)
    seconds = time.perf_counter() - begin
    cpu = processor_time() - cpu
    batches.close()  # its workers end here
    return Rate(seen / seconds, cpu / seen)


def processor_time() -> float:
    """Seconds of this process and all below it that are alive, by Linux' /proc."""
    found: dict[int, tuple[int, float]] = {}  # process -> its parent, seconds
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            found[int(path.parent.name)] = (
                int(fields[1]),
                (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            )
    total = 0.0
    for process in found:
        at = process
        while at in found and at != os.getpid():
            at = found[at][0]
        total += found[process][1] if at == os.getpid() else 0.0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=192, help="a variant and round; of small ones 50 times as many")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        os.environ["FASTJEM_CACHE"] = root  # of tables' copies
        data = Data.stored(open_source(arguments.folder), Path(root))
        for case in arguments.case:
            measure(case, data, arguments)


def measure(case: str, data: Data, arguments: argparse.Namespace) -> None:
    title, specs = CASES[case]
    described = machine.describe(torch.device("cpu")) | machine.now() | {"load_before": os.getloadavg()[0]}
    described["versions"] |= {name: metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}
    variants = IN_MEMORY if case == "small" else VARIANTS
    images = arguments.images * (50 if case == "small" else 1)
    rates: dict[str, list[Rate]] = {name: [] for name in variants}
    absent: dict[str, str] = {}
    for turn in range(arguments.rounds):
        shift = turn % len(variants)
        for name in [*variants][shift:] + [*variants][:shift]:
            if name in absent:
                continue
            try:
                rates[name].append(rate(variants[name], data, specs, images))
            except ModuleNotFoundError as error:
                absent[name] = f"{error.name or error} isn't installed"
                continue
            found = rates[name][-1]
            told = f"{found.images:.0f} images/s, {found.cpu * 1e3:.2f} ms of processor time an image"
            print(f"{case}, round {turn + 1}: {name}: {told}", file=sys.stderr, flush=True)
    facts = (
        f"{len(data.folder)} files of {Path(data.folder.root).name}, {WORKERS} cores, {described['cpu']}; "
        f"{arguments.rounds} rounds of {images} images a variant, in turns. Load average before the run: "
        f"{described['load_before']:.1f}. "
        + ", ".join(f"{name} {described['versions'][name]}" for name in PEERS if name in described["versions"])
    )
    page = "\n".join([f"# Input: {title}\n", f"{facts}.\n", *table(rates, absent)]) + "\n"
    print(page, flush=True)
    if arguments.out:
        file = f"input-{case}-{machine.slug(described)}"
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{file}.md").write_text(page)
        kept = {name: [asdict(one) for one in each] for name, each in rates.items()}
        (arguments.out / f"{file}.json").write_text(json.dumps({"machine": described, "rates": kept}, indent=1))


def table(rates: dict[str, list[Rate]], absent: dict[str, str]) -> Iterator[str]:
    """Its lines; the first variant is ours, with which the others are compared."""
    first = next(iter(rates.values()))
    fastest = max(one.images for one in first)
    middle = float(np.median([one.images for one in first]))
    yield "| | images/s, best | median | ms of processor time each | ours is so many times as fast, by best (median) |"
    yield "|---|---|---|---|---|"
    for name, each in rates.items():
        if name in absent:
            yield f"| {name} | {absent[name]} | | | |"
            continue
        best = max(one.images for one in each)
        median = float(np.median([one.images for one in each]))
        cpu = min(one.cpu for one in each) * 1e3
        yield (f"| {name} | {best:.0f} | {median:.0f} | {cpu:.2f} | {fastest / best:.2f}x ({middle / median:.2f}) |")


if __name__ == "__main__":
    main()
