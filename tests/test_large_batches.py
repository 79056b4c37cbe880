"""`--micro-batch` in runs: ranks, views of a byte a channel, what a run says and saves, accumulated batches."""

import contextlib
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from images import TINY, make_folder
from test_methods_distributed import made
from torch import Tensor, nn

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

import fastjem  # noqa: E402
import fastjem.functional as F  # noqa: E402
from fastjem import checkpoints  # noqa: E402
from fastjem.data import batch as batches  # noqa: E402
from fastjem.data.batch import Crops, LateView, finish, part_of, rows_of  # noqa: E402
from fastjem.data.parameters import Parameters  # noqa: E402
from fastjem.data.size import height_and_width  # noqa: E402
from fastjem.data.views import Views  # noqa: E402
from fastjem.gradients import averaged, kept_here  # noqa: E402
from fastjem.large_batches import forward_backward  # noqa: E402
from fastjem.methods import RunFacts  # noqa: E402
from fastjem.micro_batches import Passes  # noqa: E402
from fastjem.yaml_text import loaded  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = {**TINY, "backbone": "test_vit", "patch_size": 8, "optimizer": "sgd", "max_steps": 2, "seed": 5, "knn_every": 99}
HEADS = {
    "simclr": {"norm": "layer", "hidden": 16},
    "dino": {"hidden": 16, "prototypes": 8},
    "mae": {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("images"), 48, kind="jpg"))


def state(out: Path) -> dict[str, Any]:
    found = checkpoints.load(out)
    assert found is not None
    return found


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> None:
    """Each tensor to a share of its largest number."""
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        worst = (got[name].double() - x.double()).abs().max()
        assert worst <= share * x.double().abs().max(), f"{name}: {worst:.1e} of {x.abs().max():.1e}"


# Views


def crops(images: int = 6, dtype: torch.dtype = torch.uint8) -> tuple[Crops, list]:
    specs = Views(large=2, small=1, recipe="simclr").specs(32)
    views = [torch.randint(0, 256, (images, *height_and_width(spec.size), 3)).to(dtype) for spec in specs]
    tables = list(torch.from_numpy(Parameters(specs)(0, 0, torch.arange(images).numpy(), 40, 40)))
    return Crops(views, tables, torch.arange(images), 0, None, []), specs


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [{}, {"channels_last": True, "dtype": torch.bfloat16}])
def test_a_late_view_is_the_finished_one(dtype: torch.dtype, layout: dict[str, Any]) -> None:
    given, specs = crops(dtype=dtype)
    wanted = finish(given, specs, "cpu", **layout)
    late = finish(given, specs, "cpu", late=True, **layout)
    for view, finished in zip(late.views, wanted.views, strict=True):
        assert isinstance(view, LateView) and isinstance(view, Tensor)
        assert (view.shape, view.dtype, view.device) == (finished.shape, finished.dtype, finished.device)
        rows = rows_of(view, slice(2, 5))
        assert torch.equal(rows, finished[2:5]) and type(rows) is Tensor
        assert rows.stride() == finished[2:5].stride()
        for read in (lambda x: x * 1, lambda x: x[:, :, ::2], lambda x: torch.cat([x, x]), lambda x: x.float().mean(0)):
            assert torch.equal(read(view), read(finished)) and type(read(view)) is Tensor
    part = part_of(late, slice(1, 4))
    assert all(torch.equal(x, y[1:4]) for x, y in zip(part.views, wanted.views, strict=True))
    assert torch.equal(part.index, torch.arange(1, 4))


def test_no_more_than_a_micro_batch_of_views_is_finished(images: str, tmp_path: Path, monkeypatch: Any) -> None:
    counts: list[int] = []
    augment = F.augment

    def counted(views: Tensor, *parts: Any, **options: Any) -> Tensor:
        counts.append(len(views))
        return augment(views, *parts, **options)

    monkeypatch.setattr(batches.F, "augment", counted)
    for method in ("simclr", "mae"):
        fastjem.pretrain(data=images, out=tmp_path / method, method=method, **VIT, options=HEADS[method], micro_batch=6)
        own = [count for count in counts if count < 16]
        assert max(own) == 6 and sum(own) == {"simclr": 2 * 2 * 2 * 16, "mae": 2 * 16}[method]
        counts.clear()


# Runs


