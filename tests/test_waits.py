"""Nothing in a training step waits for the device: a step of every method on a device that holds no values.

That is torch's meta device: whatever reads a value there (`item`, `tolist`, an index by a mask, a branch on a tensor)
raises, and what is copied there from the host's memory, which a GPU's stream would be waited for, is told by `Watch`.
"""

import contextlib
import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import HAS_GPU
from test_methods import make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastjem import health
from fastjem.commands import host_steps
from fastjem.commands.tiny_runs import crops_of, finished, tiny_run
from fastjem.data.masking import drawn_masks, mask_specs
from fastjem.functional import held
from fastjem.meter import Meter, Row, Taken
from fastjem.methods import METHODS, needs_patches
from fastjem.nn import NTXentLoss
from fastjem.step import Step
from fastjem.stepping import Work

pytestmark = pytest.mark.usefixtures("one_thread")
META = torch.device("meta")
# Solvers that look at what they have done, on a GPU too: their method's loss waits for it.
SOLVERS = {"_linalg_svd", "_linalg_eigh", "linalg_eigh", "linalg_svd", "_linalg_det", "linalg_inv_ex"}
WAITING = {"mmcr": {"_linalg_svd"}}


class Watch(TorchDispatchMode):
    """What has no place in a step: copies between the host and the device, tensors of the host that aren't numbers, and
    solvers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.solvers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func._schema.name.rpartition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        on_host = [x for x in tensors if x.device.type == "cpu" and x.numel()]
        if len({x.device.type for x in tensors}) > 1 and name in ("_to_copy", "copy_"):
            self.found[name] += 1
        elif any(x.dim() for x in on_host):
            self.found[f"{name} on the host"] += 1
        if name in SOLVERS:
            self.solvers.add(name)
        return result


@pytest.fixture
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast doesn't know the meta device."""
    autocast = torch.autocast

    def known(device_type: str, *args: Any, **options: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **options)

    monkeypatch.setattr(torch, "autocast", known)


def on_meta(name: str, **options: Any) -> tuple[Step, Any]:
    step, batch = make(name, **options)
    return step.to(META), tree_map_only(Tensor, lambda x: x.to(META), batch)


# A second or more: what their images and masks go through is long.
SLOW = {"vicregl", "data2vec", "ijepa", "mae", "ibot", "dinov2", "dinov3", "simdinov2", "msn", "pmsn", "capi"}
NAMES = [pytest.param(name, marks=pytest.mark.exhaustive if name in SLOW else ()) for name in METHODS]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_value_of_the_device(name: str, without_autocast: None) -> None:
    step, batch = on_meta(name)
    number = torch.zeros((), dtype=torch.long, device=META)
    momentum = torch.zeros((), dtype=torch.float64, device=META)
    with Watch() as seen:
        loss, notes = step(batch, number)
        loss.backward()
        step.step_ends(number, momentum)
        health.on_device(notes)
    assert not seen.found
    assert seen.solvers == WAITING.get(name, set())


@pytest.mark.parametrize("name", ["deepcluster", "swav"])
def test_nor_does_one_whose_scores_arent_held(
    name: str, without_autocast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "LARGEST_SCORES", 0)
    step, batch = on_meta(name)
    number = torch.zeros((), dtype=torch.long, device=META)
    with Watch() as seen:
        step(batch, number)[0].backward()
    assert not seen.found


def test_losses_of_the_host_alone_index_by_no_mask(without_autocast: None) -> None:
    """A cross-entropy of one's own is given logits without the rows' own images."""
    criterion = NTXentLoss()
    criterion.cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    views = [torch.randn(5, 3, device=META, requires_grad=True) for _ in range(2)]
    criterion(*views).backward()


# The same on a GPU --------------------------------------------------------------------------------------------------


