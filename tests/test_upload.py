"""Batches on their way to a GPU: which stream does what, told by stand-ins, as there may be no GPU."""

import contextlib
import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

pytest.importorskip("torchvision")

from fastjem.data import upload
from fastjem.data.batch import Crops
from fastjem.data.loaders import Budget, Order, dali
from fastjem.data.views import ViewSpec


def crops(number: int, labels: bool = True) -> Crops:
    row = torch.full((2,), number)
    views = [torch.full((2, 4, 4, 3), number, dtype=torch.uint8) for _ in range(2)]
    tables = [torch.full((2, 13), float(number)) for _ in range(2)]
    return Crops(views, tables, row, 0, row + 1 if labels else None, [("a", "broken")], row + 2)


class Recorder:
    """Streams, copies and waits in the order in which they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.said: list[str] = []
        self.on = "current"
        recorder = self

        class Stream:
            def __init__(self, name: str):
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                recorder.said.append(f"{self.name} waits for {other.name}")

        current = Stream("current")

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, recorder.on = recorder.on, stream.name
            yield
            recorder.on = before

        def copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
            recorder.said.append(f"copy on {recorder.on}")
            out = x.clone()
            out.record_stream = lambda stream: recorder.said.append(f"kept for {stream.name}")
            return out

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
        monkeypatch.setattr(upload, "to_device", copied)


@pytest.mark.parametrize("labels", [True, False])
def test_copies_are_on_a_side_stream_and_the_step_waits_for_them(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    ended: list[bool] = []

    def batches() -> Iterator[Crops]:
        try:
            for number in range(3):
                yield crops(number, labels)
        finally:
            ended.append(True)

    moved = upload.uploaded(batches(), torch.device("cuda"))
    tensors = 4 + 2 + labels
    for number in range(2):
        there = next(moved)
        expected = ["copy on side"] * tensors + ["current waits for side"] + ["kept for current"] * tensors
        assert recorder.said == expected  # and the next batch isn't asked for before it is wanted
        recorder.said.clear()
        found = [*there.views, *there.tables, there.index, there.keys, *([there.labels] if labels else [])]
        before = crops(number, labels)
        wanted = [*before.views, *before.tables, before.index, before.keys, *([before.labels] if labels else [])]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert there.unreadable == [("a", "broken")] and (there.labels is None) == (not labels)
    moved.close()
    assert ended == [True]


def test_on_the_cpu_nothing_is_between() -> None:
    batches = iter([crops(0)])
    assert upload.uploaded(batches, torch.device("cpu")) is batches
    x = torch.ones(2)
    assert upload.to_device(x, "cpu") is x
    assert dali.stream_of("cpu") is None


def test_what_goes_to_a_gpu_is_pinned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: said.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: said.append((device.type, non_blocking)))
    upload.to_device(torch.ones(2), "cuda")
    assert said == ["pinned", ("cuda", True)]


def test_dali_orders_its_views_on_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    assert dali.stream_of("cuda") is stream


@pytest.mark.parametrize("labels", [True, False])
def test_the_loaders_own_thread_pins_every_tensor_of_a_batch(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the step's thread copies none of them within the host's memory."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: pinned.append(self) or self)
    before = crops(3, labels)
    after = pin_memory(before)
    assert type(after) is Crops
    tensors = [x for x in (*before.views, *before.tables, before.index, before.labels, before.keys) if x is not None]
    assert {id(x) for x in pinned} == {id(x) for x in tensors}


class Pinning:
    """In the place of a GPU's pinned memory: which thread pins what, and for which GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.threads: list[str] = []
        self.devices: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "set_device", self.devices.append)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: self.pin(x))

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        self.threads.append(threading.current_thread().name)
        return x.clone()


def test_another_thread_pins_views_while_the_batch_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pinning = Pinning(monkeypatch)
    ended: list[str] = []
    asked = [threading.Event() for _ in range(3)]

    def batches() -> Iterator[Crops]:
        try:
            for number, event in enumerate(asked):
                event.set()
                yield crops(number)
        finally:
            ended.append(threading.current_thread().name)

    device = torch.device("cuda", 1)
    ahead = upload.pinned(batches(), device)
    first = next(ahead)
    assert asked[1].wait(20)  # nobody has asked for it
    assert not asked[2].is_set()
    rest = list(ahead)
    for number, found in enumerate([first, *rest]):
        before = crops(number)
        assert all(torch.equal(a, b) for a, b in zip(found.views, before.views, strict=True))
        assert torch.equal(found.index, before.index) and found.unreadable == before.unreadable
    assert len(rest) == 2 and ended and pinning.devices == [device]
    assert len(pinning.threads) == 6 and {name.rpartition("_")[0] for name in pinning.threads} == {"fastjem-pin"}


def test_who_makes_the_batches_ends_with_their_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinning(monkeypatch)
    ended: list[bool] = []

    def batches(fails: bool) -> Iterator[Crops]:
        try:
            yield crops(0)
            if fails:
                raise OSError("the disk is gone")
            yield crops(1)
            yield crops(2)
        finally:
            ended.append(True)

    ahead = upload.pinned(batches(False), torch.device("cuda"))
    next(ahead)
    ahead.close()
    assert ended == [True]
    ahead = upload.pinned(batches(True), torch.device("cuda"))
    next(ahead)
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastjem-pin")]
    plain = iter([crops(0)])
    assert upload.pinned(plain, torch.device("cpu")) is plain


@pytest.mark.parametrize(("made_on", "trained_on"), [("cpu", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_dalis_views_of_the_host_are_pinned_and_uploaded(
    made_on: str, trained_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `dali-cpu` stayed in pageable memory, and the step's own stream waited for their copies."""
    said: list[tuple[str, torch.device]] = []
    for name in ("pinned", "uploaded"):
        monkeypatch.setattr(dali, name, lambda batches, device, name=name: said.append((name, device)) or batches)
    budget = Budget(device=torch.device(trained_on))
    order = Order(samples=4, batch=2, stop=2)
    loader = dali._loader(Pixels(), [ViewSpec(size=4)], order, budget, made_on, 0.0)
    for one in (loader, loader.at([ViewSpec(size=2)], order)):
        iter(one)
        names = ["pinned"] * (made_on == "cpu") + ["uploaded"]
        assert said == [(name, torch.device(trained_on)) for name in names]
        said.clear()


class Pixels:
    """A source of four images."""

    root, labels, decoded = "four", None, True
    classes: ClassVar[list[str]] = []

    def __len__(self) -> int:
        return 4

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> np.ndarray:
        return np.full((4, 4, 3), i, np.uint8)
