"""`fastjem check-data DATA`: every image is opened and decoded before a run has to."""

import collections
import concurrent.futures
import hashlib
import json
import os
import sys
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fastjem import fields
from fastjem.data.files import ORIENTATION, TIFF, open_image, stored
from fastjem.data.levels import Levels, Survey, describe, levels_of, parsed_range, survey
from fastjem.data.picture import to_image
from fastjem.data.size import Size, as_given, height_and_width, written
from fastjem.data.source import Levelled, Source, open_source, path_of, reason, rule_of
from fastjem.data.sources import naming
from fastjem.data.stages import Sizes
from fastjem.errors import UserError
from fastjem.machine import available_cores
from fastjem.printing import is_terminal, printable, say

MEASURED = 256  # files whose crops are timed; decoding is timed on all


@dataclass
class CheckDataOptions:
    """What training would make of images: files that would be skipped and why, sizes, counts, time of an epoch."""

    data: str = field(metadata={"help": "images, as --data of pretrain", "positional": True, "path": True})
    views: int = field(default=2, metadata={"help": "of an image, for the expected time"})
    image_size: int | str = field(
        default=224,
        metadata={
            "help": "of a view; smaller images are counted; of several, the last",
            "sides": True,
            "metavar": "PIXELS",
        },
    )
    channels: int = field(default=3, metadata={"help": "as of pretrain"})
    value_range: str = field(default="auto", metadata={"help": "as of pretrain"})
    workers: int = field(default=-1, metadata={"help": "processes; -1: one a core"})
    show: int = field(default=20, metadata={"help": "skipped files that are named; 0: all"})
    json: bool = field(default=False, metadata={"help": "everything as one JSON object, all skipped files in it"})


@dataclass
class File:
    """What one file is; `why` says what is wrong with one that can't be read."""

    size: int = 0  # bytes
    digest: bytes = b""
    kind: str = ""  # "JPEG"
    mode: str = ""  # as it is stored: "L", "CMYK"
    width: int = 0
    height: int = 0
    turned: bool = False  # by its EXIF orientation
    progressive: bool = False
    outside: bool = False  # of the range from black to white are some of its values
    read: float = 0.0  # seconds of one core, decoding included
    crop: float = 0.0  # seconds of one core, where it was timed
    why: str = ""


def examine(source: Source, i: int, crop: Size = 0) -> File:
    """Read and decode an image as training does; with `crop`, also resize half of its area to that size, timed."""
    found = File()
    levels = rule_of(source) or Levels()
    try:
        begin = time.thread_time()
        data = source.read(i)
        found.read = time.thread_time() - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of harmless EXIF trouble
            if isinstance(data, bytes):
                found.size = len(data)
                found.digest = hashlib.blake2b(data, digest_size=16).digest()
                _describe_file(found, data)
            else:
                found.size = data.nbytes
                found.digest = hashlib.blake2b(data.tobytes(), digest_size=16).digest()
                found.kind = "array"
                found.mode = str(data.dtype)
            begin = time.thread_time()
            image = to_image(data, levels)
            found.read += time.thread_time() - begin
            if levels.values != "8-bit":
                found.outside = _outside(data, levels)
    except Exception as error:  # whatever a decoder may raise on a broken file
        found.why = reason(error, path_of(source, i))
        return found
    found.width, found.height = image.size
    if crop:
        begin = time.thread_time()
        short = min(image.size)
        side = 0.5**0.5  # of half the area, a crop's usual size, of an image at most twice as long as wide
        window = (0, 0, max(side * min(image.width, 2 * short), 1), max(side * min(image.height, 2 * short), 1))
        height, width = height_and_width(crop)
        np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, window))
        found.crop = time.thread_time() - begin
    return found


def _describe_file(found: File, data: bytes) -> None:
    """What the file's header says, where Pillow knows it."""
    try:
        with open_image(data) as image:
            found.kind = image.format or ""
            found.mode = image.mode
            found.turned = image.getexif().get(ORIENTATION, 1) != 1
            found.progressive = bool(image.info.get("progressive"))
    except Image.UnidentifiedImageError:
        if data.startswith(TIFF):
            values = np.asarray(stored(data))
            found.kind = "TIFF"
            found.mode = f"{values.shape[2]} x {values.dtype}"


def _outside(data: bytes | np.ndarray, levels: Levels) -> bool:
    """Whether an image has values beyond black or white."""
    survey = Survey()
    survey.add(stored(data, levels.channels) if isinstance(data, bytes) else data)
    bounds = survey.bounds.get(levels.values)
    return bounds is not None and (bounds[0] < levels.value_range[0] or bounds[1] > levels.value_range[1])


_given: list[Source] = []  # in a worker process: what it is to examine, handed over once and not with each image


def _give(source: Source) -> None:
    _given.append(source)


def _examine_given(i: int, crop: Size) -> File:
    return examine(_given[0], i, crop)


def scan(source: Source, image_size: Size, workers: int) -> list[File]:
    """All files, in order, by `workers` processes."""
    every = max(len(source) // MEASURED, 1)
    images = range(len(source))
    crops = [image_size if i % every == 0 else 0 for i in images]
    if workers <= 1 or len(source) < 64:  # starting processes takes longer
        return [examine(source, i, crop) for i, crop in zip(images, crops, strict=True)]
    try:
        pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=_give, initargs=(source,))
    except (OSError, NotImplementedError):  # no room for semaphores in /dev/shm: this process does all
        return scan(source, image_size, 1)
    files = []
    shown_at = time.monotonic()
    with pool:
        try:
            for file in pool.map(_examine_given, images, crops, chunksize=32):
                files.append(file)
                if is_terminal(sys.stderr) and time.monotonic() - shown_at > 1:
                    shown_at = time.monotonic()
                    print(f"\r{len(files)} of {len(source)} files", end="", file=sys.stderr, flush=True)
        except BrokenProcessPool:
            near = path_of(source, min(len(files), len(source) - 1))
            raise UserError(f"a decoder ended its process at {near} or one of the files behind it") from None
    if is_terminal(sys.stderr):
        print("\r\x1b[K", end="", file=sys.stderr)
    return files


