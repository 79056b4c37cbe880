"""What a run leaves for its report while it trains: kNN over time, some images' embeddings, the page itself.

Nothing here may end or slow a run: an error is said once and the run goes on; the encoder sees at most `IMAGES` images
about twenty times a run, and the page is written again only when fifty times its own cost has passed.
"""

import io
import json
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjem.checkpoints import Metrics, write_atomically
from fastjem.data.pixels import Pixels, whole_image
from fastjem.data.source import Source, decode
from fastjem.evaluate import labels_of
from fastjem.report.page import write
from fastjem.report.run import spread

IMAGES, EACH, NEIGHBOURS, TEMPERATURE = 1000, 20, 20, 0.07
SHARE_OF_TIME = 1 / 50  # that writing pages may take


def choose(labels: np.ndarray, most: int = IMAGES) -> np.ndarray:
    """Indices of at most `most` images, as many of each class; of some classes, where `EACH` of each were too many."""
    classes, sizes = np.unique(labels, return_counts=True)
    classes = classes[spread(len(classes), most // min(EACH, int(np.median(sizes))))]
    members = [np.flatnonzero(labels == c) for c in classes]
    return np.sort(np.concatenate([at[spread(len(at), most // len(classes))] for at in members]))


def knn_without_itself(rows: Tensor, labels: Tensor, k: int, temperature: float = TEMPERATURE) -> float:
    """Share of the unit rows [N, D] whose label [N] their k nearest others tell, voting with exp(cos / temperature)
    (Wu et al. 2018)."""
    similarity, index = (rows @ rows.T).fill_diagonal_(-torch.inf).topk(min(k, len(rows) - 1), dim=1)
    votes = rows.new_zeros(len(rows), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[index], ((similarity - 1) / temperature).exp())
    return (votes.argmax(1) == labels).float().mean().item()


class Probe:
    """Some of the folder's images, whole and without augmentation, held as uint8; what can't be read is left out."""

    def __init__(self, folder: Source, image_size: int):
        def read(i: int) -> Tensor | None:
            try:
                return whole_image(decode(folder, i), image_size)
            except Exception:  # the loader names broken files
                return None

        self.pixels = Pixels(image_size)
        chosen = choose(labels_of(folder))
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
            images = list(threads.map(read, chosen.tolist()))
        found = [(i, image) for i, image in zip(chosen.tolist(), images, strict=True) if image is not None]
        self.indices, self.folder = [i for i, _ in found], folder
        self.images = torch.stack([image for _, image in found])
        present, labels = np.unique(labels_of(folder)[self.indices], return_inverse=True)
        self.classes, self.labels = [(folder.classes or [""])[i] for i in present], torch.from_numpy(labels)
        self.labelled = 1 < len(self.classes) <= len(found) // 2

    @torch.no_grad()
    def embed(self, encoder: nn.Module, batch: int = 128) -> Tensor:
        """[N, D] of length one, on the CPU; the encoder is left as it was."""
        training, device = encoder.training, next(encoder.parameters()).device
        encoder.eval()
        try:
            rows = [encoder(self.pixels.normalise(part, device)).float().cpu() for part in self.images.split(batch)]
        finally:
            encoder.train(training)
        return nn.functional.normalize(torch.cat(rows), dim=1)

    def knn(self, rows: Tensor) -> float:
        return knn_without_itself(rows, self.labels, min(NEIGHBOURS, max(len(rows) // len(self.classes), 1)))

    def pack(self, rows: Tensor, step: int) -> bytes:
        file = io.BytesIO()
        np.savez(
            file,
            step=step,
            rows=rows.half().numpy(),
            indices=np.array(self.indices),
            files=np.array([self.folder.name(i) for i in self.indices]),
            root=os.path.abspath(self.folder.root),
            labels=self.labels.numpy(),
            classes=np.array(self.classes),
            images=len(self.folder),
            labelled=self.labelled,
        )
        return file.getvalue()


class Watch:
    """What `pretrain` calls, on the first rank alone: after each step, and when the run is over.

    Args:
        facts: what the run knows of itself and its other files don't tell: steps, steps_per_epoch, patch, ranks.
        every: epochs between two measurements of kNN and embeddings; 0: at the start and at the end only; None: a
            twentieth of the run, at least one.
        page: whether report.html is written.
    """

    def __init__(
        self,
        run: Path,
        folder: Source,
        image_size: int,
        facts: dict[str, Any],
        *,
        start: int = 0,
        every: float | None = None,
        page: bool = True,
        say: Callable[[str], None],
    ):
        self.run, self.folder, self.image_size, self.page, self.say = run, folder, image_size, page, say
        self.start, self.steps, self.per_epoch = start, facts["steps"], facts["steps_per_epoch"]
        if every is None:
            every = max(math.ceil(self.steps / self.per_epoch / 20), 1)
        self.every = max(round(every * self.per_epoch), 1) if every else 0
        self.facts = {**facts, "images": len(folder), "classes": max(len(folder.classes), 1), **versions()}
        self.probe: Probe | None = None
        self.log: Metrics | None = None
        self.written_at, self.cost, self.failed = -math.inf, 0.0, False

    def begin(self, encoder: nn.Module) -> None:
        def work() -> None:
            self.facts["device"] = describe(next(encoder.parameters()).device)
            write_atomically(self.run / "environment.json", (json.dumps(self.facts, indent=2) + "\n").encode())
            self.probe = Probe(self.folder, self.image_size)
            self.log = Metrics(self.run, self.start, "knn.jsonl")
            if not (self.start and (self.run / "embeddings.npz").exists()):
                self.measure(encoder, self.start)

        self.guarded(work)

    def after_step(self, encoder: nn.Module, done: int) -> None:
        """Before the checkpoint of that step, so that a resumed run lacks no measurement."""
        if done == self.steps or (self.every and done % self.every == 0):
            self.guarded(lambda: self.measure(encoder, done))

    def refresh(self) -> None:
        """After a checkpoint."""
        if self.page and time.monotonic() - self.written_at > self.cost / SHARE_OF_TIME:
            self.guarded(self.write)

    def end(self) -> None:
        if self.page:
            self.guarded(lambda: self.write(last=True))
        if self.log:
            self.log.close()

    def measure(self, encoder: nn.Module, step: int) -> None:
        if self.probe is None:
            return
        rows = self.probe.embed(encoder)
        if self.probe.labelled and self.log:
            accuracy = self.probe.knn(rows)
            row = {"step": step, "epoch": step / self.per_epoch, "knn": accuracy, "images": len(rows)}
            self.log.write({**row, "classes": len(self.probe.classes)})
            self.say(f"kNN {accuracy:.1%} on {len(rows)} images after epoch {step / self.per_epoch:.4g}")
        write_atomically(self.run / "embeddings.npz", self.probe.pack(rows, step))

    def write(self, last: bool = False) -> None:
        begin = time.monotonic()
        write(self.run, tsne=last)
        self.written_at = time.monotonic()
        self.cost = self.written_at - begin

    def guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, the run matters more
            if not self.failed:
                self.failed = True
                reason = (str(error).splitlines() or [""])[0]
                self.say(f"the report is incomplete ({type(error).__name__}: {reason}); the run goes on")


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("fastjem", "torch", "torchvision", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
