"""What a run is about to do, a title and at most eight lines before its first wait, and what there is at its end."""

import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastjem import ops, values
from fastjem.build import Training
from fastjem.data.size import written
from fastjem.data.source import Source
from fastjem.data.views import RECIPES
from fastjem.methods import Method, options_of, preset_of
from fastjem.prepare import ENCODER
from fastjem.probes import tells_classes

BALANCED = 2.0  # times as many images as the smallest has the largest of classes that are called balanced


def title(training: Training) -> str:
    goes_on = f", from step {training.start} on" if training.start else ""
    return f"fastjem: {training.config.method.rpartition('.')[2]} into {training.out}{goes_on}"


def rows(training: Training) -> list[tuple[str, str]]:
    """(what it is about, a sentence or two)."""
    found = values.of(training)
    config = training.config
    kind = type(training.step.method)
    said = [
        ("data", f"{config.data}: {classes_of(training.source)}"),
        ("method", f"{config.method} ({kind.about.paper}); {_views(training, found)}"),
        ("encoder", _encoder(found)),
        ("training", _training(found)),
        ("optimiser", _optimiser(training, found)),
        ("runs on", _machine(training, found)),
    ]
    defaults = preset_of(kind, config.preset).defaults or kind.defaults
    if defaults.source:
        said.append(("recipe", f"{'the paper' if config.preset == 'imagenet' else config.preset}: {defaults.source}"))
    others = ", ".join(differences(training, found))
    said.append(("unlike it", others or "nothing but the data and the number of images"))
    return said


def counted(number: float, what: str) -> str:
    """ "1 step", "1,200 steps", "0.5 epochs"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def classes_of(source: Source) -> str:
    """How many images and classes there are, and by how much these aren't as large as each other."""
    images = f"{len(source):,} images"
    if source.labels is None or not source.classes:
        return f"{images}, no classes"
    sizes = np.bincount(np.asarray(source.labels), minlength=len(source.classes))
    if "" in source.classes:
        loose = int(sizes[source.classes.index("")])
        return f"{images}, {loose:,} of them in no folder of their own: no classes"
    if len(source.classes) == 1:
        return f"{images} of one class"
    of_classes = f"{images} of {len(source.classes):,} classes"
    present = sizes[sizes > 0]
    if present.max() <= BALANCED * present.min():
        return of_classes
    largest = source.classes[int(sizes.argmax())]
    return (
        f"{of_classes}, of {present.min():,} to {present.max():,} images; {sizes.max() / len(source):.0%} are {largest}"
    )


def _views(training: Training, found: dict[str, Any]) -> str:
    sizes = " then ".join(written(stage.size) for stage in training.stages)
    small = f" and {found['small_views']} small ones" if found["small_views"] else ""
    masked = f", {found['mask']:.0%} masked" if found["mask"] else ""
    return f"{found['large_views']} views of {sizes} pixels{small}, recipe {found['recipe']}{masked}"


def _encoder(found: dict[str, Any]) -> str:
    heads = f"; heads {_millions(found['parameters_of_heads'])}" if found["parameters_of_heads"] else ""
    width = found["embedding_width"]
    return f"{found['encoder']}, {_millions(found['parameters'])} parameters, {width:,} numbers an image{heads}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count:,}"


def _training(found: dict[str, Any]) -> str:
    steps, each = found["steps"], found["steps_per_epoch"]
    times = f" in {found['accumulate']} parts" if found["accumulate"] > 1 else ""
    images = found["batch_size"] * found["accumulate"]
    over = f" over {found['ranks']} ranks" if found["ranks"] > 1 else ""
    shards = ", weights in shards" if found["shard"] else ""
    again = ", blocks computed again" if found["activation_checkpointing"] else ""
    lasts = f"{counted(steps, 'step')}, {counted(found['epochs'], 'epoch')} of {each:,}"
    return f"{lasts}, of {images:,} images{times}{over}{shards}{again}"


