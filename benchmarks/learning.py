"""What our methods and another package's learn of the same images, with the same encoder, in the same time.

    python benchmarks/learning.py --train DIR --test DIR --minutes 3 [--methods simclr byol ...] [--out DIR]
    python benchmarks/learning.py --train DIR --test DIR --minutes 10 --backbone resnet18 --stem auto
    python benchmarks/learning.py --train DIR --test DIR --cores 0 1    two methods at a time, a core each
    python benchmarks/learning.py --train DIR --test DIR --peers stable-pretraining [--peer-python PATH]
    python benchmarks/learning.py --train DIR --test DIR --minutes 10 --rates PAGE.json    lengths by an earlier page

DIR has a folder of images for each class. The other package, lightly or stable-pretraining, has as many whole epochs
as fit the minutes, as its CIFAR-10 benchmark trains (benchmarks/lightly_runs.py,
benchmarks/stable_pretraining_runs.py); ours, `fastjem.pretrain` with its defaults, is run beside that for as many
epochs, and for shares of the seconds that the other took. Each run is a process of its own, which needs the machine,
or its core, for itself: a rate measured beside other work chooses another length. With --rates, an earlier page of
the same machine says how many images a second each side trains on, and so how long its runs are: nothing is timed, and
other work may go on beside them. With --peer-python, fastjem must be importable there, too. Seconds are those of the
training, from the opening of the data to the last step (stable-pretraining's: of its trainer's `fit`); ours have the
run's checkpoints and its export in them. Embeddings of both are measured by the same kNN (k = 20) and linear probe.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fastjem
from fastjem import backbones, encoders
from fastjem.bench import machine
from fastjem.data.pixels import Pixels
from fastjem.data.source import open_source
from fastjem.machine import available_cores
from fastjem.methods import METHODS
from fastjem.probes import embed, measure
from fastjem.runs import open_run

sys.path.insert(0, str(Path(__file__).parent))
import lightly_runs
import stable_pretraining_runs
import tables

FIGURES = {"knn": "kNN", "linear_probe": "linear"}  # of `fastjem.probes.measure` -> a column
WARM_STEPS = 30  # by whose rate the length of a run is chosen
ABOUT = (
    "kNN (k = 20) and linear accuracy on the test images in percent; seconds of training, and of {peer}'s;\n"
    "images a second; encoder: the share of a step that the trained encoder's forward and backward pass takes alone;\n"
    "MiB: the training process at its peak. {peer}: {settings}."
)


def without_classes(folder: str, into: Path) -> str:
    """A flat folder with links to all images of a folder: a run that knows no classes measures nothing on the way."""
    source = open_source(folder)
    into.mkdir()
    for i in range(len(source)):
        name = source.name(i)
        (into / name.replace("/", "-")).symlink_to(Path(folder).absolute() / name)
    return str(into)


def encoder_of(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    return backbones.create(
        options.backbone, options.size, stem=options.stem, patch=options.patch_size, pool=METHODS[options.alone].pool
    )


class Peer(NamedTuple):
    """Another package, and its runs."""

    module: str  # what it is imported as
    methods: Sequence[str]  # by our names
    run: Callable[[argparse.Namespace, nn.Module, int], Any]  # of an encoder, for so many epochs
    train: Callable[..., tuple[float, int]]  # seconds and images of a run
    pixels: Callable[[int], Pixels]  # that its encoder learns from, of an image size
    page: str  # how the name of its page begins
    settings: str


def lightly_run(options: argparse.Namespace, encoder: nn.Module, epochs: int) -> lightly_runs.Run:
    recipe = lightly_runs.recipes()[options.alone]
    return lightly_runs.Run(recipe, encoder, encoders.wrap(encoder).width, batch=options.batch, epochs=epochs)


def stable_pretraining_run(options: argparse.Namespace, encoder: nn.Module, epochs: int) -> Any:
    recipe = stable_pretraining_runs.recipes()[options.alone]
    return stable_pretraining_runs.module_of(recipe, encoder, encoders.wrap(encoder).width)


PEERS = {
    "lightly": Peer(
        "lightly",
        lightly_runs.METHODS,
        lightly_run,
        lightly_runs.train,
        Pixels,
        page="learning",
        settings="its CIFAR-10 benchmark's settings without Lightning",
    ),
    "stable-pretraining": Peer(
        "stable_pretraining",
        stable_pretraining_runs.METHODS,
        stable_pretraining_run,
        stable_pretraining_runs.train,
        stable_pretraining_runs.pixels,
        page="learning-stable-pretraining",
        settings="its CIFAR-10 benchmarks' settings and Lightning's trainer in float32, without probes and callbacks",
    ),
}


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """A peer's run, of as many whole epochs as fit the minutes."""
    peer = PEERS[options.side]
    encoder = encoder_of(options)
    images = len(open_source(options.train))
    settings = {"batch": options.batch, "workers": options.workers}

    def train(module: nn.Module, epochs: int, most_steps: int = 0) -> tuple[float, int]:
        run = peer.run(options, module, epochs)
        return peer.train(run, options.train, options.size, epochs=epochs, most_steps=most_steps, **settings)

    rate = options.rate
    if not rate:
        warm, seen = train(encoder_of(options), epochs=1, most_steps=WARM_STEPS)
        rate = seen / warm
    epochs = max(round(60 * options.minutes * rate / images), 1)
    seconds, seen = train(encoder, epochs)
    pixels = peer.pixels(options.size)
    return {"epochs": epochs, "steps": seen // options.batch, "pixels": pixels, **after(encoder, seconds, seen)}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """`fastjem.pretrain` by its defaults, for `--steps`, or for as many as fit `--seconds`."""
    fields: dict[str, Any] = {
        "method": options.alone, "backbone": options.backbone, "image_size": options.size, "stem": options.stem,
        "patch_size": options.patch_size, "batch_size": options.batch, "epochs": 10_000, "seed": options.seed,
        "workers": options.workers, "report": False, **dict(options.fields),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data = without_classes(options.train, Path(folder) / "images")
        steps = options.steps
        if options.seconds:
            begin = time.perf_counter()
            fastjem.pretrain(data=data, out=f"{folder}/warm", max_steps=WARM_STEPS, **fields)
            warm = time.perf_counter() - begin
            rate = typical_rate(Path(folder) / "warm", staged="," in str(fields["image_size"]))
            start = warm - WARM_STEPS * options.batch / rate  # opening, building, export
            steps = max(round((options.seconds - start) * rate / options.batch), 1)
        begin = time.perf_counter()
        result = fastjem.pretrain(data=data, out=f"{folder}/run", max_steps=steps, **fields)
        seconds = time.perf_counter() - begin
        opened = open_run(result.out)
        images = len(open_source(data))
    seen = steps * options.batch
    epochs = round(seen / images, 1)
    return {"epochs": epochs, "steps": steps, "pixels": opened.pixels, **after(opened.encoder, seconds, seen)}


def typical_rate(out: Path, *, staged: bool) -> float:
    """Images a second: the median over the run, of one with stages of image sizes the mean over its images."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if row.get("images_per_second")]
    return statistics.harmonic_mean(rates) if staged else statistics.median(rates)


def after(encoder: nn.Module, seconds: float, seen: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"encoder": encoder, "seconds": seconds, "images/s": seen / seconds, "MiB": peak}


def encoder_share(encoder: nn.Module, size: int, batch: int, rate: float, rounds: int = 5) -> float:
    """Of a step's time, that of the encoder's forward and backward pass over both views."""
    encoder.train()
    images = torch.randn(batch, 3, size, size)
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(2):
            encoder(images).sum().backward()
        best = min(best, time.perf_counter() - begin)
    return best * rate / batch


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure, in this process; the row."""
    found = (theirs if options.side in PEERS else ours)(options)
    encoder = found.pop("encoder")
    pixels = found.pop("pixels")
    train, test = (open_source(folder) for folder in (options.train, options.test))
    figures = measure(*embed(encoder, train, pixels), *embed(encoder, test, pixels))
    row = {"method": options.alone, "side": options.side, "seed": options.seed, **found}
    if options.side in PEERS:
        row["version"] = importlib.metadata.version(options.side)
    row |= {column: 100 * figures[key] for key, column in FIGURES.items()}
    row["encoder"] = round(encoder_share(encoder, options.size, options.batch, found["images/s"]), 2)
    digits = {"images/s": 0, "MiB": 0, "encoder": 2}
    return {key: round(v, digits.get(key, 1)) if isinstance(v, float) else v for key, v in row.items()}


def python_of(side: str, options: argparse.Namespace) -> str:
    """This interpreter, or `--peer-python` for a peer that isn't installed in this one."""
    elsewhere = side in PEERS and importlib.util.find_spec(PEERS[side].module) is None
    return options.peer_python if elsewhere else sys.executable


def workers(options: argparse.Namespace) -> int:
    """Of a run's loader: one at most where the run has a core of its own."""
    return min(options.workers, 1) if options.cores else options.workers


def in_a_process(
    name: str, side: str, seed: int, options: argparse.Namespace, core: int | None, **own: Any
) -> dict[str, Any]:
    command = [python_of(side, options), __file__, "--alone", name, "--side", side, "--seeds", str(seed)]
    kept = ("train", "test", "size", "batch", "minutes", "backbone", "stem", "patch_size", "workers")
    settings = {key: getattr(options, key) for key in kept} | {"workers": workers(options)}
    for key, value in (settings | own).items():
        command += ["--" + key.replace("_", "-"), str(value)]
    command += ["--fields", *(f"{key}={json.dumps(value)}" for key, value in options.fields)]
    return {"method": name, "side": side, "seed": seed, **tables.row_of(command, core)}


def rates_of(page: Path | None, name: str) -> dict[str, float]:
    """Images a second of a method, by side ("ours" of whatever length), as an earlier page has them."""
    if page is None:
        return {}
    rows = [row for row in json.loads(page.read_text())["rows"] if row["method"] == name and "images/s" in row]
    return {row["side"].partition(",")[0]: row["images/s"] for row in rows}


def timed(row: dict[str, Any], rate: float | None) -> dict[str, Any]:
    """A row with the seconds that it takes at `rate` images a second, and without the encoder's share of them, which
    the page has where the rate is from; None: as they were measured."""
    if rate is None or "error" in row:
        return row
    measured = row["images/s"]
    del row["encoder"]
    row["seconds"] = round(row["seconds"] * measured / rate, 1)
    row["images/s"] = rate
    return row


def compared(peer: str, name: str, seed: int, options: argparse.Namespace, core: int | None) -> list[dict[str, Any]]:
    """A peer's run of a method, and ours beside it."""
    rates = rates_of(options.rates, name)
    first = timed(in_a_process(name, peer, seed, options, core, rate=rates.get(peer, 0)), rates.get(peer))
    print(json.dumps(first), flush=True)
    rows = [first]
    if "error" in first:
        return rows
    wanted: list[tuple[str, dict[str, Any]]] = [("ours, its epochs", {"steps": first["steps"]})]
    for share in options.shares:
        seconds = share * first["seconds"]
        steps = round(seconds * rates.get("ours", 0) / options.batch)
        wanted.append((f"ours, {share:g} of its time", {"steps": steps} if steps else {"seconds": seconds}))
    for label, length in wanted[0 if options.same_epochs else 1 :]:
        row = timed(in_a_process(name, "ours", seed, options, core, **length), rates.get("ours"))
        row["side"] = label
        if "error" not in row:
            row["of its time"] = round(row["seconds"] / first["seconds"], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def field(text: str) -> tuple[str, Any]:
    """NAME=VALUE of `fastjem.pretrain`."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every run of ours is told here: images, encoder, batch, seeds and cores."""
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--stem", default="standard")
    parser.add_argument("--patch-size", type=int, default=0)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="runs side by side, each on one of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS], default=["lightly"])
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the interpreter of a peer that this one hasn't got"
    )
    parser.add_argument("--methods", nargs="+", help="all that the peer has")
    parser.add_argument("--minutes", type=float, default=3.0, help="of the peer's run")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.4], help="of its time that ours has")
    parser.add_argument("--same-epochs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rates", type=Path, help="a page's JSON, whose rates tell how long runs are")
    parser.add_argument("--fields", type=field, nargs="*", default=[], help="of ours: NAME=VALUE of fastjem.pretrain")
    for hidden in ("--alone", "--side"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seed = options.seeds[0]
    if options.alone:
        print("ROW " + json.dumps(one(options)), flush=True)
        return
    for peer in options.peers:
        if wrong := [name for name in options.methods or () if name not in PEERS[peer].methods]:
            parser.error(f"{peer}'s benchmark has no {wrong[0]}")
    for peer in options.peers:
        rows: list[dict[str, Any]] = []
        runs = [(peer, name, seed) for name in options.methods or PEERS[peer].methods for seed in options.seeds]
        for found in tables.spread(lambda run, core: compared(*run, options, core), runs, options.cores):
            rows += found
            if options.out:
                write(peer, options, rows)


def write(peer: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """A peer's page: the rows, beside those that the file has of other methods with the same settings."""
    facts = tables.describe(options.cores)
    kept = ("train", "test", "minutes", "size", "batch", "backbone", "stem", "patch_size", "seeds", "fields")
    settings = {key: str(getattr(options, key)) for key in kept} | {"workers": str(workers(options))}
    if options.rates:
        settings["rates"] = f"of {options.rates.name}"
    data = Path(options.train).parent.name
    found = PEERS[peer]
    path = options.out / f"{found.page}-{data}-{options.backbone}-{options.minutes:g}-minutes-{machine.slug(facts)}"
    rows, note = tables.beside_earlier(path, settings, rows, ("method",))
    rows = sorted(rows, key=lambda row: (found.methods.index(row["method"]), row["seed"]))
    title = f"Beside {peer}: {options.backbone}, {options.minutes:g} minutes{' of a core' if options.cores else ''}"
    tables.write(path, title, ABOUT.format(peer=peer, settings=found.settings), facts, settings, rows, note=note)


if __name__ == "__main__":
    main()
