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

**A graph is checked** before it is believed: the step in which it is captured is taken launch by launch, undone, and
taken by the graph, which must come to the same bits. Where the step itself doesn't repeat them (cuDNN adds some
gradients by atomics), losses must agree to `CLOSE`.

**Unseen**: written for a GPU and tested on the CPU with a recorder in the graph's place.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastjem import optim, precision
from fastjem.build import Training
from fastjem.capture import OTHERS, BrokenError, capturing, first_line
from fastjem.data.batch import Batch
from fastjem.errors import UserError
from fastjem.methods import METHODS

WARM = 4  # steps before a step is captured: two that make their gradients anew, two that keep them
FRESH = 2  # of these, those that make their gradients anew
CLOSE = 1e-3  # losses of a step and of its replay, one to the other, where the step doesn't repeat its own bits
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by the bytes of an element
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

    def seeds(self) -> None:
        """Generators as they were when the step began."""
        ...

    def state(self) -> list[Tensor]:
        """All that a step changes, but gradients."""
        ...


class Marks(NamedTuple):
    """What a step has come to."""

    figures: list[float]  # losses, and the gradients' norm
    bits: list[int]  # sums over these and each tensor of the state, read as integers


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
        pool = torch.cuda.graph_pool_handle()
        try:
            with capturing(graph, self.stream, pool, capture_error_mode=OTHERS):
                found = work()
        except BrokenError as error:
            raise UserError(
                f"--cuda-graph: the step can't be captured ({first_line(error.__cause__ or error)}), and torch can't "
                f"go on behind that ({error}): --cuda-graph off --resume goes on from the last checkpoint"
            ) from error
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
        self.differ = False  # steps in the parameters that they reach
        self._begin_with(None)

    def _begin_with(self, shapes: Any) -> None:
        self.shapes = shapes
        self.taken = 0  # steps of batches of these shapes
        self.checked = False  # nothing is left to be found by comparing the graph with the step
        self._without_graph()

    def _without_graph(self) -> None:
        self.found: Found | None = None  # what the captured step writes: None before it is captured
        self.batches: list[Tensor] = []  # what it reads
        self.gradients: list[Tensor | None] = []  # those that the graph writes, held as long as it is
        self.reached: set[int] | None = None  # parameters that the step before has given a gradient
        self.graph = self.make()

    def take(self, batches: list[Batch]) -> Found:
        """A step of an accumulation's batches."""
        if self.differ and not self.refused:  # said behind the step that showed it: its end is one to go on from
            self._refuse("not every step reaches the same parameters")
        if self.refused:
            return self.work.take(batches)
        tensors, structure = pytree.tree_flatten(batches)
        shapes = structure, [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in tensors]
        if shapes != self.shapes:
            self._begin_with(shapes)
        if self.found is not None:
            return self._replayed(tensors)
        if self.taken < WARM:
            return self._taken_as_it_is(batches)
        if not self.checked:
            return self._checked(batches, tensors, structure)
        why = self._capture(tensors, structure)
        if why:
            self._refuse(why)
            return self.work.take(batches)
        return self._replayed(tensors)

    def _replayed(self, tensors: list[Any]) -> Found:
        assert self.found is not None
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
        self.work.keep_gradients = self.taken >= FRESH
        found = self.graph.warm(lambda: self.work.take(batches))
        self.taken += 1
        reached = {i for i, p in enumerate(self.work.parameters) if p.grad is not None}
        self.differ = self.differ or (self.reached is not None and reached != self.reached)
        self.reached = reached
        return found

    def _checked(self, batches: list[Batch], tensors: list[Any], structure: Any) -> Found:
        """A step as it is, captured, undone and replayed."""
        before = [x.detach().to("cpu", copy=True) for x in self.work.state()]
        found = self._taken_as_it_is(batches)
        if self.differ:
            return found
        own = self._marks(found)
        try:
            why = self._capture(tensors, structure)
        except Exception:
            self._undo(before)
            raise
        if why:
            self._refuse(why, before)
            return found
        self._undo(before)
        replayed = self._replayed(tensors)
        marks = self._marks(replayed)
        self.checked = True
        if marks.bits == own.bits:
            return replayed
        self._without_graph()  # the step may need its memory
        self._undo(before)
        found = self._taken_as_it_is(batches)
        repeats = self._marks(found).bits == own.bits
        near = all(map(are_near, own.figures, marks.figures))
        if repeats or not near:
            came = f"loss {marks.figures[0]:.9g} in place of {own.figures[0]:.9g}"
            self._refuse(f"the graph of a step doesn't come to what the step does ({came})", before)
        return found

    def _capture(self, tensors: list[Any], structure: Any) -> str:
        """Note a step of copies of these batches; why it can't be noted, in a line."""
        static = [x.clone() if isinstance(x, Tensor) else x for x in tensors]
        batches: list[Batch] = pytree.tree_unflatten(static, structure)
        self._refresh()
        self.gradients = [p.grad for p in self.work.parameters]
        try:
            self.found = self.graph.capture(lambda: self.work.take(batches))
        except Exception as error:
            training = self.work.training
            training.step_end.ends()  # nothing has run
            precision.broken_off(training.scaler, training.optimizer)
            if isinstance(error, RuntimeError):
                return first_line(error)
            raise
        self.batches = [x for x in static if isinstance(x, Tensor)]
        return ""

    def _marks(self, found: Found) -> Marks:
        figures = [x for x in (*found.losses, found.gradient_norm) if x is not None]
        tensors = [x.detach() for x in (*figures, *self.work.state())]
        bits = [int(x.view(BITS[x.element_size()]).sum(dtype=torch.long)) for x in tensors]
        return Marks([float(x) for x in figures], bits)

    @torch.no_grad()
    def _undo(self, before: list[Tensor]) -> None:
        """The state and the generators that a step began with."""
        for x, copied in zip(self.work.state(), before, strict=True):
            there = copied.to(x.device)
            if not torch.equal(x, there):  # what nobody writes may be a tensor that can't be written
                x.copy_(there)
        self.work.seeds()

    def _refresh(self) -> None:
        optimizer = self.work.training.optimizer
        if isinstance(optimizer, optim.Fused):
            optimizer.refresh(self.work.momentum)

    def _refuse(self, why: str, before: list[Tensor] | None = None) -> None:
        """No graph from now on. before: the state to go back to, where the run can't go on."""
        if self.must:
            if before is not None:
                self._undo(before)
            raise UserError(f"--cuda-graph on: the step can't be captured: {why}")
        self.say(f"--cuda-graph auto: {ONE_BY_ONE}: {why}")
        self.refused = True
        self.work.keep_gradients = False
        self.gradients = []


def are_near(a: float, b: float) -> bool:
    """NaN is near itself: the norm of a step whose scaled loss overflows."""
    return math.isclose(a, b, rel_tol=CLOSE) or (math.isnan(a) and math.isnan(b))


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
