"""Apple's MPS has no float64. There isn't one to test on: the CPU has none either for the length of a test here.

Whatever runs without a kernel of its own, the references and all that is in plain torch, is watched tensor by tensor.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import CALLS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastjem.functional as F
from fastjem import health, ops, probes
from fastjem import nn as modules
from fastjem.collectives import mean_loss_of_ranks
from fastjem.data import masks
from fastjem.data.batch import Batch
from fastjem.data.masking import drawn_masks
from fastjem.data.philox import philox
from fastjem.data.views import MaskSpec
from fastjem.kernels import arithmetic
from fastjem.kernels.masks import reference as mask_reference
from fastjem.kernels.masks.philox import philox_on_device
from fastjem.methods import METHODS, Codes, RunFacts
from fastjem.step import Step


class Watch(TorchDispatchMode):
    """Operators are their references, whose tensors are watched as all others are; `refuse`: a float64 one fails."""

    def __init__(self, refuse: bool):
        super().__init__()
        self.refuse = refuse

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space == "fastjem" and name in ops.OPERATORS:  # others are one product, or a call that is watched itself
            with self:
                result = ops.plain(ops.reference(name))(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)) if self.refuse else ():
            assert not isinstance(x, Tensor) or x.dtype != torch.float64, f"{func} on {x.shape} in float64"
        return result


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of one rank: collectives are made, and what is computed is what several ranks would."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def run(make: Callable[..., Any], *inputs: Any, refuse: bool) -> list[Tensor]:
    """What `make(*inputs)` gives, and the gradients of the sum of it."""
    torch.manual_seed(0)
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    for x in leaves:
        x.grad = None
    with Watch(refuse):
        results = [x for x in tree_leaves(make(*inputs)) if isinstance(x, Tensor)]
        losses = [x.sum() for x in results if x.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
    return [x.detach() for x in results] + [x.grad.clone() for x in leaves if x.grad is not None]


def check(monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], *inputs: Any) -> None:
    """No float64 where the device has none, and nearly the same results as where it has."""
    expected = run(make, *inputs, refuse=False)
    monkeypatch.setattr(arithmetic, "WITHOUT_FLOAT64", ("cpu", "mps"))
    found = run(make, *inputs, refuse=True)
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, rtol=2e-3, atol=1e-4)


def seen(loss: Callable[..., Tensor], *z: Tensor, **options: Any) -> list[Tensor]:
    figures = F.Health(keep_spectrum=True)
    return [loss(*z, health=figures, **options), figures.std, figures.effective_rank, figures.spectrum()]


def table(rows: int) -> Tensor:
    """Of augmentation parameters: a window, everything on."""
    row = [2.0, 1.0, 9.0, 8.0, 1.0, 0.8, 1.3, 0.7, 0.1, 5.0, 0.0, 0.9, 1.0]
    return torch.tensor([row] * rows)


def ema(momentum: float | Tensor) -> list[Tensor]:
    teacher = [normal(3, 4).detach(), normal(5, seed=1).detach()]
    F.ema_update_(teacher, [normal(3, 4, seed=2), normal(5, seed=3)], momentum)
    return teacher


VIEWS = (normal(20, 6), normal(20, 6, seed=1))
STACKED = normal(2, 20, 6)
LABELS = torch.arange(20) % 3
IMAGES = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STUDENT, TEACHER = normal(3, 5, 7), normal(2, 5, 7, seed=1).detach()
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}
SCALE, BIAS = torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
DIRECTIONS = F.random_directions(6, 9, VIEWS[0].detach())


def both(*calls: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: [call(*inputs) for call in calls]


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "augment": (partial(F.augment, mean=[0.5] * 3, std=[0.2] * 3), (IMAGES, table(3))),
    "barlow_twins": (both(F.barlow_twins, partial(seen, F.barlow_twins)), VIEWS),
    "clip_loss": (F.clip_loss, (*VIEWS, SCALE)),
    "crop_resize": (partial(F.crop_resize, size=5), (IMAGES, torch.tensor([2, 0]), table(2))),
    "cross_entropy": (F.cross_entropy, (VIEWS[0], LABELS)),
    "dcl": (F.dcl, VIEWS),
    "dclw": (F.dclw, VIEWS),
    "ema_update_": (lambda: [ema(0.99), ema(torch.tensor(0.99))], ()),
    "emp_ssl": (F.emp_ssl, (STACKED,)),
    "frossl": (F.frossl, (STACKED,)),
    "info_nce": (F.info_nce, (*VIEWS, normal(9, 6, seed=2))),
    "koleo": (F.koleo, VIEWS[:1]),
    "lejepa": (F.lejepa, (normal(3, 20, 6), STACKED, DIRECTIONS)),
    "mean_entropy": (F.mean_entropy, (STUDENT,)),
    "mmcr": (F.mmcr, (normal(5, 2, 6), normal(5, 2, 6, seed=1))),
    "nearest_neighbors": (F.nearest_neighbors, VIEWS),
    "negative_cosine": (F.negative_cosine, VIEWS),
    "nt_xent": (both(F.nt_xent, partial(F.nt_xent, temperature=0.01)), VIEWS),
    "prototype_cross_entropy": (
        both(
            partial(F.prototype_cross_entropy, **TEMPERATURES, statistics=True),
            lambda s, t: F.prototype_cross_entropy(s, t, **TEMPERATURES, teacher_bias=F.sinkhorn_bias(t[0])),
        ),
        (STUDENT, TEACHER),
    ),
    "prototype_head_cross_entropy": (
        partial(F.prototype_head_cross_entropy, **TEMPERATURES),
        (STUDENT, TEACHER, normal(9, 7), normal(9, 7, seed=1).detach()),
    ),
    "random_directions": (lambda z: F.random_directions(6, 9, z.detach()), VIEWS[:1]),
    "regression": (both(F.regression, partial(F.regression, rows=torch.tensor([2, 0]))), VIEWS),
    "gram_loss": (F.gram_loss, (STACKED, STACKED.detach().flip(0))),
    "kmeans": (F.kmeans, (VIEWS[0], VIEWS[1][:3])),
    "knn_votes": (lambda q, b: F.knn_votes(q, b, LABELS, classes=9, k=3), VIEWS),
    "masked_rows": (lambda: F.masked_rows(torch.eye(3) > 0), ()),
    "nnclr": (lambda a, b: F.nnclr(a.detach(), b.detach(), b, a, a.detach()), VIEWS),
    "nearest_rows": (partial(F.nearest_rows, k=3), VIEWS),
    "simdino": (lambda a, b: F.simdino([a, b], [b.detach()]), VIEWS),
    "siglip_loss": (F.siglip_loss, (*VIEWS, SCALE, BIAS)),
    "sigreg": (F.sigreg, (STACKED, DIRECTIONS)),
    "sinkhorn": (both(F.sinkhorn, partial(F.sinkhorn, normalize_samples_first=True)), (TEACHER[0],)),
    "sinkhorn_bias": (
        both(F.sinkhorn_bias, lambda x: F.sinkhorn_bias([x, x], normalize_samples_first=True)),
        (TEACHER[0],),
    ),
    "supcon": (
        both(
            lambda z: F.supcon(z, LABELS),
            lambda z: F.supcon(z, anchors="one"),
            lambda z: F.supcon(z, mask=(LABELS[:, None] == LABELS).float(), normalize=False),
        ),
        (STACKED,),
    ),
    "tico": (F.tico, VIEWS),
    "total_coding_rate": (F.total_coding_rate, (STACKED,)),
    "visreg": (F.visreg, (normal(3, 20, 6), STACKED, DIRECTIONS)),
    "vicreg": (both(F.vicreg, partial(seen, F.vicreg)), VIEWS),
    "w_mse": (F.w_mse, VIEWS),
    "whiten": (F.whiten, VIEWS[:1]),
    "dense_structure": (partial(F.dense_structure, global_clusters=4), (normal(4, 9, 6),)),
    "detcon": (
        partial(F.detcon, mask0=LABELS.view(5, 4), mask1=LABELS.view(5, 4).flip(1)),
        tuple(normal(5, 4, 6, seed=i) for i in range(4)),
    ),
    "hypersphere": (F.hypersphere, VIEWS),
    "macl": (F.macl, VIEWS),
    "patch_kernel_alignment": (F.patch_kernel_alignment, (normal(5, 4, 6), normal(5, 4, 6, seed=1).detach())),
}


def test_each_function_has_its_case() -> None:
    records = {"Clusters", "Health", "TeacherStatistics"}
    assert FUNCTIONS.keys() == set(F.__all__) - records
    assert MODULES.keys() == {name for name in modules.__all__ if name.endswith("Loss")} | {
        "NegativeCosineSimilarity",
        "SIGReg",
        "Whitening2d",
        "sinkhorn",
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = FUNCTIONS[name]
    check(monkeypatch, function, *inputs)


def made(name: str, **options: Any) -> Callable[..., Tensor]:
    """Calls a module of that name, a new one each time: some remember what they saw."""
    return lambda *inputs: getattr(modules, name)(**options)(*inputs)


def vicregl(*features: Tensor) -> Tensor:
    grids = [normal(5, 3, 3, 2, seed=i).detach() for i in range(2)]
    return modules.VICRegLLoss(num_matches=(5, 2))([features[:2], features[2:]], grids)


HIDDEN = torch.arange(36).view(4, 3, 3) % 3 == 0  # 12 patches
FOUR_MAPS = (normal(5, 6), normal(5, 3, 3, 4), normal(5, 6, seed=1), normal(5, 3, 3, 4, seed=1))

MODULES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "BarlowTwinsLoss": (made("BarlowTwinsLoss", track_health=True), VIEWS),
    "ClipLoss": (made("ClipLoss"), (*VIEWS, SCALE)),
    "DCLLoss": (made("DCLLoss"), VIEWS),
    "DCLWLoss": (made("DCLWLoss"), VIEWS),
    "DINOLoss": (lambda s, t: modules.DINOLoss(7)(list(t), list(s), epoch=0), (STUDENT, TEACHER)),
    "EMPSSLLoss": (made("EMPSSLLoss"), (VIEWS,)),
    "FroSSLLoss": (made("FroSSLLoss"), (VIEWS,)),
    "GramLoss": (made("GramLoss"), (STACKED, STACKED.detach().flip(0))),
    "SimDINOLoss": (lambda s, t: modules.SimDINOLoss()(list(t), list(s)), (STUDENT, TEACHER)),
    "IBOTPatchLoss": (made("IBOTPatchLoss", output_dim=7), (normal(12, 7).detach(), normal(12, 7, seed=1), HIDDEN)),
    "KoLeoLoss": (made("KoLeoLoss"), VIEWS[:1]),
    "LeJEPALoss": (
        lambda local, views: modules.LeJEPALoss(sigreg_num_vectors=9)(local_proj=local, global_proj=views),
        (normal(3, 20, 6), STACKED),
    ),
    "VISRegLoss": (
        lambda local, views: modules.VISRegLoss(num_slices=9)(local_proj=local, global_proj=views),
        (normal(3, 20, 6), STACKED),
    ),
    "CAPILoss": (made("CAPILoss"), (normal(5, 3, 7).detach(), normal(5, 3, 7, seed=1))),
    "MMCRLoss": (made("MMCRLoss"), (normal(5, 2, 6), normal(5, 2, 6, seed=1))),
    "MSNLoss": (made("MSNLoss"), (normal(10, 6), normal(5, 6).detach(), normal(8, 6, seed=1))),
    "PMSNLoss": (made("PMSNLoss"), (normal(10, 6), normal(5, 6).detach(), normal(8, 6, seed=1))),
    "PMSNCustomLoss": (
        made("PMSNCustomLoss", target_distribution=torch.ones_like),
        (normal(10, 6), normal(5, 6).detach(), normal(8, 6, seed=1)),
    ),
    "NNCLRLoss": (
        lambda a, b: modules.NNCLRLoss(memory_bank_size=(30, 6))(a.detach(), b.detach(), b, a),
        VIEWS,
    ),
    "NTXentLoss": (made("NTXentLoss", memory_bank_size=(30, 6)), VIEWS),
    "NegativeCosineSimilarity": (made("NegativeCosineSimilarity"), VIEWS),
    "SIGReg": (made("SIGReg", num_vectors=9), (STACKED,)),
    "SigLipLoss": (made("SigLipLoss"), (*VIEWS, SCALE, BIAS)),
    "SupConLoss": (made("SupConLoss"), (normal(20, 2, 6), LABELS)),
    "SwaVLoss": (
        lambda high, low, queue: modules.SwaVLoss()(list(high), [low], [queue] * 2),
        (STACKED, VIEWS[0], VIEWS[1].detach()),
    ),
    "TiCoLoss": (made("TiCoLoss"), VIEWS),
    "VICRegLLoss": (vicregl, FOUR_MAPS),
    "VICRegLoss": (made("VICRegLoss", track_health=True), VIEWS),
    "WMSELoss": (made("WMSELoss", embedding_dim=6, w_size=16), (normal(64, 6),)),
    "Whitening2d": (made("Whitening2d", num_features=6), (normal(40, 6),)),
    "sinkhorn": (modules.sinkhorn, (TEACHER[0],)),
}
MODULES |= {
    name: (lambda *inputs, name=name: CALLS[name].fresh()(*inputs), tuple(CALLS[name].make(8)))
    for name in modules.__all__
    if name.endswith("Loss") and name not in MODULES
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, inputs = MODULES[name]
    check(monkeypatch, loss, *inputs)


def test_losses_of_several_ranks(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    tall = normal(400, 3), normal(400, 3, seed=1)  # of which squares are added and no rows gathered
    constant = {"local_loss": True, "gather_with_grad": False}
    losses = (
        lambda: [F.nt_xent(*VIEWS, group=group), F.dclw(*VIEWS, group=group)],
        lambda: [F.supcon(STACKED, LABELS, group=group), F.supcon(STACKED, LABELS, anchors="one", group=group)],
        lambda: [F.clip_loss(*VIEWS, SCALE, group=group), F.clip_loss(*VIEWS, SCALE, group=group, **constant)],
        lambda: F.siglip_loss(*VIEWS, SCALE, BIAS, group=group),
        lambda: [seen(loss, *z, group=group) for loss in (F.barlow_twins, F.vicreg) for z in (VIEWS, tall)],
        lambda: [F.tico(*VIEWS, group=group), F.sigreg(STACKED, DIRECTIONS, group=group)],
        lambda: [F.sinkhorn(TEACHER[0], group=group), F.mean_entropy(STUDENT, group=group)],
        lambda: F.prototype_cross_entropy(STUDENT, TEACHER, **TEMPERATURES, group=group),
        lambda: mean_loss_of_ranks(VIEWS[0].square().mean(), 20, group),
    )
    for loss in losses:
        with monkeypatch.context() as patch:
            check(patch, loss)


@pytest.mark.parametrize("name", ["dino", "moco", "swav"])
def test_a_training_step_and_its_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, the momentum copy's update, and what is logged of the step."""
    options = {"prototypes": 12, "frozen_epochs": 0} if name != "moco" else {"queue": 24}
    options |= {"bottleneck": 8} if name == "dino" else {"dim": 8}

    def train() -> list[Tensor]:
        step = Step(nn.Sequential(nn.Flatten(), nn.Linear(48, 12)), METHODS[name](12, RunFacts(), hidden=16, **options))
        views = [torch.randn(8, 3, 4, 4) for _ in range(METHODS[name].views.large + METHODS[name].views.small)]
        loss, notes = step(Batch(views, torch.arange(8)), 0)
        loss.backward()
        step.step_ends(0, 0.9)
        return [loss.detach(), *health.figures(notes).values(), *(x.detach() for x in step.teacher.parameters())]

    check(monkeypatch, train)


