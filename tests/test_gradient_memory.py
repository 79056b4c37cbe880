"""DistributedDataParallel's buckets are the gradients themselves: held once, and of the same numbers.

Without `gradient_as_bucket_view` each rank holds all gradients twice, and copies them to the buckets and back.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_methods import make
from test_step_graph import batch_of, training_of
from torch import Tensor, nn

from fastjem import build
from fastjem.step import Step
from fastjem.stepping import Work, seed_generators

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4  # DistributedDataParallel orders its buckets anew behind the first
LARGE = 4096  # a weight of 64 MiB, whose memory goes back to the system when it is freed
CONFIG: Any = SimpleNamespace(shard=False, compile=False, channels=3, size=32)
DDP = nn.parallel.DistributedDataParallel


@contextmanager
def held_twice(twice: bool) -> Iterator[None]:
    """A DistributedDataParallel as torch makes it by itself."""
    if not twice:
        yield
        return
    made = nn.parallel.DistributedDataParallel
    options = lambda module, **given: made(module, **{**given, "gradient_as_bucket_view": False})  # noqa: E731
    nn.parallel.DistributedDataParallel = options
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = made


def trained(step: Step, like: Any, rank: int, *, twice: bool, **given: Any) -> tuple[Work, list[Tensor]]:
    """Some steps of a run of two ranks, whose images differ; and their figures."""
    training = training_of(step, device="cpu", **{"optimizer": "adamw", "clip": 1.0, "accumulate": 1, **given})
    training.ranks = SimpleNamespace(device=torch.device("cpu"), rank=rank, size=2, group=dist.group.WORLD)
    with held_twice(twice):
        training.model = build.wrapped(CONFIG, training.ranks, step)
    work = Work(training)
    figures: list[Tensor] = []
    for done in range(STEPS):
        seed_generators(3, done, training.ranks)
        work.begins(done)
        numbers = range(done * training.config.accumulate, (done + 1) * training.config.accumulate)
        found = work.take([batch_of(step, like, 2 * number + rank) for number in numbers])
        figures += [x.clone() for x in (*found.losses, found.gradient_norm) if x is not None]
    return work, figures


CASES: list[tuple[str, dict[str, Any]]] = [
    ("simclr", {}),
    ("byol", {"optimizer": "lars", "clip": 0.0}),
    ("byol", {"accumulate": 2}),  # the first of two batches leaves its gradients with their rank
    ("dino", {"optimizer": "larc"}),
    ("simclr", {"scaler": lambda: torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1)}),
]


def check_numbers(rank: int) -> None:
    """Losses, norms, weights and moments, bit for bit."""
    for name, given in CASES:
        (work, figures), (other, expected) = (
            trained(*make(name), rank, twice=twice, **given) for twice in (False, True)
        )
        for a, b in zip([*figures, *work.state()], [*expected, *other.state()], strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), (name, given)
        for one, views in ((work, True), (other, False)):
            gradients = [p.grad for p in one.parameters if p.grad is not None]
            assert gradients
            shared = len({g.untyped_storage().data_ptr() for g in gradients}) < len(gradients)
            assert shared == views, (name, given)


class Wide(nn.Module):
    """An encoder with one large weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, LARGE), nn.Linear(LARGE, LARGE), nn.Linear(LARGE, 12))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.mean((2, 3)))


def resident() -> int:
    """Bytes of the process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_memory(rank: int) -> None:
    """The gradients' own size less, once there are any."""
    grown = {}
    for twice in (True, False, True):
        small, like = make("simclr")
        step = Step(Wide(), small.method)
        gc.collect()
        before = resident()
        work, _ = trained(step, like, rank, twice=twice, optimizer="sgd", clip=0.0)
        grown[twice] = resident() - before
        bytes_of = sum(p.nbytes for p in work.parameters)
        del work, step
        gc.collect()
    assert grown[True] - grown[False] > 0.9 * bytes_of, (grown, bytes_of)


def check_rank(rank: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    check_numbers(rank)
    if Path("/proc/self/statm").exists():
        check_memory(rank)
    gc.collect()  # before their group, see ranks.leave
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_two_ranks_hold_gradients_once(tmp_path: Path) -> None:
    mp.spawn(check_rank, (str(tmp_path / "store"),), nprocs=2)


def test_one_rank_of_a_group_does() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check_numbers(0)
    finally:
        dist.destroy_process_group()
