"""Every method on two ranks against one rank with the same global batch: loss, gradients, and what moves at its end.

The mean over ranks of the losses and of the gradients (what DistributedDataParallel makes) must be those of one rank.
Batch norms aside, which see a rank's own images unless they are synchronised: heads have none here, and encoders none
that trains. What a loss draws is the same on any number of ranks.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_methods import make, small_options
from torch import Tensor

from fastjem.cli import main
from fastjem.data.batch import Batch
from fastjem.methods import METHODS, RunFacts, options_of
from fastjem.step import Step

IMAGES = 8

# By their nature of each rank's images; each still leaves the same state on all ranks. Of others a part is left out:
# KoLeo's neighbours are of a rank's batch (DINOv2, DINOv3).
OF_EACH_RANK = {
    "wmse": "parts of a rank's batch are whitened, as solo-learn's",
}
PARTLY_OF_EACH_RANK = (*OF_EACH_RANK, "dinov2", "dinov3")
# What makes them the same on any number of ranks.
ALIKE = {
    "dinov2": {"koleo": 0.0},
    "dinov3": {"koleo": 0.0},
    "capi": {"predicted": 0.3},  # some of the patches, which are drawn
    "all4one": {"dropout": 0.0},
}
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("dino", {"centring": "sinkhorn"}),
    ("ibot", {"centring": "sinkhorn", "shared": False, "patch_prototypes": 10}),
    ("dinov2", {"centring": "sinkhorn"}),
    ("swav", {"queue": 24}),
    ("dcl", {"sigma": 0.5}),
    ("pirl", {"negatives": 5}),
    *((name, {"large_views": 3}) for name in ("simclr", "nnclr", "tico", "wmse", "dino")),
    ("simclr", {"queue": 24}),
    ("dcl", {"queue": 24, "sigma": 0.5}),
]


def without_batch_norm(name: str) -> dict[str, object]:
    return {"norm": "layer"} if "norm" in options_of(METHODS[name]) else {}


def made(name: str, run: RunFacts, **options: object) -> tuple[Step, Batch]:
    step, batch = make(name, run=run, **{**without_batch_norm(name), **ALIKE.get(name, {}), **options})
    step.double()
    for module in step.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    if name == "deepcluster":
        generator = torch.Generator().manual_seed(1)
        assigned = torch.randint(0, 4, step.method.assignments.shape, generator=generator)
        step.method.assignments.copy_(assigned)
    for part in step.method.modules():
        if hasattr(part, "came"):
            part.came.fill_(len(part.rows))  # else a queue begins with copies of whatever keys come first
    views = batch.views[: step.method.views.large + min(METHODS[name].views.small, 2)]
    if run.large_views and not METHODS[name].views.small:
        views = [*views, batch.views[0][:, :, ::2, ::2]]  # a small one
    batch = batch._replace(views=[view.double() for view in views], tables=[x.double() for x in batch.tables])
    return step, batch._replace(tables=batch.tables[: len(views)])


def part_of(batch: Batch, rows: slice) -> Batch:
    masks = {view: type(mask)(*(None if x is None else x[rows] for x in mask)) for view, mask in batch.masks.items()}
    labels = None if batch.labels is None else batch.labels[rows]
    tables = [x[rows] for x in batch.tables]
    return Batch([view[rows] for view in batch.views], batch.index[rows], labels, masks, tables)


def results(step: Step, batch: Batch, rank: int = 0) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Loss, gradients of all parameters, and buffers that are saved, behind a step."""
    parameters = [p for p in step.parameters() if p.requires_grad]
    torch.manual_seed(3 + rank)  # each rank has its own generator
    loss, _ = step(batch, 3)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    step.step_ends(3, None)
    moved = {key: x for key, x in step.method.state_dict().items() if key not in dict(step.method.named_parameters())}
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return loss.detach(), filled, moved


def mean(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def check_rank(rank: int, world: int, store: str, variants: list[tuple[str, dict]]) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    small_options("distill")  # its file is made once, by random numbers
    each = IMAGES // world
    for name, options in variants:
        large = {"large_views": options.get("large_views", 0)}
        own = {key: value for key, value in options.items() if key not in large}
        step, batch = made(name, RunFacts(batch=IMAGES, steps_per_epoch=2, **large), **own)
        expected = results(step, batch)
        among = RunFacts(batch=IMAGES, steps_per_epoch=2, ranks=world, group=dist.group.WORLD, **large)
        step, batch = made(name, among, **own)
        got = results(step, part_of(batch, slice(rank * each, (rank + 1) * each)), rank)
        what = f"{name} {options}"
        loss = mean(got[0])
        if name not in OF_EACH_RANK:
            torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-8, msg=lambda m, w=what: f"{w}: {m}")
            for a, b in zip(got[1], expected[1], strict=True):
                torch.testing.assert_close(mean(a), b, rtol=1e-5, atol=1e-7, msg=lambda m, w=what: f"{w}: {m}")
        assert got[2].keys() == expected[2].keys()
        for key, value in got[2].items():
            text = f"{what}: {key}"
            torch.testing.assert_close(
                value.double(), expected[2][key].double(), rtol=1e-6, atol=1e-7, msg=lambda m, t=text: f"{t}: {m}"
            )
    dist.destroy_process_group()


# One of each way of being of all ranks: the rest takes longer.
QUICK = (
    "smog",
    "mmcr",
    "all4one",
    "tico",
    "mocov3",
    "dcl",
    "pirl",
    "capi",
)


@pytest.mark.parametrize("name", PARTLY_OF_EACH_RANK)
def test_what_is_of_each_rank_says_so(name, capsys):
    """In `fastjem methods NAME` and on the method's page."""
    assert main(["methods", name]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "one rank's images" in told or "each rank's images" in told
    page = (Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md").read_text()
    assert "each rank's own images" in " ".join(page.split())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PARTLY_OF_EACH_RANK])
def test_what_is_of_all_ranks_says_nothing_else(name, capsys):
    """`test_two_ranks_are_one` holds that it is."""
    assert main(["methods", name]) == 0
    page = (Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md").read_text()
    for point in re.split(r"\n\* |\n\n", capsys.readouterr().out + "\n\n" + page):
        if not re.search("batch.norm", point, re.IGNORECASE):  # which see a rank's images unless they are synchronised
            told = " ".join(point.split())
            assert not re.search(r"(each|one|a|its) rank's (own )?images", told), told


@pytest.mark.parametrize("which", ["quick", pytest.param("others", marks=pytest.mark.exhaustive)])
def test_two_ranks_are_one(which, tmp_path):
    variants = [(name, options) for name, options in VARIANTS if (name in QUICK) == (which == "quick")]
    mp.spawn(check_rank, (2, str(tmp_path / "store"), variants), nprocs=2)
