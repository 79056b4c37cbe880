"""Runs with `--shard`: what they write, and that they go on without it, and the other way round.

`test_sharding` starts the ranks.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from images import make_folder

import fastjem
from fastjem import checkpoints
from fastjem.cli import main

pytest.importorskip("timm")

COMMON: dict[str, Any] = {
    "method": "byol", "backbone": "test_vit", "patch_size": 8, "image_size": 32, "batch_size": 8, "workers": 0,
    "options": {"hidden": 16, "dim": 8, "norm": "layer"}, "device": "cpu", "log_every": 1, "checkpoint_steps": 1,
    "clip": 0.5, "accumulate": 2, "optimizer": "sgd", "learning_rate": 0.05, "knn_every": 1, "report": False,
}  # fmt: skip


def run(rank: int, world: int, images: str, out: str) -> None:
    """What each of some ranks does, which know each other by torch.distributed."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, first in (("sharded", True), ("whole", False)):
        common = {"out": f"{out}/{name}", "activation_checkpointing": first}
        fastjem.pretrain(**COMMON, **common, data=images, max_steps=2, shard=first)
        fastjem.pretrain(**common, resume=True, max_steps=3, shard=not first)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(out: Path) -> None:
    """Figures, checkpoints and the encoder of runs in shards and without; each went on as the other one began."""
    sharded, whole = out / "sharded", out / "whole"
    for file in ("metrics.jsonl", "knn.jsonl"):
        pairs = list(zip(rows(sharded / file), rows(whole / file), strict=True))
        assert [row["step"] for row, _ in pairs][-1] == 3
        for row, other in pairs:
            for name in {"loss", "gradient_norm", "std", "effective_rank", "knn", "step"} & other.keys():
                assert row[name] == pytest.approx(other[name], rel=1e-4), (file, name)
    states = [checkpoints.load(out) for out in (sharded, whole)]
    for part in ("model", "optimizer"):
        same(states[0][part], states[1][part], part)
    encoders = [fastjem.load_encoder(out).eval() for out in (sharded, whole)]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoders[0](x), encoders[1](x), rtol=1e-4, atol=1e-5)
    assert not list((sharded / "checkpoints").glob("*.part"))


def same(a: Any, b: Any, what: str) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys(), what
        for key, value in b.items():
            same(a[key], value, f"{what}.{key}")
    elif isinstance(b, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m: f"{what}: {m}")
    else:
        assert a == b, what


def test_one_rank_has_all_weights_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = str(make_folder(tmp_path / "images", 16))
    base = ["pretrain", "--data", images, "--method", "simclr", "--backbone", "test_vit", "--patch-size", "8"]
    base += ["--image-size", "32", "--batch-size", "8", "--max-steps", "1", "--device", "cpu", "--workers", "0"]
    assert main([*base, "--out", str(tmp_path / "a"), "--shard", "--no-report", "--activation-checkpointing"]) == 0
    assert "--shard: one rank alone has all weights; torchrun starts several" in capsys.readouterr().err
    few = [
        *base,
        "--out",
        str(tmp_path / "b"),
        "--backbone",
        "vgg11",
        "--patch-size",
        "0",
        "--activation-checkpointing",
    ]
    assert main(few) == 2
    assert "--activation-checkpointing: VGG has no repeated blocks" in capsys.readouterr().err
