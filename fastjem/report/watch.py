"""What a run leaves for its report while it trains: kNN over time, some images' embeddings, the page itself.

Nothing here may end or slow a run: an error is said once and the run goes on; the encoder sees at most `IMAGES` images
about twenty times a run, and the page is written again only when fifty times its own cost has passed.
"""

import io
import json
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjem.build import Training
from fastjem.checkpoints import Metrics, write_atomically
from fastjem.data.pixels import Pixels, whole_image
from fastjem.data.source import Source, decode
from fastjem.data.sources import naming
from fastjem.data.spread import spread
from fastjem.journal import Journal
from fastjem.machine import available_cores
from fastjem.probes import majority, parts_not_classes, tells_classes
from fastjem.report.page import write

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


class SampleImages:
    """Some of a source's images, whole and without augmentation, held as read; what can't be read is left out."""

    def __init__(self, source: Source, pixels: Pixels):
        def read(i: int) -> Tensor | None:
            try:
                return whole_image(decode(source, i), pixels.size)
            except Exception:  # the loader names broken files
                return None

        every_label = np.zeros(len(source), np.int64) if source.labels is None else source.labels
        chosen = choose(every_label)
        with ThreadPoolExecutor(min(available_cores(), 16)) as threads:
            images = list(threads.map(read, chosen.tolist()))
        found = [(i, image) for i, image in zip(chosen.tolist(), images, strict=True) if image is not None]
        self.source = source
        self.pixels = pixels
        self.indices = [i for i, _ in found]
        self.images = torch.stack([image for _, image in found])
        present, labels = np.unique(every_label[self.indices], return_inverse=True)
        self.classes = [source.classes[i] for i in present] if source.classes else [""]
        self.labels = torch.from_numpy(labels)
        several = 1 < len(self.classes) <= len(found) // 2
        self.labelled = several and tells_classes(source)

    @torch.no_grad()
    def embed(self, encoder: nn.Module, batch: int = 128) -> Tensor:
        """[N, D] of length one, on the CPU; the encoder is left as it was."""
        training, device = encoder.training, next(encoder.parameters()).device
        encoder.eval()
        try:
            rows = [
                encoder(self.pixels.decoded.normalise(part, device)).float().cpu() for part in self.images.split(batch)
            ]
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
            files=np.array([self.source.name(i) for i in self.indices]),
            root=naming.absolute(self.source.root),
            labels=self.labels.numpy(),
            classes=np.array(self.classes),
            images=len(self.source),
            labelled=self.labelled,
        )
        return file.getvalue()


class Watch:
    """What a run calls on all ranks after each step, and when it is over; the first one does it.

    kNN and embeddings are measured every `Config.knn_every` epochs; 0: at the start and at the end only; None: a
    twentieth of the run, at least one.

    Args:
        journal: is told the figures, and what there is to be said.
    """

    def __init__(self, training: Training, journal: Journal):
        self.training = training
        self.out = training.out
        self.journal = journal
        self.say = journal.say
        self.active = training.ranks.first
        self.sample: SampleImages | None = None
        self.log: Metrics | None = None
        self.written_at = -math.inf
        self.cost = 0.0  # seconds that writing the page took
        self.failed = False
        self.accuracy: float | None = None  # of kNN at the last step that was measured, where there are labels
        every = training.config.knn_every
        if every is None:
            every = max(math.ceil(training.steps / training.steps_per_epoch / 20), 1)
        self.every_steps = max(round(every * training.steps_per_epoch), 1) if every else 0

    def begin(self) -> None:
        def work() -> None:
            facts = json.dumps(self._facts(), indent=2) + "\n"
            write_atomically(self.out / "environment.json", facts.encode())
            self.sample = SampleImages(self.training.source, self.training.pixels)
            if parts_not_classes(self.sample.classes):
                folders = ", ".join(self.sample.classes)
                self.say(
                    f"no kNN: the folders {folders} are parts of a data set, no classes; all of them are trained on"
                )
            elif "" in self.sample.classes and len(self.sample.classes) > 1:
                folders = ", ".join(name for name in self.sample.classes if name)
                self.say(
                    f"no kNN: images lie beside the folders ({folders}), so that these are no classes of all of them"
                )
            self.log = Metrics(self.out, self.training.start, "knn.jsonl")
            if not (self.training.start and (self.out / "embeddings.npz").exists()):
                self.measure(self.training.start, encoder)

        encoder = self.training.whole_encoder()
        self.guarded(work)

    def _facts(self) -> dict[str, Any]:
        """What the run knows of itself and its other files don't tell."""
        training = self.training
        return {
            "steps": training.steps,
            "steps_per_epoch": training.steps_per_epoch,
            "patch": training.step.encoder.patch,
            "ranks": training.ranks.size,
            "images": len(training.source),
            "classes": max(len(training.source.classes), 1),
            **versions(),
            "device": describe(training.ranks.device),
        }

    def measures(self, done: int) -> bool:
        """Whether the first rank measures behind that step, which all ranks say alike."""
        return done == self.training.steps or (self.every_steps > 0 and done % self.every_steps == 0)

    def after_step(self, done: int) -> None:
        """Before the checkpoint of that step, so that a resumed run lacks no measurement."""
        self.accuracy = None
        if self.measures(done):
            encoder = self.training.whole_encoder()
            self.guarded(lambda: self.measure(done, encoder))

    def refresh(self) -> None:
        """After a checkpoint."""
        if self.training.config.report and time.monotonic() - self.written_at > self.cost / SHARE_OF_TIME:
            self.guarded(self.write)

    def end(self) -> None:
        if self.training.config.report:
            self.guarded(lambda: self.write(last=True))
        if self.log:
            self.log.close()

    def measure(self, step: int, encoder: nn.Module) -> None:
        if self.sample is None:
            return
        rows = self.sample.embed(encoder)
        if self.sample.labelled and self.log:
            accuracy = self.accuracy = self.sample.knn(rows)
            epoch = step / self.training.steps_per_epoch
            guess = majority(self.sample.labels, self.sample.labels)
            row = {"step": step, "epoch": epoch, "knn": accuracy, "images": len(rows), "majority": guess}
            self.journal.measured(step, {"knn": accuracy, "knn_majority": guess})
            of_teacher = {"teacher": True} if self.training.config.teacher else {}
            self.log.write({**row, "classes": len(self.sample.classes), **of_teacher})
            whose = " of the momentum encoder" if of_teacher else ""
            self.say(
                f"kNN {accuracy:.1%}{whose} on {len(rows)} images after epoch {epoch:.4g} "
                f"(always the largest class: {guess:.1%})"
            )
        write_atomically(self.out / "embeddings.npz", self.sample.pack(rows, step))

    def write(self, last: bool = False) -> None:
        begin = time.monotonic()
        write(self.out, tsne=last, trusted=True)
        self.written_at = time.monotonic()
        self.cost = self.written_at - begin

    def guarded(self, work: Callable[[], None]) -> None:
        if not self.active:
            return
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
