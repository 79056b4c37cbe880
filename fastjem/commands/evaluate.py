"""`fastjem evaluate`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastjem import checkpoints
from fastjem.data import shapes
from fastjem.data.folder import ImageFolder
from fastjem.errors import UserError
from fastjem.probes import default_workers, features, measure, split
from fastjem.runs import Opened, open_run


@dataclass
class EvaluateOptions:
    """How well an encoder's features tell classes apart: kNN, linear probe, effective rank, deviations."""

    run: str = field(metadata={"help": "run folder, or an exported encoder.safetensors", "positional": True})
    train: str = field(default="", metadata={"help": "class folders; none: the data of the run"})
    test: str = field(default="", metadata={"help": "class folders; none: beside `train`, or each tenth image of it"})
    features: Literal["encoder", "projector", "both"] = field(default="encoder", metadata={"help": "of which part"})
    k: int = field(default=20, metadata={"help": "neighbours that vote"})
    temperature: float = field(default=0.07, metadata={"help": "votes weigh exp(cosine / temperature)"})
    half: bool = field(default=False, metadata={"help": "keep features as float16, half the memory"})
    workers: int = field(default=-1, metadata={"help": "processes that read images; -1: one a core"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where the encoder runs"})


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Every figure, also written to `evaluation.json` in the run's folder (beside an export)."""
    if options.k < 1:
        raise UserError(f"--k must be at least 1, got {options.k}")
    if options.temperature <= 0:
        raise UserError(f"--temperature must be positive, got {options.temperature}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu works")
    opened = open_run(options.run)
    names = ["encoder", "projector"] if options.features == "both" else [options.features]
    if "projector" in names and opened.projector is None:
        raise UserError(f"{options.run} has no projector (an export holds the encoder alone); --features encoder works")
    train, test = _folders(options, opened)
    bank_folder, bank_rows, query_folder, query_rows = split(train, test)
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    encoder, projector = opened.encoder.to(device), opened.projector and opened.projector.to(device)

    def compute(images: torch.Tensor) -> list[torch.Tensor]:
        x = encoder(images)
        return [x if name == "encoder" else projector(x) for name in names]

    reading: dict[str, Any] = {"dtype": torch.float16 if options.half else torch.float32, "device": device}
    reading["workers"] = default_workers() if options.workers < 0 else options.workers
    bank = features(compute, bank_folder, opened.image_size, chosen=bank_rows, **reading)
    queries = features(compute, query_folder, opened.image_size, chosen=query_rows, **reading)
    labels = torch.as_tensor(bank_folder.labels[bank_rows], device=bank[0].device)
    truth = torch.as_tensor(query_folder.labels[query_rows], device=bank[0].device)
    found = {
        name: measure(b, labels, q, truth, k=options.k, temperature=options.temperature)
        for name, b, q in zip(names, bank, queries, strict=True)
    }
    result = {"run": str(opened.path), "step": opened.step, "train": str(bank_folder.root), "test":
              str(query_folder.root), "held_out": test is None, "train_images": len(labels), "test_images": len(truth),
              "classes": len(bank_folder.classes), "k": options.k, "temperature": options.temperature,
              "features": found}  # fmt: skip
    text = json.dumps(result, indent=2) + "\n"
    try:
        checkpoints.write_atomically(opened.folder / "evaluation.json", text.encode())
    except OSError as error:
        raise UserError(f"{opened.folder / 'evaluation.json'}: {error.strerror}") from None
    return result


def _folders(options: EvaluateOptions, opened: Opened) -> tuple[ImageFolder, ImageFolder | None]:
    if options.test and not options.train:
        raise UserError("--test needs --train, the images whose labels are known")
    root = Path(options.train or (opened.config.data if opened.config else "") or shapes.folder() / "train")
    if not root.exists() and not options.train:
        raise UserError(f"the run's data, {root}, is no longer there; --train and --test say what to use")
    beside = root.with_name(f"test{root.suffix}") if root.stem == "train" else None
    if options.test:
        return ImageFolder(root), ImageFolder(options.test)
    return ImageFolder(root), ImageFolder(beside) if beside and beside.exists() else None


def main(options: EvaluateOptions) -> int:
    from rich.console import Console
    from rich.table import Table

    result = evaluate(options)
    held = ", each tenth image held out" if result["held_out"] else ""
    title = f"{result['test_images']} images of {result['classes']} classes, {result['train_images']} known{held}"
    table = Table("features", f"kNN, k = {result['k']}", "linear probe", "RankMe", "std: min, median, max", title=title)
    for name, row in result["features"].items():
        deviations = ", ".join(f"{row[f'std_{which}']:.3g}" for which in ("min", "median", "max"))
        rank = f"{row['rankme']:.1f} of {row['dimensions']}"
        table.add_row(name, f"{row['knn']:.1%}", f"{row['linear_probe']:.1%}", rank, deviations)
    Console().print(table)
    return 0
