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
from test_methods import make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastjem import health
from fastjem.functional import held
from fastjem.meter import Meter, Row, Taken
from fastjem.methods import METHODS
from fastjem.nn import NTXentLoss
from fastjem.step import Step

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