def test_figures_of_health(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = Codes(normal(9, 6).detach(), normal(5, 6, seed=1).detach(), torch.zeros(5), 0.1)
    notes = {"projection": VIEWS[0].detach(), "embedding": VIEWS[1].detach(), "codes": codes}
    check(monkeypatch, lambda: list(health.figures(notes).values()))
    check(monkeypatch, lambda: [*probes.moments(VIEWS[0].detach()), torch.tensor(probes.rankme(VIEWS[0].detach()))])


KEYED: dict[str, Callable[[Tensor], Any]] = {
    name: lambda samples, name=name: drawn_masks(MaskSpec(0, (14, 14), 0.6, name), 3, 5, samples).hidden
    for name in masks.SAMPLERS
}
KEYED["block"] = lambda samples: masks.block_mask(len(samples), (14, 14), uniform=masks.Keyed(samples, 3, 5, 1))
KEYED["multi_block"] = lambda samples: vars(
    masks.multi_block_mask(len(samples), (14, 14), sizes=(0.3, 0.6), uniform=masks.Keyed(samples, 3, 5, 1))
)


@pytest.mark.parametrize("name", KEYED)
def test_masks_follow_their_key_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    [wide, *_] = run(KEYED[name], samples, refuse=False)
    monkeypatch.setattr(arithmetic, "WITHOUT_FLOAT64", ("cpu", "mps"))
    whole = run(KEYED[name], samples, refuse=True)
    parts = [run(KEYED[name], part, refuse=True) for part in samples.split(3)]
    for x, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(x, torch.cat(of_parts))
    # Only where a number is within 2 ** -24 of a boundary can a mask be another one.
    assert (whole[0] != wide).flatten(1).any(1).float().mean() < 0.05


def test_numbers_of_a_key_are_the_others_first_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.arange(4000)
    exact = philox([words.numpy(), 0, 1, 2], 7)
    monkeypatch.setattr(arithmetic, "WITHOUT_FLOAT64", ("cpu", "mps"))
    zero, one, two = (torch.tensor(i) for i in range(3))
    drawn = philox_on_device([words, zero, one, two], 7)
    assert drawn.dtype == torch.float32
    assert (drawn.double() - torch.from_numpy(exact)).abs().max() < 2**-24
    assert torch.equal(drawn.double() * 2**23 % 1, torch.full((4, 4000), 0.5, dtype=torch.float64))  # exact


def test_rectangles_are_told_apart_without_float64() -> None:
    """Those too whose bits are more than float32 can add."""
    start, length = torch.randint(0, 14, (50, 32)), torch.randint(1, 15, (50, 32))
    covered = mask_reference._covered(start, length, 14)
    assert covered.max() >= 2**31
    for i in range(32):
        inside = (torch.arange(14) - start[:, i, None]) % 14 < length[:, i, None]
        assert torch.equal((covered >> i & 1).bool(), inside)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VIEWS[0].double().sum(),
        lambda: torch.full((), 0.1, dtype=torch.float64),
        lambda: F.nt_xent(*VIEWS),  # within an operator
    ],
)
def test_the_watch_sees_float64(make: Callable[[], Tensor]) -> None:
    with pytest.raises(AssertionError, match="float64"):
        run(make, refuse=True)