def check_data(options: CheckDataOptions) -> dict[str, Any]:
    """Counts, sizes, skipped files [(path, reason)] and expected seconds of an epoch of a folder.

    Raises:
        UserError: if there is no folder, no image in it, or no option like that.
    """
    fields.conform(options, "check_data: {}".format)
    given_range = parsed_range(options.value_range)
    size = Sizes.of(options.image_size).last
    at_least_one = {"views": options.views, "channels": options.channels}
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    workers = options.workers if options.workers > 0 else available_cores()
    source = open_source(options.data)
    found = survey(source, options.channels)
    levels = levels_of(options.channels, given_range, found)
    begin = time.perf_counter()
    files = scan(Levelled(source, levels), size, workers)
    seconds = time.perf_counter() - begin
    readable = [file for file in files if not file.why]
    distinct = {file.digest for file in readable}
    result: dict[str, Any] = {
        "data": source.root,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "classes": len(source.classes),
        "formats": dict(collections.Counter(file.kind for file in readable).most_common()),
        "modes": dict(collections.Counter(file.mode for file in readable).most_common()),
        "progressive": sum(file.progressive for file in readable),
        "turned": sum(file.turned for file in readable),
        "copies": len(readable) - len(distinct),
        "seconds": seconds,
        "workers": workers,
        "views": options.views,
        "image_size": size if isinstance(size, int) else list(size),
        "channels": levels.channels,
        "values": levels.values,
        "value_range": list(levels.value_range),
        "about_values": describe(levels, found),
        "outside": sum(file.outside for file in readable),
        "skipped": [(path_of(source, i), file.why) for i, file in enumerate(files) if file.why],
        "other_files": getattr(source, "others", {}),
        "unlisted": list(getattr(source, "unlisted", ())),
    }
    if readable:
        result |= _sizes(readable, size)
        crops = [file.crop for file in readable if file.crop]
        seconds_each = float(np.mean([file.read for file in readable]))
        if crops:
            seconds_each += options.views * float(np.mean(crops))
        result["epoch_seconds"] = seconds_each * len(readable) / workers
    return result


def _sizes(files: list[File], image_size: Size) -> dict[str, Any]:
    """Smallest, median and largest [width, height] by area, and how many images have a side below `image_size`'s."""
    sizes = np.array([(file.width, file.height) for file in files])
    area = sizes.prod(1)
    height, width = height_and_width(image_size)
    return {
        "smallest": sizes[area.argmin()].tolist(),
        "median": sizes[area.argsort()[len(area) // 2]].tolist(),
        "largest": sizes[area.argmax()].tolist(),
        "small": int((sizes < [width, height]).any(1).sum()),
    }


def render(found: dict[str, Any], show: int = 20) -> str:
    """The result in printable lines for people; `show`: so many of the skipped files are named, 0: all."""
    where = f"in {found['classes']} classes" if found["classes"] else "in one class"
    facts = {"files": f"{found['files']} {where}, {found['bytes'] / 1e6:.1f} MB"}
    size = written(as_given(found["image_size"]))
    if "median" in found:
        sizes = ", ".join(f"{name} {found[name][0]} x {found[name][1]}" for name in ("smallest", "median", "largest"))
        others = {"progressive": "progressive", "turned": "turned by EXIF", "copies": "copies of others"}
        facts |= {
            "formats": _listed(found["formats"]),
            "modes": _listed(found["modes"]),
            "pixels": f"{sizes}; a side below {size}: {found['small']}",
            "also": _listed({words: found[name] for name, words in others.items()}),
            "an epoch": f"about {_duration(found['epoch_seconds'])} of reading, decoding and cropping "
            f"{found['views']} views of {size} pixels by {found['workers']} processes, whatever the "
            "model takes",
        }
    skipped = found["skipped"]
    share = len(skipped) / found["files"]
    if found["about_values"]:
        outside = f"; values outside of that in {found['outside']} images" if found["outside"] else ""
        facts["values"] = "; ".join(found["about_values"]) + outside
    if found["other_files"]:
        facts["not taken"] = _listed(found["other_files"])
    facts["skipped"] = f"{len(skipped)} ({share:.1%}); training puts other images in their place" if skipped else "none"
    lines = [f"{name:<10}{text}" for name, text in facts.items()]
    lines += [f"  {_below(found['data'], path)}: {why}" for path, why in skipped[: show or None]]
    if show and len(skipped) > show:
        lines.append(f"  and {len(skipped) - show} more; --show 0 names all")
    lines += [f"{'unlisted':<10}{path}: {why}; what is in it is left out" for path, why in found["unlisted"]]
    return "\n".join(printable(line) for line in lines)


def _below(data: str, path: str) -> str:
    """A path below what the images lie in; of several sources the whole path."""
    parts = naming.split(data)
    return os.path.relpath(path, naming.folder_of(data) or ".") if len(parts) == 1 else path


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "-"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def main(options: CheckDataOptions) -> int:
    """0, or 1 where files or folders would be left out: a script can ask."""
    found = check_data(options)
    lines = json.dumps(found, indent=2) if options.json else render(found, options.show)
    for line in lines.splitlines():  # of JSON, too: every character beyond ASCII is escaped in it
        say(line, sys.stdout)
    return 1 if found["skipped"] or found["unlisted"] else 0
