"""Replays of a step that is captured once are steps: every method, with a recorder in the place of a CUDA graph."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import HAS_GPU
from recorder import Recorder
from test_methods import make
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastjem import optim, step_graph
from fastjem.data.batch import Batch
from fastjem.data.masking import drawn_masks, mask_specs
from fastjem.errors import UserError
from fastjem.methods import METHODS, hidden, ibot, simdino
from fastjem.ops import direct
from fastjem.step import Step, StepEnd
from fastjem.step_graph import CudaGraph, Graph, StepGraph
from fastjem.stepping import Work, seed_generators

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6  # of which two come before the captured one
IMAGES = 8


@pytest.fixture(autouse=True)
def soon_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "WARM", 2)
    monkeypatch.setattr(step_graph, "FRESH", 1)
    # as on a GPU, where the host doesn't look how many patches are hidden
    for module in (ibot, simdino):
        monkeypatch.setattr(module, "hidden_rows", partial(hidden.hidden_rows, padded=True))


def training_of(step: Step, *, optimizer: str, clip: float, accumulate: int, device: str) -> Any:
    """What `Work` asks of a run."""
    made = optim.build(optimizer, optim.parameter_groups(step, step.method.constant_rate))
    assert isinstance(made, optim.Fused)
    made.attach_teacher(*step.teacher_and_student())
    step.train()
    return SimpleNamespace(
        step=step, model=step, optimizer=made, schedule=optim.Schedule(steps=20, learning_rate=0.01, weight_decay=0.1),
        step_end=StepEnd(step), ranks=SimpleNamespace(device=torch.device(device), rank=0, group=None),
        config=SimpleNamespace(accumulate=accumulate), clip=clip, scaler=None, passes=None, autocast=None,
    )  # fmt: skip


def batch_of(step: Step, like: Batch, number: int) -> Batch:
    """Other images, in other masks."""
    generator = torch.Generator().manual_seed(number)
    views = [torch.randn(view.shape, generator=generator) for view in like.views]
    index = (like.index + number) % IMAGES
    specs = mask_specs(step.method.views, 32, 8)
    masks = {spec.view: drawn_masks(spec, 5, number, index) for spec in specs}
    return like._replace(views=views, index=index, labels=index % 3, masks=masks)


def steps_of(
    name: str,
    graph: Callable[[], Graph] | None,
    device: str = "cpu",
    made: Callable[[], Any] | None = None,
    **given: Any,
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """The losses and norms of some steps, the state behind them, and who took them."""
    step, like = (made or partial(make, name))()
    step = step.to(device)
    training = training_of(step, device=device, **{"optimizer": "adamw", "clip": 1.0, "accumulate": 1, **given})
    work = Work(training)
    by_graph = None if graph is None else StepGraph(work, graph, must=True, say=print)
    figures = []
    for done in range(STEPS):
        seed_generators(3, done, training.ranks)
        work.begins(done)
        numbers = range(done * training.config.accumulate, (done + 1) * training.config.accumulate)
        batches = [tree_map_only(Tensor, lambda x: x.to(device), batch_of(step, like, number)) for number in numbers]
        with direct.off():  # a recorder sees what goes through the dispatcher, which has other kernels for a few rows
            found = work.take(batches) if by_graph is None else by_graph.take(batches)
        figures += [x.clone() for x in (*found.losses, found.gradient_norm) if x is not None]
    return figures, step.state_dict(), by_graph


def compare(name: str, graph: Callable[[], Graph], device: str = "cpu", **given: Any) -> StepGraph:
    expected, state, _ = steps_of(name, None, device, **given)
    found, replayed, by_graph = steps_of(name, graph, device, **given)
    assert by_graph.found is not None and not by_graph.refused
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), f"{name}: figure {number} is {b} and was {a}"
    for key, value in state.items():
        assert torch.equal(value, replayed[key]), f"{name}: {key}"
    return by_graph


# The others take a second or more each.
QUICK = {"simclr", "moco", "swav", "wmse", "smog", "tico", "lejepa", "simsiam"}
NAMES = [
    pytest.param(name, marks=pytest.mark.exhaustive if name not in QUICK else ()) for name in METHODS if name != "ijepa"
]


@pytest.mark.parametrize("name", NAMES)
def test_replays_of_a_step_are_steps(name: str) -> None:
    compare(name, Recorder)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ijepa", "mmcr", "vicregl")])
def test_replays_of_a_step_are_steps_on_a_gpu(name: str) -> None:
    compare(name, lambda: CudaGraph(torch.device("cuda")), "cuda")


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "larc"])
def test_of_every_optimizer_and_of_several_batches(optimizer: str) -> None:
    compare("byol", Recorder, optimizer=optimizer, clip=0.0, accumulate=2)


class Counts(nn.Module):
    """An encoder that decides on the host: every other step it looks at the images upside down."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.head = nn.Linear(3 * 32, 12)

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        return self.head(images.mean(3).flatten(1)) * (1 + self.seen % 2)


