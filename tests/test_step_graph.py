"""Replays of a step that is captured once are steps: every method, with a recorder in the place of a CUDA graph."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import HAS_GPU
from recorder import Recorder
from test_methods import make
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastjem import optim, precision, step_graph
from fastjem.capture import first_line
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


def training_of(
    step: Step, *, optimizer: str, clip: float, accumulate: int, device: str,
    scaler: Callable[[], Any] = lambda: None, autocast: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """What `Work` asks of a run."""
    made = optim.build(optimizer, optim.parameter_groups(step, step.method.constant_rate))
    assert isinstance(made, optim.Fused)
    made.attach_teacher(*step.teacher_and_student())
    step.train()
    return SimpleNamespace(
        step=step, model=step, optimizer=made, schedule=optim.Schedule(steps=20, learning_rate=0.01, weight_decay=0.1),
        step_end=StepEnd(step), ranks=SimpleNamespace(device=torch.device(device), rank=0, group=None),
        config=SimpleNamespace(accumulate=accumulate, seed=3), clip=clip, scaler=scaler(), passes=None,
        autocast=autocast,
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
    must: bool = True,
    say: Callable[[str], None] = print,
    **given: Any,
) -> tuple[list[Tensor], dict[str, Tensor], Any]:
    """The losses and norms of some steps, the state behind them, and who took them."""
    step, like = (made or partial(make, name))()
    step = step.to(device)
    training = training_of(step, device=device, **{"optimizer": "adamw", "clip": 1.0, "accumulate": 1, **given})
    work = Work(training)
    by_graph = None if graph is None else StepGraph(work, graph, must=must, say=say)
    figures = []
    for done in range(STEPS):
        seed_generators(3, done, training.ranks)
        work.begins(done)
        numbers = range(done * training.config.accumulate, (done + 1) * training.config.accumulate)
        batches = [tree_map_only(Tensor, lambda x: x.to(device), batch_of(step, like, number)) for number in numbers]
        with direct.off():  # a recorder sees what goes through the dispatcher, which has other kernels for a few rows
            found = work.take(batches) if by_graph is None else by_graph.take(batches)
        figures += [x.clone() for x in (*found.losses, found.gradient_norm) if x is not None]
    of_scaler = {f"scaler {i}": x for i, x in enumerate(precision.state_of(training.scaler))}
    return figures, step.state_dict() | of_scaler, by_graph


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but that NaN is NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def compare(name: str, graph: Callable[[], Graph], device: str = "cpu", **given: Any) -> StepGraph:
    expected, state, _ = steps_of(name, None, device, **given)
    found, replayed, by_graph = steps_of(name, graph, device, **given)
    assert by_graph.found is not None and not by_graph.refused
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert same(a, b), f"{name}: figure {number} is {b} and was {a}"
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


def overflowing() -> torch.amp.GradScaler:
    """Some of its steps overflow, and change no weight; all others double the scale."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)


@pytest.mark.parametrize(("name", "clip", "accumulate"), [("simclr", 1.0, 1), ("byol", 0.0, 2)])
def test_of_a_scaled_loss(name: str, clip: float, accumulate: int) -> None:
    given: Any = {"scaler": overflowing, "clip": clip, "accumulate": accumulate}
    by_graph = compare(name, Recorder, **given)
    halved = sum(bool(call[0] is torch.ops.aten._amp_update_scale_.default) for call in by_graph.graph.calls)
    assert halved == 1  # it is a part of what is replayed, as is the look at the gradients
    if clip:
        scales = [2.0**power for power in (119, 120, 121, 120, 119, 120)]  # three steps of six overflow
        assert by_graph.work.training.scaler.get_scale() == scales[-1]


def test_figures_of_an_overflow_are_near_each_other() -> None:
    """A step that doesn't repeat its bits is compared by them."""
    inf, nan = float("inf"), float("nan")
    assert all(step_graph.are_near(a, a) for a in (1.0, inf, nan)) and step_graph.are_near(1.0, 1.0005)
    assert not any(step_graph.are_near(*both) for both in ((1.0, 1.01), (nan, 1.0), (1.0, nan), (inf, 1.0), (inf, nan)))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_of_a_scaled_loss_on_a_gpu(name: str) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=1)

    compare(name, lambda: CudaGraph(torch.device("cuda")), "cuda", scaler=scaler, autocast=torch.float16)


