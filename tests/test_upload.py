"""Batches on their way to a GPU: which stream does what, told by stand-ins, as there may be no GPU."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

pytest.importorskip("torchvision")

from fastjem.data import upload
from fastjem.data.batch import Crops
from fastjem.data.loaders import dali


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
