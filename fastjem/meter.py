"""The figures of a run's logged steps."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastjem import health
from fastjem.build import Training

EARLY_STEPS = 100  # in which every fifth step is logged: collapse is early
ROWS = 20  # that even the shortest run has, as far as it has steps
Row = tuple[int, dict[str, Any]]


@dataclass
class Taken:
    """One optimiser step that was taken."""

    done: int  # steps so far
    images: int  # of this rank
    waited: float  # seconds for data
    losses: list[Tensor]  # of its micro-batches, 0-dim
    notes: dict[str, Any]  # of the last of them
    gradient_norm: Tensor | None  # before clipping
    scheduled: dict[str, Tensor]  # learning rate, weight decay, momentum


def _ranks(event: torch.cuda.Event, spectra: dict[str, Tensor]) -> dict[str, float]:
    """The figures of matrices that are on their way to the host until the event."""
    event.synchronize()
    return {name: health.rank_of_spectrum(gram).item() for name, gram in spectra.items()}


@dataclass
class Pending:
    """A row whose figures may still be on their way from the device."""

    done: int
    names: list[str]  # of the figures
    values: Tensor  # the figures, then the losses of all steps since the row before
    first: int  # the step of the first of these losses
    event: torch.cuda.Event | None
    known: dict[str, Any]
    spectra: Future[dict[str, float]] | None = None  # figures that are computed beside the steps


class Meter:
    """The figures of logged steps, each given one logged step late: no step waits for the device to know its loss.

    `diverges_from` is the first step whose loss wasn't finite, as far as it is known; None while losses are.
    """

    def __init__(self, training: Training):
        self.training = training
        self.pending: Pending | None = None
        self.losses: list[Tensor] = []  # of the steps since the last row
        self.first = training.start + 1  # the step of the first of them
        self.diverges_from: int | None = None
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()
        # Where steps are a GPU's, a thread waits for what has to be solved on the host, and solves it.
        asynchronous = training.ranks.device.type == "cuda"
        self.beside = ThreadPoolExecutor(1, "fastjem-figures") if asynchronous else None

    def rows(self, taken: Taken) -> Iterator[Row]:
        """The rows that are ready now; on the CPU this step's own, elsewhere those of the logged step before."""
        self.images += taken.images
        self.waited += taken.waited
        self.losses += taken.losses
        if not self.logs(taken.done):
            return
        yield from self.waiting()
        known, spectra = health.on_device(taken.notes)
        figures = {"loss": torch.stack(taken.losses).mean(), **known}
        if not self.beside:
            figures |= {name: health.rank_of_spectrum(gram) for name, gram in spectra.items()}
        if taken.gradient_norm is not None:
            figures["gradient_norm"] = taken.gradient_norm
        if self.training.scaler and (scale := self.training.scaler._get_scale_async()) is not None:
            figures["loss_scale"] = scale  # get_scale() would wait for the device
        values = torch.stack([value.float() for value in (*figures.values(), *self.losses)])
        event = None
        ranks = None
        if self.beside is not None:
            values = values.to("cpu", non_blocking=True)
            on_host = {name: gram.to("cpu", non_blocking=True) for name, gram in spectra.items()}
            event = torch.cuda.Event()
            event.record()
            ranks = self.beside.submit(_ranks, event, on_host)
        scheduled = {name: value.item() for name, value in taken.scheduled.items()} | self._rates()
        self.pending = Pending(taken.done, list(figures), values, self.first, event, scheduled, ranks)
        self.losses = []
        self.first = taken.done + 1
        if event is None:
            yield from self.waiting()

    def waiting(self) -> Iterator[Row]:
        """The row that isn't given yet, if there is one; its figures are waited for."""
        row = self.pending
        if row is None:
            return
        self.pending = None
        if row.event is not None:
            row.event.synchronize()
        values = row.values.tolist()
        count = len(row.names)
        self._look_at(row.first, values[count:])
        spectra = row.spectra.result() if row.spectra is not None else {}
        yield row.done, {**row.known, **dict(zip(row.names, values[:count], strict=True)), **spectra}

    def _look_at(self, first: int, losses: list[float]) -> None:
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad:
            self.diverges_from = None
        elif self.diverges_from is None:
            self.diverges_from = first + bad[0] // self.training.config.accumulate

    def logs(self, done: int) -> bool:
        """Whether a step is one of those that are logged, which all ranks say alike."""
        every = min(self.training.config.log_every, max(self.training.steps // ROWS, 1))
        return done % every == 0 or done == self.training.steps or (done < EARLY_STEPS and done % 5 == 0)

    def _rates(self) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = now - self.since
        rates = {"images_per_second": self.images / elapsed, "data_wait": min(self.waited / elapsed, 1.0)}
        self.images = 0
        self.waited = 0.0
        self.since = now
        return rates