class Counts(nn.Module):
    """An encoder that decides on the host: in some of its calls it looks at the images twice as large."""

    def __init__(self, large: Callable[[int], bool]) -> None:
        super().__init__()
        self.seen = 0
        self.large = large
        self.head = nn.Linear(3 * 32, 12)

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        return self.head(images.mean(3).flatten(1)) * (1 + self.large(self.seen))


def counting(large: Callable[[int], bool]) -> tuple[Step, Batch]:
    step, batch = make("simclr")
    return Step(Counts(large), step.method), batch


def test_what_the_host_decides_is_found() -> None:
    """The recorder bites: a step that differs by a number of the host's isn't what its replays are."""
    with pytest.raises(AssertionError, match="figure"):
        compare("simclr", Recorder, made=lambda: counting(lambda seen: seen >= STEPS))


WRONG = "the graph of a step doesn't come to what the step does"


def test_a_graph_that_isnt_the_step_is_refused() -> None:
    """Every other call differs: the captured one isn't the one that it is compared with, which repeats itself."""
    expected, state, _ = steps_of("simclr", None, made=lambda: counting(lambda seen: seen % 2 == 0))
    said: list[str] = []
    made = partial(counting, lambda seen: seen % 2 == 0)
    found, kept, by_graph = steps_of("simclr", Recorder, made=made, must=False, say=said.append)
    assert by_graph.refused
    assert len(said) == 1 and WRONG in said[0]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(value, kept[key]) for key, value in state.items())
    with pytest.raises(UserError, match=f"--cuda-graph on: the step can't be captured: {WRONG}"):
        steps_of("simclr", Recorder, made=made)


class Noisy(nn.Module):
    """A step that doesn't repeat its own bits, as a GPU's sums by atomics don't."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.seen = 0
        self.head = nn.Linear(3 * 32, 12)

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        return self.head((images.mean(3) + self.size * self.seen * images[..., 0]).flatten(1))


@pytest.mark.parametrize(("size", "refused"), [(1e-7, False), (1.0, True)])
def test_a_step_that_doesnt_repeat_itself_is_compared_by_its_loss(size: float, refused: bool) -> None:
    def made() -> tuple[Step, Batch]:
        step, batch = make("simclr")
        return Step(Noisy(size), step.method), batch

    said: list[str] = []
    _, _, by_graph = steps_of("simclr", Recorder, made=made, must=False, say=said.append)
    assert by_graph.refused == refused == bool(said)
    assert (by_graph.found is None) == refused


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
        with direct.off():
            by_graph.take([smaller])
        captured.append(by_graph.found is not None)
    assert captured == [False, False, True, True, False, False, True, False]


class Fails(Recorder):
    """Half of the work is done when CUDA refuses; the end of the capture then says less than its middle."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of

    def capture(self, work: Callable[[], Any]) -> Any:
        buffers, random = [(x, x.clone()) for x in self.of.step.buffers()], torch.get_rng_state()
        self.of.step_end.begins()
        self.of.step_end.moves()
        if self.of.scaler is not None:
            self.of.scaler.unscale_(self.of.optimizer)
            self.of.optimizer.grad_scale = torch.tensor(2.0)
        for x, copy in buffers:
            x.copy_(copy)
        torch.set_rng_state(random)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("scaler", [lambda: None, lambda: torch.amp.GradScaler("cpu")], ids=["fp32", "fp16"])
def test_a_step_that_cant_be_captured_is_taken_as_it_is(scaler: Callable[[], Any]) -> None:
    said: list[str] = []
    expected, state, _ = steps_of("simclr", None, scaler=scaler)
    step, like = make("simclr")
    training = training_of(step, optimizer="adamw", clip=1.0, accumulate=1, device="cpu", scaler=scaler)
    work = Work(training)
    by_graph = StepGraph(work, partial(Fails, training), must=False, say=said.append)
    found = []
    for done in range(STEPS):
        seed_generators(3, done, training.ranks)
        work.begins(done)
        with direct.off():
            taken = by_graph.take([batch_of(step, like, done)])
        found += [*taken.losses, taken.gradient_norm]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(state[key], value) for key, value in step.state_dict().items())
    assert all(torch.equal(state[f"scaler {i}"], x) for i, x in enumerate(precision.state_of(training.scaler)))
    why = "operation not permitted when stream is capturing"
    assert said == [f"--cuda-graph auto: a step's kernels are launched one by one: {why}"]