def step_in_which_waiting_is_an_error(name: str, device: torch.device, **fields: Any) -> None:
    """A whole step of a run, from a loader's crops to what moves behind it: torch raises at the call that waits."""
    if needs_patches(METHODS[name]) or name == "distill":
        pytest.importorskip("timm")
    with tiny_run(name, device, **fields) as (training, batch):
        work = Work(training)
        crops = crops_of(training)
        for done in range(3):  # kernels are compiled, moments are made, and it is seen which buffers move
            host_steps.step(work, done, batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            host_steps.step(work, 3, finished(training, crops, 3))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(bool(p.isfinite().all()) for p in work.parameters)


def a_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in WAITING])
def test_no_step_waits_on_a_gpu(name: str) -> None:
    step_in_which_waiting_is_an_error(name, a_gpu())


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", WAITING)
def test_who_is_said_to_wait_does_on_a_gpu(name: str) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        step_in_which_waiting_is_an_error(name, a_gpu())


OTHERS: dict[str, dict[str, Any]] = {
    "lars": {"optimizer": "lars"},
    "larc": {"optimizer": "larc"},
    "sgd": {"optimizer": "sgd"},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "unclipped": {"clip": 0.0},
}
NO_GPU_NEEDED = [name for name in OTHERS if name != "fp16"]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("other", OTHERS)
def test_nor_does_another_kind_of_step_on_a_gpu(other: str) -> None:
    step_in_which_waiting_is_an_error("byol", a_gpu(), **OTHERS[other])


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sync debug modes that are set, of a torch that has a GPU."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", said.append)
    return said


@pytest.mark.parametrize("which", ["simclr", "mmcr", "clip", "ibot", *NO_GPU_NEEDED])
def test_what_a_gpu_is_asked_runs_here(which: str, modes: list[str]) -> None:
    """The code of the tests above, on the CPU, where nothing is waited for."""
    name, fields = ("byol", OTHERS[which]) if which in OTHERS else (which, {})
    step_in_which_waiting_is_an_error(name, torch.device("cpu"), **fields)
    assert modes == ["synchronize", "error", "default"]


def test_the_mode_is_set_for_the_step_alone(modes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch, forward, backward and update are within, and no later test has it."""
    within: list[str] = []

    def waits(step: Step, *_: Any) -> None:
        within.append(modes[-1] if modes else "before")
        if within[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(Step, "step_ends", waits)
    with pytest.raises(RuntimeError, match="synchroniz"):
        step_in_which_waiting_is_an_error("simclr", torch.device("cpu"))
    assert within == ["before"] * 3 + ["error"] and modes[-1] == "default"


MASKED = [
    name for name, method in METHODS.items() if method.views.mask and name not in ("dinov2", "dinov3", "simdinov2")
]


@pytest.mark.parametrize("name", MASKED)
def test_masks_read_no_value_of_the_device(name: str) -> None:
    for spec in mask_specs(METHODS[name].views, 32, 8):
        with Watch() as seen:
            masks = drawn_masks(spec, 5, 0, torch.arange(8, device=META), 3)
        assert not seen.found and masks.hidden.device == META


class Later:
    """A CUDA event of a copy that ends when the test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        assert self.done.wait(20)


def test_spectra_are_solved_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With figures of a GPU: the logged step goes on while the copy is on its way, and the row is the CPU's."""
    events: list[Later] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: events.append(Later()) or events[-1])
    generator = torch.Generator().manual_seed(3)
    notes = {name: torch.randn(20, 6, generator=generator) for name in ("projection", "embedding")}
    rows = []
    for kind in ("cpu", "cuda"):
        config = SimpleNamespace(log_every=1, accumulate=1)
        ranks = SimpleNamespace(device=torch.device(kind))
        meter = Meter(SimpleNamespace(config=config, ranks=ranks, steps=40, start=0, scaler=None))  # type: ignore[arg-type]
        found: list[Row] = []
        for done in (2, 4):
            taken = Taken(done, 8, 0.0, [torch.tensor(float(done))], notes, None, {"learning_rate": torch.tensor(0.5)})
            found += meter.rows(taken)  # of a GPU the row of the logged step before, whose copy has ended
            assert len(found) == (done // 2 if kind == "cpu" else done // 2 - 1)
            for event in events:
                event.done.set()
        rows.append([*found, *meter.waiting()])
    timings = ("images_per_second", "data_wait")
    plain = [[(step, {k: v for k, v in row.items() if k not in timings}) for step, row in of] for of in rows]
    for (step, expected), (other, row) in zip(*plain, strict=True):
        assert step == other and row == pytest.approx(expected, rel=1e-6)
        assert row.keys() >= {"projection_rank", "effective_rank", "std", "loss"}