def test_what_the_host_decides_is_found() -> None:
    """The recorder bites: a step that differs by a number of the host's isn't what its replays are."""

    def made() -> tuple[Step, Batch]:
        step, batch = make("simclr")
        return Step(Counts(), step.method), batch

    with pytest.raises(AssertionError, match="figure"):
        compare("simclr", Recorder, made=made)


def test_rates_and_momentum_follow_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `refresh` a replay has the rates of the captured step."""
    monkeypatch.setattr(optim.Fused, "refresh", lambda self, momentum=None: None)
    with pytest.raises(AssertionError, match="figure"):
        compare("byol", Recorder)


def test_batches_of_another_shape_have_a_graph_of_their_own() -> None:
    step, like = make("simclr")
    training = training_of(step, optimizer="adamw", clip=0.0, accumulate=1, device="cpu")
    work = Work(training)
    by_graph = StepGraph(work, Recorder, must=True, say=print)
    captured = []
    for done, rows in enumerate([8, 8, 8, 8, 4, 4, 4, 8]):
        batch = batch_of(step, like, done)
        smaller = batch._replace(views=[view[:rows] for view in batch.views], index=batch.index[:rows])
        work.begins(done)
        by_graph.take([smaller])
        captured.append(by_graph.found is not None)
    assert captured == [False, False, True, True, False, False, True, False]


class Fails(Recorder):
    def capture(self, work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_step_that_cant_be_captured_is_taken_as_it_is() -> None:
    said: list[str] = []
    expected, state, _ = steps_of("simclr", None)
    step, like = make("simclr")
    training = training_of(step, optimizer="adamw", clip=1.0, accumulate=1, device="cpu")
    work = Work(training)
    by_graph = StepGraph(work, Fails, must=False, say=said.append)
    found = []
    for done in range(STEPS):
        seed_generators(3, done, training.ranks)
        work.begins(done)
        with direct.off():
            taken = by_graph.take([batch_of(step, like, done)])
        found += [*taken.losses, taken.gradient_norm]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(state[key], value) for key, value in step.state_dict().items())
    why = "operation not permitted when stream is capturing"
    assert said == [f"--cuda-graph auto: a step's kernels are launched one by one: {why}"]
    by_graph = StepGraph(work, Fails, must=True, say=said.append)
    with pytest.raises(UserError, match=f"--cuda-graph on: the step can't be captured: {why}$"):
        for done in range(STEPS):
            by_graph.take([batch_of(step, like, done)])


def run_of(**given: Any) -> Any:
    """A run on a GPU whose step can be captured, but for what is given."""
    step, _ = make("simclr")
    training = training_of(step, optimizer="adamw", clip=0.0, accumulate=1, device="cuda")
    training.ranks.size = 1
    training.facts = {"objects": []}
    training.stages = []
    options = {"cuda_graph": "auto", "method": "simclr", "activation_checkpointing": False, "compile": False}
    training.config = SimpleNamespace(accumulate=1, **options)
    for path, value in given.items():
        owner, _, field = path.rpartition("__")
        setattr(getattr(training, owner) if owner else training, field, value)
    return training


REASONS = {
    "graphs are CUDA's": {"ranks__device": torch.device("cpu")},
    "ranks average": {"ranks__size": 2},
    "an optimizer of one's own": {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])},
    "fp16's scaler": {"scaler": torch.amp.GradScaler("cpu")},
    "--micro-batch": {"passes": object()},
    "--activation-checkpointing": {"config__activation_checkpointing": True},
    "--compile": {"config__compile": True},
    "another size in each step": {"stages": [SimpleNamespace(masks=[SimpleNamespace(masking="multi_block")])]},
    "waits for its singular values": {
        "step": SimpleNamespace(method=SimpleNamespace(no_graph=METHODS["mmcr"].no_graph))
    },
    "of one's own may decide": {"facts": {"objects": ["encoder"]}},
}


@pytest.mark.parametrize("reason", REASONS)
def test_who_cant_says_why_in_a_line(reason: str) -> None:
    training = run_of(**REASONS[reason])
    why = step_graph.why_not(training)
    assert reason in why and "\n" not in why
    told = step_graph.told(training)
    assert told == ("" if "CUDA's" in reason else f"--cuda-graph auto: a step's kernels are launched one by one: {why}")
    training.config.cuda_graph = "on"
    if "of one's own may decide" in reason:  # which the user says that it doesn't
        assert step_graph.told(training) == ""
    else:
        with pytest.raises(UserError, match="--cuda-graph on: the step of simclr can't be captured: "):
            step_graph.told(training)


def test_who_can_says_nothing() -> None:
    training = run_of()
    assert step_graph.why_not(training) == step_graph.told(training) == ""