def test_a_run_that_ends_there_can_be_saved() -> None:
    """`--cuda-graph on`: the model is that of the step before, and known to be."""
    step, like = make("simclr")
    training = training_of(step, optimizer="adamw", clip=1.0, accumulate=1, device="cpu")
    work = Work(training)
    by_graph = StepGraph(work, partial(Fails, training), must=True, say=print)
    for done in range(2):
        work.begins(done)
        by_graph.take([batch_of(step, like, done)])
    state = {key: value.clone() for key, value in step.state_dict().items()}
    moments = [x.clone() for x in work.state()]
    work.begins(2)
    why = "operation not permitted when stream is capturing"
    with pytest.raises(UserError, match=f"--cuda-graph on: the step can't be captured: {why}$"):
        by_graph.take([batch_of(step, like, 2)])
    assert training.step_end.restore()
    assert all(torch.equal(state[key], value) for key, value in step.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(moments, work.state(), strict=True))


class CapturesBadly:
    """In the place of torch.cuda.graph: the first one ends as an invalid capture does in torch 2.11."""

    calls: ClassVar[list[str]] = []

    def __init__(self, graph: Any, **options: Any) -> None:
        assert options["capture_error_mode"] == "thread_local"  # else the loader's thread, which pins, ends it
        self.bad = options.get("pool") is not None

    def __enter__(self) -> None:
        self.calls.append("begin" if self.bad else "begin anew")

    def __exit__(self, *of: object) -> None:
        self.calls.append("end")
        if self.bad:
            raise RuntimeError("operation failed due to a previous error during capture")


class Unended:
    def pool(self) -> Any:
        raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")


def test_an_invalid_capture_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is left, its memory given back, and the generator ends capturing, by a capture that ends well."""
    calls = CapturesBadly.calls
    calls.clear()
    stream = SimpleNamespace(device_index=0, device=torch.device("cpu"))
    fakes = {
        "graph": CapturesBadly, "CUDAGraph": Unended, "graph_pool_handle": lambda: (0, 7),
        "Stream": lambda device: stream, "current_stream": lambda device: "outside",
        "set_stream": lambda given: calls.append(f"on {given}"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        told = partial(lambda name, device, pool: calls.append(f"{name} {pool}"), name)
        monkeypatch.setattr(torch._C, name, told, raising=False)
    graph = CudaGraph(torch.device("cpu"))

    def work() -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error") as raised:
        graph.capture(work)
    assert first_line(raised.value) == "operation not permitted when stream is capturing"
    freed = ["_cuda_endAllocateToPool (0, 7)", "_cuda_releasePool (0, 7)"]
    assert calls == ["begin", "end", "on outside", *freed, "begin anew", "end"]
    assert graph.graph is None

    def refuses(*of: Any) -> None:
        raise RuntimeError("driver is gone")

    monkeypatch.setattr(torch._C, "_cuda_releasePool", refuses, raising=False)
    with pytest.raises(UserError, match=r"when stream is capturing\).*\(driver is gone\): --cuda-graph off --resume"):
        graph.capture(work)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_gpu_goes_on_behind_an_invalid_capture() -> None:
    """Random numbers, memory that another stream has used, and the next capture."""
    device = torch.device("cuda")
    graph = CudaGraph(device)
    x = torch.ones(1 << 20, device=device)

    def waits() -> Any:
        return x.sum().item()

    with pytest.raises(RuntimeError) as raised:
        graph.capture(waits)
    assert "captur" in first_line(raised.value)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert 0 < torch.rand(1000, device=device).mean() < 1
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        y = torch.empty(1 << 22, device=device)
        y.record_stream(side)
        del y
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= before + (1 << 25)
    graph = CudaGraph(device)
    graph.capture(lambda: x.add_(torch.rand_like(x)))  # type: ignore[arg-type,return-value]
    graph.replay()
    assert 1.4 < x.mean() < 1.6


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
