"""Checkpoints of models in shards: saved on any number of ranks, resumed on any other, and read by one process."""

import errno
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from test_methods import make  # noqa: E402
from test_methods_distributed import part_of  # noqa: E402

from fastjem import checkpoints, resume, sharded_checkpoints, sharding  # noqa: E402
from fastjem.methods import RunFacts  # noqa: E402
from fastjem.optim import Fused, Schedule, build, parameter_groups, separate_groups  # noqa: E402
from fastjem.ranks import Ranks  # noqa: E402

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 8
STEPS = 2  # between two checkpoints


class Trained:
    """iBOT of a tiny ViT, with what its optimiser and its centres remember, on this rank of so many."""

    def __init__(self, rank: int = 0, size: int = 1, *, shard: bool = False):
        self.ranks = Ranks(rank, size, torch.device("cpu"))
        if size > 1:
            self.ranks = Ranks(rank, size, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
        run = RunFacts(batch=IMAGES, steps_per_epoch=2, ranks=size, group=self.ranks.group)
        self.step, batch = make("ibot", run=run)
        each = IMAGES // size
        self.batch = part_of(batch, slice(rank * each, (rank + 1) * each))
        if shard:
            shard_step(self.step, size)
        self.optimizer = build("adamw", parameter_groups(self.step, self.step.method.constant_rate))
        self.done = 0

    def go_on(self, out: Path) -> None:
        """As a run does that is resumed."""
        state = checkpoints.load(out, None, whole=False)
        assert state is not None
        resume.restore(out, self.step, self.optimizer, state)
        self.done = state["step"]

    def train(self) -> list[float]:
        separate_groups(self.optimizer)
        assert isinstance(self.optimizer, Fused)
        self.optimizer.attach_teacher(*self.step.teacher_and_student(), 0.9)
        schedule = Schedule(steps=20, learning_rate=3e-3)
        losses = []
        for _ in range(STEPS):
            schedule.apply(self.optimizer, self.done)
            self.optimizer.zero_grad()
            loss, _ = self.step(self.batch, self.done)
            loss.backward()
            if self.ranks.size > 1 and not sharding.is_sharded(self.step):
                for parameter in self.step.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= self.ranks.size
            self.optimizer.step()
            self.step.step_ends(self.done, None)
            self.done += 1
            total = loss.detach().clone()
            if self.ranks.size > 1:
                dist.all_reduce(total)
            losses.append(total.item() / self.ranks.size)
        return losses

    def state(self) -> dict[str, Any]:
        model, optimizer = self.step.state_dict(), self.optimizer.state_dict()
        return {"step": self.done, "model": model, "optimizer": optimizer, "defaults": {}}

    def save(self, out: Path, keep: int = 1) -> str | None:
        if sharding.is_sharded(self.step):
            return checkpoints.save_in_shards(out, self.state(), keep, self.ranks)
        if not self.ranks.first:
            return None
        checkpoints.keep_earlier(out, keep)
        return checkpoints.save(out, self.state())


def shard_step(step: Any, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    for encoder in (step.encoder, step.teacher["encoder"]):
        for block in encoder.backbone.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(step, mesh=mesh)


def on_rank(rank: int, size: int, store: str, work: Callable[..., None], *given: Any) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
    work(rank, size, *given)
    dist.destroy_process_group()


def on_ranks(size: int, folder: Path, work: Callable[..., None], *given: Any) -> None:
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    mp.spawn(on_rank, (size, str(store), work, *given), nprocs=size)


def goes_on(rank: int, size: int, out: Path, expected: list[float], shard: bool) -> None:
    """Resume, train the steps whose losses are known, save."""
    trained = Trained(rank, size, shard=shard)
    trained.go_on(out)
    losses = trained.train()
    assert losses == pytest.approx(expected, rel=1e-5), (size, shard, losses, expected)
    assert trained.save(out) is None
    dist.barrier()
    assert len(checkpoints.present(out)) == 1 and not list((out / "checkpoints").glob("*.part"))
    if shard:
        a_full_disk_of_one_rank(trained, out)


def a_full_disk_of_one_rank(trained: Trained, out: Path) -> None:
    """All learn of it, and what there was stays."""

    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if trained.ranks.rank == trained.ranks.size - 1:
            patch.setattr(sharded_checkpoints.Stream, "fileno", full)
        problem = trained.save(out)
    last = trained.ranks.size - 1
    step = trained.done
    assert problem == f"the checkpoint at step {step} could not be written (rank {last}: No space left on device)"
    dist.barrier()
    assert len(checkpoints.present(out)) == 1 and not list((out / "checkpoints").glob("*.part"))
    dist.barrier()


def of_one(out: Path, expected: list[float]) -> Trained:
    trained = Trained()
    trained.go_on(out)
    assert trained.train() == pytest.approx(expected, rel=1e-5)
    return trained


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Of one rank that was never interrupted."""
    trained = Trained()
    return [loss for _ in range(6) for loss in trained.train()]


def test_one_rank_to_two_in_shards_and_back(expected: list[float], tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = Trained()
    assert whole.train() == expected[:2]
    assert whole.save(out) is None
    on_ranks(2, tmp_path, goes_on, out, expected[2:4], True)
    (folder,) = checkpoints.present(out)
    assert folder.name == "last" and {path.name for path in folder.iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt",
    }  # fmt: skip
    shutil.copytree(out, tmp_path / "other")
    back = of_one(out, expected[4:6])
    assert back.save(out) is None
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["last.pt"]
    state = checkpoints.load(tmp_path / "other")
    assert state is not None and not any(x.is_meta for x in state["model"].values())


def three_parts(rank: int, size: int, out: Path, expected: list[float]) -> None:
    goes_on(rank, size, out, expected[2:4], True)
    goes_on(rank, size, out, expected[4:6], False)
    goes_on(rank, size, out, expected[6:8], True)


@pytest.mark.exhaustive
def test_four_ranks_to_two_to_one_and_back(expected: list[float], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert Trained().save(out) is None
    on_ranks(4, tmp_path, goes_on, out, expected[:2], True)
    on_ranks(2, tmp_path, three_parts, out, expected)
    one = of_one(out, expected[8:10])
    assert one.save(out) is None
    on_ranks(4, tmp_path, goes_on, out, expected[10:12], True)
    assert checkpoints.load(out, None)["step"] == 12  # type: ignore[index]
