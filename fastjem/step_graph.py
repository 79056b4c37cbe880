"""The whole step as one CUDA graph: `--cuda-graph`.

A step of a small encoder is some thousand launches, each 3 to 10 us of the host's; a graph of them is one. The first
steps of a run are taken one launch at a time (`WARM`), beside the stream that they would be on, as capturing needs it.
The next one is captured: nothing runs, every launch is written down with the addresses that it reads and writes. From
then on a step is: the batch is copied to where the captured step reads it, what changes on the host is written to where
it reads that (rates, momentum, the step's number, the generator's seed), and the graph is launched.

So nothing that a step decides on the host may differ between two steps. `why_not` says of a run, in a line, why its
step can't be captured; `tests/test_step_graph.py` replays recorded steps of every method and compares them with steps.

**Random numbers.** torch registers its generator with each graph: a replay takes the seed and the offset that the
generator has then, and `seed_generators` gives it those of the step. So a replay draws what the step would have drawn.

**Gradients** keep their memory, of which the optimiser's table of addresses is made, and begin each step with zeros.

**Unseen**: written for a GPU and tested on the CPU with a recorder in the graph's place.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastjem import optim
from fastjem.build import Training
from fastjem.data.batch import Batch
from fastjem.errors import UserError
from fastjem.methods import METHODS

WARM = 4  # steps before a step is captured: two that make their gradients anew, two that keep them
FRESH = 2  # of these, those that make their gradients anew
NO_GPU = "graphs are CUDA's, and the run is on another device"
ONE_BY_ONE = "a step's kernels are launched one by one"


class Found(NamedTuple):
    """What a step leaves for the log."""

    losses: list[Tensor]  # of its batches, 0-dim
    notes: dict[str, Any]  # of the last of them
    gradient_norm: Tensor | None  # before clipping


class StepWork(Protocol):
    """What is captured (`fastjem.stepping.Work`)."""

    training: Training
    parameters: list[torch.nn.Parameter]
    momentum: Tensor
    keep_gradients: bool

    def take(self, batches: Iterable[Batch]) -> Found: ...


class Graph(Protocol):
    """Who captures work, and replays it in the same memory."""

    def warm(self, work: Callable[[], Found]) -> Found:
        """The work itself, as capturing needs to have seen it."""
        ...

    def capture(self, work: Callable[[], Found]) -> Found:
        """Note the work, without doing it; what is returned is filled by each replay."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """torch's, on a stream of its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def warm(self, work: Callable[[], Found]) -> Found:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            found = work()
        current.wait_stream(self.stream)
        return found

    def capture(self, work: Callable[[], Found]) -> Found:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: the loader's, which pins batches.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            found = work()
        self.graph = graph
        return found

    def replay(self) -> None:
        if self.graph is not None:
            self.graph.replay()


