"""Images a second from a folder of JPEG files to normalised float32 views, ours and its peers, in turns in one run.

    python benchmarks/input.py FOLDER [--case simclr dino] [--rounds 3] [--images 192] [--out benchmarks/results]

Every variant ends in what a training step takes, [B, 3, size, size] float32, but the ceiling, which is decoding and
cropping alone. Start-up and the first batches, which fill queues, aren't timed. Ratios are of the best of the rounds.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastjem.bench import machine
from fastjem.data.batch import finish
from fastjem.data.loaders import Budget, Order
from fastjem.data.loaders.dali import DaliLoader, drawn
from fastjem.data.loaders.torch import TorchLoader
from fastjem.data.source import Source, open_source, path_of
from fastjem.data.views import Views, ViewSpec
from fastjem.machine import available_cores

BATCH, WARM = 32, 2
WORKERS = available_cores()
CASES = {
    "simclr": ("SimCLR, 2 x 224", Views(large=2, recipe="simclr")),
    "dino": ("DINO, 2 x 224 + 8 x 96", Views(large=2, small=8, recipe="dino")),
}
Variant = Callable[[Source, list[ViewSpec]], Iterator[int]]  # yields the images of each batch


def keys(folder: Source) -> Iterator[list[tuple[int, int]]]:
    """Endless batches in random order; an epoch is as long as the benchmark."""
    random = np.random.default_rng(0)
    samples = itertools.chain.from_iterable(random.permutation(len(folder)).tolist() for _ in itertools.count())
    while True:
        yield [(0, sample) for sample in itertools.islice(samples, BATCH)]


def ours(folder: Source, specs: list[ViewSpec], *, colour: bool = True) -> Iterator[int]:
    for crops in DaliLoader(folder, specs, keys(folder), drawn(specs, 0), batch=BATCH, threads=WORKERS):
        if colour:
            finish(crops, specs, "cpu")
        yield len(crops.views[0])


def ceiling(folder: Source, specs: list[ViewSpec]) -> Iterator[int]:
    return ours(folder, specs, colour=False)


def ours_torch(folder: Source, specs: list[ViewSpec]) -> Iterator[int]:
    order = Order(samples=len(folder), batch=BATCH, stop=10**6)
    for crops in TorchLoader(folder, specs, order, Budget(workers=WORKERS)):
        finish(crops, specs, "cpu")
        yield len(crops.views[0])


def dali_alone(folder: Source, specs: list[ViewSpec]) -> Iterator[int]:
    """As well as DALI does it by itself: decoded once, windows of the blur as its sigma asks for. Its jitter isn't
    torchvision's (fixed order, hue in YIQ, contrast around the middle)."""
    from nvidia.dali import fn, pipeline_def, types

    paths = [path_of(folder, i) for i in range(len(folder))]
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

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        sample = np.random.default_rng(i).integers(len(self.folder))
        return self.transform(Image.open(path_of(self.folder, sample)).convert("RGB"))


def loaded(folder: Source, transform: Callable) -> Iterator[int]:
    for views in DataLoader(Transformed(folder, transform), BATCH, num_workers=WORKERS):
        yield len(views[0])


def lightly(folder: Source, specs: list[ViewSpec]) -> Iterator[int]:
    from lightly.transforms import DINOTransform, SimCLRTransform

    small = sum(spec.size < 224 for spec in specs)
    return loaded(folder, DINOTransform(n_local_views=small) if small else SimCLRTransform(input_size=224))


def torchvision(folder: Source, specs: list[ViewSpec]) -> Iterator[int]:
    from torchvision.transforms import InterpolationMode, v2

    def transform(spec: ViewSpec) -> v2.Compose:
        mode = InterpolationMode.BICUBIC if spec.bicubic else InterpolationMode.BILINEAR
        window = 23 if spec.size == 224 else 9
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
    return loaded(folder, lambda image: [one(v2.functional.to_image(image)) for one in each])


VARIANTS: dict[str, Variant] = {
    "ours, DALI on the CPU": ours,
    "ours, torch": ours_torch,
    "DALI alone": dali_alone,
    "lightly, DataLoader": lightly,
    "torchvision v2, DataLoader": torchvision,
    "decode and crops alone": ceiling,
}


def rate(variant: Variant, folder: Source, specs: list[ViewSpec], images: int) -> float:
    """Images a second once queues are full."""
    batches = variant(folder, specs)
    for _ in range(WARM):
        next(batches)
    seen = 0
    begin = time.perf_counter()
    while seen < images:
        seen += next(batches)
    seconds = time.perf_counter() - begin
    batches.close()  # its workers end here
    return seen / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = open_source(arguments.folder)
    described = machine.describe(torch.device("cpu")) | machine.now() | {"load_before": os.getloadavg()[0]}
    for case in arguments.case:
        title, views = CASES[case]
        specs = views.specs(224)
        rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for turn in range(arguments.rounds):
            order = list(VARIANTS)[turn:] + list(VARIANTS)[:turn]
            for name in order:
                rates[name].append(rate(VARIANTS[name], folder, specs, arguments.images))
                print(f"{case}, round {turn + 1}: {name}: {rates[name][-1]:.0f} images/s", file=sys.stderr, flush=True)
        best = {name: max(each) for name, each in rates.items()}
        base = best["ours, DALI on the CPU"]
        lines = []
        for name, each in rates.items():
            ratio = np.median(rates["ours, DALI on the CPU"]) / np.median(each)
            lines.append(
                f"| {name} | {best[name]:.0f} | {np.median(each):.0f} | {base / best[name]:.2f}x ({ratio:.2f}) |"
            )
        page = [
            f"# Input: {title}\n",
            f"{len(folder)} files of {Path(folder.root).name}, batches of {BATCH}, {WORKERS} cores, "
            f"{described['cpu']}; {arguments.rounds} rounds of {arguments.images} images a variant, in turns. "
            f"Load average before the run: {described['load_before']:.1f}.\n",
            "| | images/s, best | median | ours is so many times as fast, by best (median) |",
            "|---|---|---|---|",
            *lines,
        ]
        print("\n".join(page), flush=True)
        if arguments.out:
            file = f"input-{case}-{machine.slug(described)}"
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"{file}.md").write_text("\n".join(page) + "\n")
            (arguments.out / f"{file}.json").write_text(json.dumps({"machine": described, "rates": rates}, indent=1))


if __name__ == "__main__":
    main()
