"""`fastjem evaluate`: an encoder's features measured, and the figures beside the run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjem import checkpoints, fields, reading, trackers
from fastjem.data import shapes
from fastjem.data.source import Source, open_source
from fastjem.data.sources import naming
from fastjem.errors import UserError
from fastjem.printing import say
from fastjem.probes import Computed, device_of, features, labels_of, majority, measure, split, workers_of
from fastjem.runs import Opened, open_run


@dataclass
class EvaluateOptions:
    """How well an encoder's features tell classes apart: kNN, linear probe, effective rank, deviations."""

    run: str = field(metadata={"help": "run folder, or an exported folder or file", "positional": True, "path": True})
    train: str | None = field(
        default=None, metadata={"help": "images of known classes, as --data of pretrain; none: the run's", "path": True}
    )
    test: str | None = field(
        default=None,
        metadata={"help": "the same; none: beside `train`, or each tenth image of it", "path": True},
    )
    features: Literal["encoder", "projector", "both"] = field(default="encoder", metadata={"help": "of which part"})
    teacher: bool = field(default=False, metadata={"help": "of the run's momentum encoder, not of the trained one"})
    k: int = field(default=20, metadata={"help": "neighbours that vote"})
    temperature: float = field(default=0.07, metadata={"help": "votes weigh exp(cosine / temperature)"})
    half: bool = field(default=False, metadata={"help": "keep features as float16, half the memory"})
    workers: int = field(default=-1, metadata={"help": "processes that read images; -1: one a core"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where the encoder runs", "device": True}
    )
    out: str | None = field(
        default=None,
        metadata={
            "help": "file of the figures; none: evaluation.json, or evaluation-teacher.json, in the run's folder",
            "path": True,
        },
    )
    log: bool = field(default=False, metadata={"help": "give the figures to the trackers that the run went to, too"})


class NotWritten(UserError):
    """The figures were computed and could not be written; they are in `figures`."""

    def __init__(self, path: Path, why: str, figures: dict[str, Any]):
        super().__init__(f"{path} could not be written ({why}); --out names another file")
        self.figures = figures


def evaluate(options: EvaluateOptions, *, encoder: nn.Module | None = None) -> dict[str, Any]:
    """Every figure, also written to `evaluation.json` (of the momentum encoder `evaluation-teacher.json`) in the run's
    folder or beside an export, or to `options.out`. `teacher` in it says which encoder the figures are of. Those of
    RUN/checkpoints/best.pt go to `evaluation-best.json` in the run's folder.

    Images become numbers as they did in the run; those that can't be read are left out, said and counted.

    Args:
        options: as the command line takes them.
        encoder: the module that the run was begun with in place of a backbone's name.

    Raises:
        NotWritten: with the figures, where the file could not be written.
        UserError: for what can't be done, with the reason.
    """
    _check(options)
    opened = open_run(options.run, teacher=options.teacher, encoder=encoder)
    kinds = ["encoder", "projector"] if options.features == "both" else [options.features]
    if "projector" in kinds and opened.projector is None:
        raise UserError(f"{options.run} has no projector (an export holds the encoder alone); --features encoder works")
    train, test = labelled_sources(options.train, options.test, opened)
    known = split(train, test)
    device = device_of(options.device)
    module = opened.encoder.to(device)
    projector = nn.Identity() if opened.projector is None else opened.projector.to(device)

    def compute(images: Tensor) -> list[Tensor]:
        embeddings = module(images)
        return [embeddings if kind == "encoder" else projector(embeddings) for kind in kinds]

    def features_of(source: Source, indices: Sequence[int]) -> Computed:
        return features(
            compute,
            source,
            opened.pixels,
            indices=indices,
            workers=workers_of(options.workers),
            dtype=torch.float16 if options.half else torch.float32,
            device=device,
        )

    bank = features_of(known.bank, known.bank_images)
    queries = features_of(known.queries, known.query_images)
    where = bank.arrays[0].device
    labels = torch.as_tensor(labels_of(known.bank)[bank.images], device=where)
    truth = torch.as_tensor(labels_of(known.queries)[queries.images], device=where)
    k = min(options.k, len(labels))
    if k < options.k:
        say(f"fastjem: --k {options.k} is more than the {k} images whose labels are known: all of them vote")
    result = {
        "run": str(opened.path),
        "step": opened.step,
        "teacher": opened.teacher,
        "train": str(known.bank.root),
        "test": str(known.queries.root),
        "held_out": test is None,
        "train_images": len(labels),
        "test_images": len(truth),
        "classes": len(known.bank.classes),
        "majority": majority(labels, truth),  # accuracy of always guessing the largest class
        "unreadable_images": len(bank.unreadable) + len(queries.unreadable),
        "k": k,
        "temperature": options.temperature,
        "features": {
            kind: measure(bank_rows, labels, query_rows, truth, k=k, temperature=options.temperature)
            for kind, bank_rows, query_rows in zip(kinds, bank.arrays, queries.arrays, strict=True)
        },
    }
    run = checkpoints.run_of(opened.path)
    folder = opened.folder if run is None else run
    of = ("" if run is None else f"-{opened.path.stem}") + ("-teacher" if opened.teacher else "")
    _write(folder / f"evaluation{of}.json" if options.out is None else Path(options.out), result)
    if options.log:
        for line in trackers.add(folder, result["step"] or 0, _logged(result)):
            say(f"fastjem: {line}")
    return result


def _logged(result: dict[str, Any]) -> dict[str, float]:
    """The figures by names that a tracker has no others of."""
    of = "evaluation_of_teacher" if result["teacher"] else "evaluation"
    found = {f"{of}/majority": result["majority"]}
    for kind, row in result["features"].items():
        found |= {f"{of}/{kind}_{name}": row[name] for name in ("knn", "linear_probe", "rankme")}
    return found


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        checkpoints.write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise NotWritten(path, reading.why_not(error), result) from None


def _check(options: EvaluateOptions) -> None:
    fields.conform(options, "evaluate: {}".format)
    if options.k < 1:
        raise UserError(f"--k must be at least 1, got {options.k}")
    if not 0 < options.temperature < math.inf:
        raise UserError(f"--temperature must be positive and finite, got {options.temperature}")
    if options.workers < -1:
        raise UserError(f"--workers must be at least 0, or -1 for one a core, got {options.workers}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")


def labelled_sources(train: str | None, test: str | None, opened: Opened) -> tuple[Source, Source | None]:
    """The labelled images, and those to ask for; None: some of the former.

    Args:
        train, test: what `--train` and `--test` say.
        opened: the run, whose data are taken where nothing is said.
    """
    if test and not train:
        raise UserError("--test needs --train, the images whose labels are known")
    of_run = opened.config.data if opened.config else None
    root = train or of_run or str(shapes.folder() / "train")
    if not (train or of_run):
        say(f"fastjem: neither --train nor the run names any data: the embedded data set is taken ({root})")
    if not naming.exists(root) and not train:
        raise UserError(f"the run's data, {root}, is no longer there; --train and --test say what to use")
    if test:
        return open_source(root), open_source(test)
    beside = naming.beside(root, "test")  # of "train" a folder "test", of "train.npz" a file "test.npz"
    if beside is not None and naming.is_there(beside):
        return open_source(root), open_source(beside)
    return open_source(root), None


def main(options: EvaluateOptions) -> int:
    try:
        show(evaluate(options))
    except NotWritten as error:
        show(error.figures)
        raise
    return 0


def show(result: dict[str, Any]) -> None:
    """A table of the figures."""
    from rich.console import Console
    from rich.table import Table

    held_out = ", each tenth image held out" if result["held_out"] else ""
    left_out = f"; {result['unreadable_images']} can't be read" if result["unreadable_images"] else ""
    images = f"{result['test_images']} images of {result['classes']} classes"
    title = f"{images}, {result['train_images']} known{held_out}{left_out}"
    title += f"; always the largest class: {result['majority']:.1%}"
    if result["teacher"]:
        title = f"momentum encoder; {title}"
    table = Table("features", f"kNN, k = {result['k']}", "linear probe", "RankMe", "std: min, median, max", title=title)
    for kind, row in result["features"].items():
        deviations = ", ".join(f"{row[f'std_{which}']:.3g}" for which in ("min", "median", "max"))
        rank = f"{row['rankme']:.1f} of {row['dimensions']}"
        table.add_row(kind, f"{row['knn']:.1%}", f"{row['linear_probe']:.1%}", rank, deviations)
    Console().print(table)
