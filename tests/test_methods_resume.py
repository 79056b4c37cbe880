"""A run that is killed between two checkpoints and goes on is the same run, for each kind of state of methods."""

import json
from pathlib import Path

import pytest
import torch
from images import TINY, make_folder

for package in ("timm", "torchvision", "safetensors"):
    pytest.importorskip(package)

from test_methods import given_weights  # noqa: E402

import fastjem  # noqa: E402
from fastjem import checkpoints  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {"backbone": "test_vit", "patch_size": 8}
RUNS: dict[str, dict] = {
    "deepcluster": {"options": {"prototypes": 8, "hidden": 16}},
    "pirl": {"image_size": 36},
    "smog": {"options": {"hidden": 16, "groups": 8}},
    "ibot": {**VIT, "options": {"hidden": 16, "bottleneck": 8}},
    "capi": {**VIT, "options": {"predictor_depth": 1}},
    "distill": {},
}
QUICK = ("deepcluster", "ibot")


class Killed(BaseException):
    pass


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.exhaustive) for n in RUNS])
def test_killed_and_resumed_is_the_same_run(name: str, tmp_path: Path) -> None:
    images = str(make_folder(tmp_path / "images", 48))
    common = {**TINY, "data": images, "method": name, "epochs": 3, **RUNS[name]}
    if name == "distill":
        common["options"] = {"given": given_weights()}
    fastjem.pretrain(**common, out=str(tmp_path / "whole"))
    original = checkpoints.Metrics.write

    def kill(self, row: dict) -> None:
        original(self, row)
        if row["step"] == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Metrics, "write", kill)
        with pytest.raises(Killed):
            fastjem.pretrain(**common, out=str(tmp_path / "cut"), checkpoint_steps=2)
    fastjem.pretrain(out=str(tmp_path / "cut"), resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / run)["model"] for run in ("cut", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