def _optimiser(training: Training, found: dict[str, Any]) -> str:
    parts = [f"{found['optimizer']}, rate {found['peak_learning_rate']:.3g}"]
    if found["warmup_steps"]:
        parts[0] += f" after {counted(found['warmup_steps'], 'step')} of warm-up"
    decay, final = found["weight_decay"], found["final_weight_decay"]
    parts.append(f"weight decay {decay:g}" + (f" to {final:g}" if final != decay else ""))
    if found["clip"]:
        parts.append(f"clip {found['clip']:g}")
    if found["momentum"] is not None:
        parts.append(f"momentum encoder {found['momentum']:.4g} to {found['final_momentum']:.4g}")
    return ", ".join(parts)


def _machine(training: Training, found: dict[str, Any]) -> str:
    device = training.ranks.device
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    where = [ways[device.type].partition(" (")[0] for ways in ops.implementations().values()]
    kinds = " and ".join(f"{kind} ({count})" for kind, count in Counter(where).most_common())
    workers = f", {counted(found['workers'], 'worker')}" if found["loader"] == "torch" else ""
    compiled = ", compiled" if training.config.compile else ""
    return f"{name}, {found['precision']}{compiled}; images by {found['loader']}{workers}; operators: {kinds}"


def differences(training: Training, found: dict[str, Any]) -> Iterator[str]:
    """What is otherwise than the method's own recipe has it, or its preset's; each a few words."""
    config = training.config
    kind: type[Method] = type(training.step.method)
    preset = preset_of(kind, config.preset)
    paper = preset.defaults or kind.defaults
    if found["optimizer"] != paper.optimizer:
        yield f"{found['optimizer']} for {paper.optimizer}"
    if found["optimizer"] != paper.optimizer or found["learning_rate"] != paper.learning_rate:
        yield f"rate {found['learning_rate']:.3g} for {paper.learning_rate:.3g} (of 256 images)"
    pairs = {
        "weight decay": (found["weight_decay"], paper.weight_decay),
        "clip": (found["clip"] or 0, paper.clip),
        "warm-up epochs": (found["warmup_epochs"], paper.warmup_epochs),
        "drop path": (found["drop_path"] or 0, paper.drop_path),
    }
    if found["momentum"] is not None and kind.momentum:
        pairs["momentum"] = (found["momentum"], paper.momentum)
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            yield f"{name} {ours:.4g} for {theirs:.4g}"
    theirs = {"large": kind.views.large, "small": kind.views.small, "recipe": kind.views.recipe, **preset.views}
    for name, ours in (("large", "large_views"), ("small", "small_views"), ("recipe", "recipe")):
        if found[ours] != theirs[name]:
            yield f"{ours.replace('_', ' ')} {found[ours]} for {theirs[name]}"
    if found["recipe"] in RECIPES and RECIPES[found["recipe"]].large[0].blur and not training.stages[-1].specs[0].blur:
        yield "no blur"
    if config.view:
        yield f"--view {' '.join(config.view)}"
    options = {**options_of(kind), **preset.options}
    for name, value in config.options.items():
        if options.get(name) != value:
            yield f"{name} {value} for {options.get(name)}"
    yield f"batches of {found['batch_size'] * found['accumulate']:,}"
    yield counted(found["epochs"], "epoch")


def closing(training: Training, *, named: bool, has_data: bool) -> list[str]:
    """What there is now, and what can be done with it.

    Args:
        named: the encoder is known by a backbone's name, so that the command line can make it again.
        has_data: the images are where `--data` says, and no object's.
    """
    out = training.out
    there = [f"encoder {out / ENCODER}"]
    if training.config.report:
        there.insert(0, f"report {out / 'report.html'}")
    lines = [f"fastjem: {training.done:,} steps are taken; {', '.join(there)}"]
    if not named:
        return [
            *lines,
            f"next: fastjem.load_encoder({str(out)!r}, encoder=module), in Python, with a module as it was given",
        ]
    folder = shlex.quote(str(out))
    commands = [f"fastjem evaluate {folder}"] if has_data and tells_classes(training.source) else []
    if has_data:
        data = shlex.quote(training.config.data or "")
        rows = shlex.quote(str(out / "embeddings.parquet"))
        commands.append(f"fastjem embed {folder} --data {data} --out {rows}")
    commands.append(f"fastjem export {folder}")
    commands.append(f"fastjem.load_encoder({str(out)!r}), in Python")
    return [*lines, *(f"{'      ' if i else 'next: '}{command}" for i, command in enumerate(commands))]


__all__ = ["classes_of", "closing", "differences", "rows", "title"]
