"""`fastjem finetune`: a classifier on a run's encoder, trained, tested, and kept in a folder that timm opens."""

import json
import math
import os
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastjem import classifiers, config, encoders, exports, fields, launchers, reading
from fastjem.checkpoints import write_atomically
from fastjem.commands.evaluate import labelled_sources
from fastjem.data.fingerprint import fingerprint
from fastjem.data.size import shorter
from fastjem.errors import UserError
from fastjem.finetuning import AUGMENTATIONS, Plan, Training, augmentation, few, steps_per_epoch
from fastjem.lock import FILE as lock_file
from fastjem.lock import Lock
from fastjem.printing import printable, say
from fastjem.probes import Split, device_of, labels_of, parts, split, workers_of
from fastjem.runs import Opened, open_run

FIGURES, CHECKPOINT = "finetune.json", "checkpoint.pt"
PAIRS = 10  # of classes that are taken for one another, which are told
SHOWN = 20  # classes in the table; of more the best and the worst


@dataclass
class FinetuneOptions:
    """Train a classifier on a run's encoder and test it. Killed and started again, it goes on where it was."""

    run: str = field(
        metadata={"help": "run folder, or an exported encoder.safetensors", "positional": True, "path": True}
    )
    train: str | None = field(
        default=None, metadata={"help": "images of known classes, as --data of pretrain; none: the run's", "path": True}
    )
    test: str | None = field(
        default=None,
        metadata={"help": "the same; none: beside `train`, or each tenth image of it", "path": True},
    )
    out: str | None = field(
        default=None,
        metadata={"help": "folder of the classifier; none: finetune-whole, say, in the run's", "path": True},
    )
    tune: Literal["whole", "linear"] = field(
        default="whole", metadata={"help": "whole: all layers learn; linear: the head alone, on a frozen encoder"}
    )
    scratch: bool = field(default=False, metadata={"help": "from random weights: what the run's are worth"})
    teacher: bool = field(default=False, metadata={"help": "the run's momentum encoder, not the trained one"})
    percent: float = field(default=100.0, metadata={"help": "of the labels of each class that are known: 1, 10"})
    epochs: int = 30
    batch_size: int = field(default=128, metadata={"help": "images of one step"})
    optimizer: str = field(default="adamw", metadata={"help": "one of timm's"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "for 256 images, grows with the batch; none: 0.001, linear: 0.01"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "not of biases and norms"})
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "of the rate from layer to layer away from the head; none: 0.75 of transformers, else 1"},
    )
    warmup_epochs: float | None = field(default=None, metadata={"help": "none: a tenth of the epochs, at most 5"})
    clip: float = field(default=0.0, metadata={"help": "the gradient's largest norm; 0: no clipping"})
    augmentation: Literal["light", "strong", "none"] = field(
        default="light",
        metadata={"help": "light: crop, flip, label smoothing; strong: RandAugment, erasing, mixup and cutmix, too"},
    )
    crop_scale: float | None = field(
        default=None, metadata={"help": "least share of an image's area that is cut out; 0.08, 0.5 at 64 pixels"}
    )
    auto_augment: str | None = field(default=None, metadata={"help": "timm's: rand-m9-mstd0.5-inc1, augmix-m5-w4 ..."})
    erase: float | None = field(default=None, metadata={"help": "probability that a rectangle is erased"})
    mixup: float | None = field(default=None, metadata={"help": "alpha; 0: none"})
    cutmix: float | None = field(default=None, metadata={"help": "alpha; 0: none"})
    smoothing: float | None = field(default=None, metadata={"help": "of labels"})
    drop_path: float | None = field(
        default=None, metadata={"help": "rate of stochastic depth; none: 0.1 of transformers with strong, else 0"}
    )
    overwrite: bool = field(default=False, metadata={"help": "a classifier, or the beginning of one, in --out"})
    checkpoint_every: float = field(default=60.0, metadata={"help": "seconds"})
    seed: int = field(default=0, metadata={"help": "of augmentation, order, and the labels of --percent"})
    workers: int = field(default=-1, metadata={"help": "processes that read images; -1: one a core"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where it is trained", "device": True}
    )


def finetune(options: FinetuneOptions, *, encoder: nn.Module | None = None) -> dict[str, Any]:
    """Every figure, also in `finetune.json` of the folder `out`, beside the classifier: `timm.create_model(
    "local-dir:OUT", pretrained=True)` or `fastjem.load_classifier(OUT)` opens it.

    The test's images are looked at once, at the end: nothing is chosen by them. A call that was killed goes on at its
    last checkpoint where it is made again, and ends as one go would have. It runs in one process, on one device.

    Args:
        options: as the command line takes them.
        encoder: the module that the run was begun with in place of a backbone's name; its weights change.

    Raises:
        UserError: for what can't be done, with the reason.
    """
    _check(options)
    opened = open_run(options.run, teacher=options.teacher, encoder=encoder)
    known = split(*labelled_sources(options.train, options.test, opened))
    out = Path(options.out) if options.out is not None else opened.folder / _usual_name(options)
    if (out / FIGURES).exists() and not options.overwrite:
        raise UserError(f"{out} holds a classifier already; --overwrite trains it anew, another --out another one")
    _check_folder(out)
    lock = Lock(out)
    lock.acquire()
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        if options.overwrite:
            for name in (exports.WEIGHTS, exports.DESCRIPTION, CHECKPOINT, FIGURES):  # it is a classifier's to its end
                (out / name).unlink(missing_ok=True)
        return _finetuned(options, opened, known, out)
    except OSError as error:
        raise UserError(f"--out {out}: {reading.why_not(error)}") from None
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        lock.release()


def _check_folder(out: Path) -> None:
    """UserError for a folder in which something else is than a classifier, or the beginning of one."""
    if (out / config.FILE).exists():
        raise UserError(f"--out {out} is a run's own folder; {out / 'classifier'}, say, is none")
    if not out.is_dir() or (out / FIGURES).exists() or (out / CHECKPOINT).exists():
        return
    # A call that was killed before its first checkpoint leaves its lock, and files that it hadn't written whole.
    others = [found.name for found in out.iterdir() if found.name != lock_file and found.suffix != ".part"]
    if others:
        raise UserError(f"--out {out} has files that are no classifier's, {min(others)}; a new folder is needed")


def _finetuned(options: FinetuneOptions, opened: Opened, known: Split, out: Path) -> dict[str, Any]:
    device = device_of(options.device)
    workers = workers_of(options.workers)
    classes = known.bank.classes
    labels = labels_of(known.bank)
    chosen = np.asarray(known.bank_images, np.int64)
    if options.percent < 100:
        chosen = few(labels, chosen, options.percent, options.seed)
    if len(chosen) < 2:
        raise UserError(f"at least two images are trained on, got {len(chosen)}")
    plan = _plan(options, opened, len(chosen))
    torch.manual_seed(options.seed)
    drop_path = _drop_path(options, opened)
    module = classifiers.create(opened, len(classes), drop_path=drop_path, scratch=options.scratch).to(device)
    identity = _identity(options, opened, known, plan, device)
    training = Training(module, known.bank, chosen, opened.pixels, plan, out / CHECKPOINT, identity)
    training.train(workers)
    logits: list[Tensor] = []
    tested: list[int] = []
    lost = 0
    found = parts(
        lambda x: [module(x)], known.queries, opened.pixels, indices=known.query_images, workers=workers, device=device
    )  # fmt: skip
    for part in found:
        for _, text in part.unreadable:
            say(f"fastjem: left out: {text}")
        lost += len(part.unreadable)
        logits += [rows.float().cpu() for rows in part.arrays]
        tested += part.images
    if not tested:
        raise UserError(f"none of the images in {known.queries.root} can be read")
    truth = torch.as_tensor(labels_of(known.queries)[tested])
    result = {
        "run": str(opened.path),
        "step": opened.step,
        "teacher": opened.teacher,
        "tune": options.tune,
        "scratch": options.scratch,
        "percent": options.percent,
        "train": str(known.bank.root),
        "test": str(known.queries.root),
        "train_images": len(chosen),
        "test_images": len(tested),
        "unreadable_images": lost + len(training.unreadable),
        "classes": classes,
        "seconds": round(training.seconds, 1),
        "drop_path": drop_path,
        **asdict(plan),
        **measured(torch.cat(logits), truth, classes),
        "history": training.history,
    }
    result["timm"] = classifiers.save(module, opened, out, classes) or "opens it"
    write_atomically(out / FIGURES, (json.dumps(result, indent=2) + "\n").encode())
    training.path.unlink(missing_ok=True)
    return {**result, "out": str(out)}


def measured(logits: Tensor, truth: Tensor, classes: list[str]) -> dict[str, Any]:
    """Figures of a test: shares of the images whose label is the first, or among the first five (of more than five
    classes), by class too, and the pairs of classes that are taken for one another most.

    Args:
        logits: [N, K], with the true labels [N].
        classes: K names.
    """
    predicted = logits.argmax(1)
    count = len(classes)
    confusion = torch.bincount(truth * count + predicted, minlength=count * count).view(count, count)
    images = confusion.sum(1)
    by_class = {
        name: {"images": int(images[i]), "top1": int(confusion[i, i]) / int(images[i]) if images[i] else None}
        for i, name in enumerate(classes)
    }
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    worst = [int(i) for i in wrong.argsort(descending=True, stable=True)[:PAIRS] if wrong[i]]
    figures: dict[str, Any] = {
        "top1": int((predicted == truth).sum()) / len(truth),
        "test_loss": float(nn.functional.cross_entropy(logits, truth)),
    }
    if count > 5:
        figures["top5"] = int((logits.topk(5).indices == truth[:, None]).sum()) / len(truth)
    pairs = [{"class": classes[i // count], "taken_for": classes[i % count], "images": int(wrong[i])} for i in worst]
    return {**figures, "by_class": by_class, "confused": pairs}


def _plan(options: FinetuneOptions, opened: Opened, images: int) -> Plan:
    linear = options.tune == "linear"
    batch = min(options.batch_size, images)
    each = steps_per_epoch(images, batch)
    rate = options.learning_rate
    if rate is None:
        rate = 1e-2 if linear else 1e-3
    warmup = options.warmup_epochs
    if warmup is None:
        warmup = min(options.epochs / 10, 5)
    decay = options.layer_decay
    if decay is None:
        decay = 0.75 if encoders.is_transformer(opened.encoder) and not options.scratch else 1.0
    changes = {
        "scale": options.crop_scale, "auto": options.auto_augment, "erase": options.erase, "mixup": options.mixup,
        "cutmix": options.cutmix, "smoothing": options.smoothing,
    }  # fmt: skip
    return Plan(
        epochs=options.epochs,
        batch=batch,
        rate=rate * batch / 256,
        warmup=min(round(warmup * each), options.epochs * each),
        steps=options.epochs * each,
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        layer_decay=1.0 if linear else decay,
        clip=options.clip,
        linear=linear,
        augmentation=augmentation(options.augmentation, changes, shorter(opened.pixels.size)),
        seed=options.seed,
        save_every=options.checkpoint_every,
    )


def _drop_path(options: FinetuneOptions, opened: Opened) -> float:
    if options.drop_path is not None:
        return options.drop_path
    deep = encoders.is_transformer(opened.encoder) and "backbone" in opened.metadata
    return 0.1 if deep and options.augmentation == "strong" and options.tune == "whole" else 0.0


def _identity(options: FinetuneOptions, opened: Opened, known: Split, plan: Plan, device: str) -> dict[str, str]:
    """What decides the result, in words."""
    numbers = {name: str(value) for name, value in asdict(plan).items() if name != "save_every"}
    return {
        **numbers,
        "encoder": opened.digest(),
        "teacher": str(options.teacher),
        "scratch": str(options.scratch),
        "percent": f"{options.percent:g}",
        "drop path": str(_drop_path(options, opened)),
        "train": json.dumps([known.bank.root, fingerprint(known.bank)]),
        "classes": json.dumps(known.bank.classes),
        "device": device,
    }


def _usual_name(options: FinetuneOptions) -> str:
    parts = ["finetune", options.tune]
    if options.percent < 100:
        parts.append(f"{options.percent:g}-percent")
    if options.teacher:
        parts.append("teacher")
    if options.scratch:
        parts.append("scratch")
    return "-".join(parts)


def _check(options: FinetuneOptions) -> None:
    fields.conform(options, "finetune: {}".format)
    if launchers.place().size > 1:
        raise UserError("finetune runs in one process, on one device: start it without torchrun")
    for name, least in {"epochs": 1, "batch_size": 2, "seed": 0, "workers": -1}.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    for name in ("weight_decay", "clip", "warmup_epochs", "mixup", "cutmix", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a finite number, at least 0, got {value}")
    for name in ("learning_rate", "layer_decay"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a finite number above 0, got {value}")
    for name in ("smoothing", "drop_path", "erase"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0 and below 1, got {value}")
    if options.layer_decay is not None and options.layer_decay > 1:
        raise UserError(f"--layer-decay must be at most 1 (all layers learn alike), got {options.layer_decay:g}")
    if options.crop_scale is not None and not 0 < options.crop_scale <= 1:
        raise UserError(f"--crop-scale must be above 0 and at most 1, got {options.crop_scale:g}")
    if not 0 < options.percent <= 100:
        raise UserError(f"--percent must be above 0 and at most 100, got {options.percent:g}")
    if AUGMENTATIONS[options.augmentation].whole:
        for name in ("crop_scale", "auto_augment", "erase"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for --augmentation light or strong, not for none")
    if options.scratch and options.tune == "linear":
        raise UserError("--scratch: with --tune linear the encoder would stay as random as it is")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")


def main(options: FinetuneOptions) -> int:
    result = finetune(options)
    show(result)
    file = os.path.join(result["out"], FIGURES)
    say(f"fastjem: {file} has every figure; fastjem.load_classifier({result['out']!r}) opens it")
    return 0


def show(result: dict[str, Any]) -> None:
    """Tables of the figures."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    few_labels = f" ({result['percent']:g} % of the labels)" if result["percent"] < 100 else ""
    how = "from scratch" if result["scratch"] else {"whole": "whole network", "linear": "linear head"}[result["tune"]]
    title = f"{how}; {result['train_images']:,} images{few_labels}, {result['test_images']:,} tested"
    names = {"top1": "top-1", **({"top5": "top-5"} if "top5" in result else {})}
    table = Table(*names.values(), "test loss", "images can't be read", "minutes", title=title)
    shares = [f"{result[name]:.1%}" for name in names]
    minutes = f"{result['seconds'] / 60:.1f}"
    table.add_row(*shares, f"{result['test_loss']:.3f}", str(result["unreadable_images"]), minutes)
    console.print(table)
    rows = [(name, one["images"], one["top1"]) for name, one in result["by_class"].items() if one["images"]]
    rows.sort(key=lambda row: -row[2])
    cut = len(rows) > SHOWN
    table = Table("class", "images", "right", title="classes, the best and the worst" if cut else "classes")
    for name, images, share in rows[: SHOWN // 2] + rows[-SHOWN // 2 :] if cut else rows:
        table.add_row(printable(name), str(images), f"{share:.1%}")
    console.print(table)
    if result["confused"]:
        table = Table("class", "taken for", "images", title="the worst pairs")
        for pair in result["confused"]:
            table.add_row(printable(pair["class"]), printable(pair["taken_for"]), str(pair["images"]))
        console.print(table)