@pytest.mark.parametrize("method", HEADS)
def test_a_run_is_that_of_whole_batches(method: str, images: str, tmp_path: Path, capsys: Any) -> None:
    """With two batches a step, clipped, and with checkpoints of the very steps."""
    given = {**VIT, "data": images, "method": method, "options": HEADS[method], "accumulate": 2, "clip": 1.0}
    if method == "simclr":
        given |= {"mask": 0.5}
    fastjem.pretrain(out=tmp_path / "whole", **given)
    said = capsys.readouterr()
    assert "encoded by" not in said.out + said.err
    fastjem.pretrain(out=tmp_path / "parts", **given, micro_batch=6)
    said = capsys.readouterr()
    assert "encoded by 6" in said.out + said.err
    fastjem.pretrain(out=tmp_path / "larger", **given, micro_batch=16)
    whole, parts, larger = (state(tmp_path / name)["model"] for name in ("whole", "parts", "larger"))
    close(parts, whole, 1e-4)
    assert all(torch.equal(larger[name], x) for name, x in whole.items())
    first, second = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-4)
    assert all(row.keys() == other.keys() for row, other in zip(first, second, strict=True))
    assert second[-1]["embedding_std"] == pytest.approx(first[-1]["embedding_std"], rel=1e-2)
    ran = [
        loaded((tmp_path / name / "config.yaml").read_bytes(), name)["ran"]["micro_batch"]
        for name in ("parts", "larger")
    ]
    assert ran == [6, None]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_batch_norm_is_told_of_and_a_run_may_go_on_by_other_micro_batches(
    images: str, tmp_path: Path, capsys: Any
) -> None:
    """Its running statistics move once for each view and micro-batch, as both go through the encoder together."""
    given = {**TINY, "data": images, "out": tmp_path, "method": "simclr", "options": {"hidden": 16}, "seed": 5}
    fastjem.pretrain(**given, max_steps=2, micro_batch=6)
    said = capsys.readouterr()
    assert "batch norms take their statistics of 6 images" in said.out + said.err
    tracked = [
        x for name, x in state(tmp_path)["model"].items() if name.endswith("encoder.backbone.bn1.num_batches_tracked")
    ]
    assert [int(x) for x in tracked] == [2 * 3]
    fastjem.pretrain(out=tmp_path, resume=True, max_steps=3, micro_batch=4)
    assert state(tmp_path)["step"] == 3
    assert "batch norms take their statistics of 4 images" in "".join(capsys.readouterr())


def test_a_step_that_is_broken_off_leaves_statistics_as_they_were(
    images: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also in the second passes, whose buffers are those of the first."""
    given = {**TINY, "data": images, "out": tmp_path, "method": "simclr", "options": {"hidden": 16}, "seed": 5}
    replay = Passes.replay
    steps = 0

    def fails(passes: Passes, model: Any, around: Any) -> None:
        nonlocal steps
        steps += 1
        if steps < 3:
            return replay(passes, model, around)

        def breaks(given: Any) -> Any:
            model(given)
            raise RuntimeError("broken off")

        return replay(passes, breaks, around)

    monkeypatch.setattr(Passes, "replay", fails)
    with pytest.raises(RuntimeError, match="broken off"):
        fastjem.pretrain(**given, max_steps=4, micro_batch=6, checkpoint_steps=2)
    found = state(tmp_path)
    assert found["step"] == 2
    tracked = [
        int(x) for name, x in found["model"].items() if name.endswith("encoder.backbone.bn1.num_batches_tracked")
    ]
    assert tracked == [2 * 3]


# Ranks


def check_rank(rank: int, world: int, store: str) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name in ("simclr", "dino", "mae"):
        among = RunFacts(batch=16, steps_per_epoch=2, ranks=world, group=dist.group.WORLD)
        (step, batch), (wanted, _) = made(name, among), made(name, among)
        for one in (step, wanted):  # a parameter that no loss reaches
            one.encoder.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=torch.float64)))
        torch.manual_seed(7 + rank)
        batch = batch._replace(views=[torch.randn_like(view) for view in batch.views])
        options = {"broadcast_buffers": False, "find_unused_parameters": True}
        model, parts = (nn.parallel.DistributedDataParallel(one, **options) for one in (wanted, step))
        for first in (True, False):  # two batches a step
            torch.manual_seed(3)
            with kept_here(model) if first else contextlib.nullcontext():
                loss, _notes = model(batch, 3)
                loss.backward()
            torch.manual_seed(3)
            found, _notes = forward_backward(step, batch, 3, Passes(3), model=parts)
            torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=1e-14)
        averaged([p for p in step.parameters() if p.requires_grad], dist.group.WORLD)
        for (key, p), q in zip(step.named_parameters(), wanted.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), f"{name} {key}"
            if p.grad is not None and q.grad is not None:
                worst = (p.grad - q.grad).abs().max()
                assert worst <= 1e-9 * q.grad.abs().max(), f"{name} {key}: {worst:.1e}"
    # A gradient that one rank alone has counts on all, and one that is nowhere is nowhere.
    some = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    some[0].grad = torch.full((2,), 1.0 + rank)
    some[1].grad = torch.ones(2) if rank == 1 else None
    averaged(some, dist.group.WORLD)
    assert [None if p.grad is None else p.grad.tolist() for p in some] == [[1.5, 1.5], [0.5, 0.5], None]
    del model, parts
    gc.collect()  # before their group, see ranks.leave
    dist.destroy_process_group()


def test_gradients_of_two_ranks_are_those_of_distributed_data_parallel(tmp_path: Path) -> None:
    mp.spawn(check_rank, (2, str(tmp_path / "store")), nprocs=2)