class StepGraph:
    """Steps, of which the first are taken as they are, one is captured, and all others are replays of that.

    Batches of another shape (a run whose images grow) are taken as they are, and after as many as at the beginning
    another graph is made in place of the first.

    Args:
        work: of a step.
        graph: makes what captures and replays.
        must: a step that can't be captured is an error; else the run goes on without a graph.
        say: is told why, once.

    Raises:
        UserError: with `must`, where a step can't be captured, with the reason.
    """

    def __init__(self, work: StepWork, graph: Callable[[], Graph], *, must: bool, say: Callable[[str], None]):
        self.work = work
        self.make = graph
        self.must = must
        self.say = say
        self.refused = False
        self._begin_with(None)

    def _begin_with(self, shapes: Any) -> None:
        self.shapes = shapes
        self.graph = self.make()
        self.taken = 0  # steps of batches of these shapes
        self.batches: list[Tensor] = []  # what the captured step reads
        self.found: Found | None = None  # what it writes: None before it is captured
        self.reached: set[int] | None = None  # parameters that the first step has given a gradient
        self.gradients: list[Tensor | None] = []  # those that the graph writes, held as long as it is

    def take(self, batches: list[Batch]) -> Found:
        """A step of an accumulation's batches."""
        if self.refused:
            return self.work.take(batches)
        tensors, structure = pytree.tree_flatten(batches)
        shapes = structure, [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in tensors]
        if shapes != self.shapes:
            self._begin_with(shapes)
        if self.found is None and self.taken >= WARM:
            self._capture(tensors, structure)
        if self.found is None:
            return self._taken_as_it_is(batches)
        given = [x for x in tensors if isinstance(x, Tensor)]
        torch._foreach_copy_(self.batches, given, non_blocking=True)
        self._refresh()
        self.graph.replay()
        # Notes are looked at before the next step; losses and norms are kept until the next logged one.
        norm = self.found.gradient_norm
        return Found(
            [loss.clone() for loss in self.found.losses], self.found.notes, None if norm is None else norm.clone()
        )

    def _taken_as_it_is(self, batches: list[Batch]) -> Found:
        if self.refused:
            return self.work.take(batches)
        self.work.keep_gradients = self.taken >= FRESH
        found = self.graph.warm(lambda: self.work.take(batches))
        self.taken += 1
        if self.taken <= FRESH:
            reached = {i for i, p in enumerate(self.work.parameters) if p.grad is not None}
            if self.reached is not None and reached != self.reached:
                self._refuse("not every step reaches the same parameters")
            self.reached = reached
        return found

    def _capture(self, tensors: list[Any], structure: Any) -> None:
        """Note a step of copies of these batches."""
        static = [x.clone() if isinstance(x, Tensor) else x for x in tensors]
        batches: list[Batch] = pytree.tree_unflatten(static, structure)
        self._refresh()
        self.gradients = [p.grad for p in self.work.parameters]
        try:
            self.found = self.graph.capture(lambda: self.work.take(batches))
        except RuntimeError as error:
            self._refuse((str(error).splitlines() or [type(error).__name__])[0])
            return
        self.batches = [x for x in static if isinstance(x, Tensor)]

    def _refresh(self) -> None:
        optimizer = self.work.training.optimizer
        if isinstance(optimizer, optim.Fused):
            optimizer.refresh(self.work.momentum)

    def _refuse(self, why: str) -> None:
        if self.must:
            raise UserError(f"--cuda-graph on: the step can't be captured: {why}")
        self.say(f"--cuda-graph auto: {ONE_BY_ONE}: {why}")
        self.refused = True
        self.work.keep_gradients = False
        self.gradients = []


def of_run(training: Training, work: StepWork, say: Callable[[str], None]) -> StepGraph | None:
    """The steps of a run by a graph; None where that is off, or can't be.

    say: is told where the step can't be captured after all.
    """
    if training.config.cuda_graph == "off" or why_not(training):
        return None
    device = training.ranks.device
    return StepGraph(work, lambda: CudaGraph(device), must=training.config.cuda_graph == "on", say=say)


def told(training: Training) -> str:
    """What the user of a GPU is told of a step that can't be captured; "" where it can, or needn't.

    Raises:
        UserError: where `--cuda-graph on` asks for it.
    """
    chosen, why = training.config.cuda_graph, why_not(training)
    if chosen == "on" and why:
        raise UserError(f"--cuda-graph on: the step of {training.config.method} can't be captured: {why}")
    return f"--cuda-graph auto: {ONE_BY_ONE}: {why}" if chosen == "auto" and why and why != NO_GPU else ""


def why_not(training: Training) -> str:
    """Why a run's step can't be one CUDA graph, in a line; "" where it can."""
    config, method = training.config, training.step.method
    known = config.method in METHODS and "method" not in training.facts["objects"]
    reasons: Sequence[tuple[bool, str]] = (
        (training.ranks.device.type != "cuda", NO_GPU),
        (training.ranks.size > 1, "ranks average their gradients from the host"),
        (not isinstance(training.optimizer, optim.Fused), "an optimizer of one's own has its rates on the host"),
        (training.scaler is not None, "fp16's scaler of the loss has a new state in each step; bf16 has none"),
        (training.passes is not None, "--micro-batch sets the generators anew within a step"),
        (config.activation_checkpointing, "--activation-checkpointing sets the generators anew within a step"),
        (config.compile, "--compile has launches of its own"),
        (
            any(mask.masking == "multi_block" for stage in training.stages for mask in stage.masks),
            "its masks have another size in each step",
        ),
        (bool(method.no_graph), method.no_graph),
        (
            config.cuda_graph == "auto" and not (known and "encoder" not in training.facts["objects"]),
            "an encoder or a method of one's own may decide on the host; --cuda-graph on says that it doesn't",
        ),
    )
    return next((reason for holds, reason in reasons if holds), "")


__all__ = ["CudaGraph", "Found", "Graph", "StepGraph", "of_run", "told", "why_not"]
