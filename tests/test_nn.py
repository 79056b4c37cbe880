"""Modules, heads, helpers and schedules against lightly's: arguments, defaults, values, gradients and state dicts."""

import copy
import inspect
import random
import warnings

import pytest
import torch
from torch import Tensor

import fastjem.functional as F
import fastjem.nn as ours
from fastjem import schedules
from fastjem.nn import heads, masks, momentum, tokens

pytest.importorskip("lightly.loss", reason="lightly is not installed")
import lightly.loss as theirs
from lightly.models import utils
from lightly.models.modules import heads as their_heads
from lightly.utils import scheduler as their_schedules

LOSSES = {
    "BarlowTwinsLoss": {"track_health", "track_spectrum"},
    "VICRegLoss": {"variance_factor", "track_health", "track_spectrum"},
    "VICRegLLoss": {},
    "TiCoLoss": {"defer_covariance_update"},
    "EMPSSLLoss": {},
    "WMSELoss": {},
    "Whitening2d": {},
    "MMCRLoss": {},
    "FroSSLLoss": {},
    "LeJEPALoss": {},
    "SIGReg": {},
    "NegativeCosineSimilarity": {},
}
HEADS = [
    name
    for name, head in vars(heads).items()
    if inspect.isclass(head) and issubclass(head, heads.ProjectionHead) and not name.startswith("_")
]


def signature(function, extra=()) -> list[tuple]:
    parameters = inspect.signature(function).parameters.values()
    return [
        (p.name, getattr(p.default, "__name__", p.default), p.kind)
        for p in parameters
        if p.name not in extra and p.name != "self"
    ]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_the_same_arguments(name):
    mine, theirs_ = getattr(ours, name), getattr(theirs, name)
    assert signature(mine.__init__, LOSSES[name]) == signature(theirs_.__init__)
    assert [p[0] for p in signature(mine.forward)] == [p[0] for p in signature(theirs_.forward)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(mine, other, *inputs: Tensor, rtol: float = 1e-9) -> None:
    results = []
    for function in (mine, other):
        torch.manual_seed(7)
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves)
        results.append((loss.detach().squeeze(), *torch.autograd.grad(loss.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (6, 4, 5), (5, 2, 3, 4)])
def test_vicreg_and_barlow_twins(shape):
    a, b = normal(*shape), normal(*shape, seed=1)
    assert_same(ours.VICRegLoss(10, 20, 2, eps=1e-3), theirs.VICRegLoss(10, 20, 2, eps=1e-3), a, b)
    if len(shape) == 2:
        assert_same(ours.BarlowTwinsLoss(0.1), theirs.BarlowTwinsLoss(0.1), a, b)


@pytest.mark.parametrize("local_views", [0, 2])
def test_vicregl(local_views):
    count = 2 + local_views
    sides = [3, 3, 2, 2][:count]
    features = [normal(5, 6, seed=i) for i in range(count)]
    maps = [normal(5, s, s, 4, seed=10 + i) for i, s in enumerate(sides)]
    grids = [normal(5, s, s, 2, seed=20 + i) for i, s in enumerate(sides)]

    def run(module):
        def loss(*x: Tensor) -> Tensor:
            pairs = list(zip(x[:count], x[count:], strict=True))
            local = (pairs[2:], grids[2:]) if local_views else (None, None)
            return module(pairs[:2], grids[:2], *local)

        return loss

    options = {"num_matches": (5, 2), "alpha": 0.6}
    assert_same(run(ours.VICRegLLoss(**options)), run(theirs.VICRegLLoss(**options)), *features, *maps)


def test_tico_over_steps_and_its_checkpoint():
    mine, other = ours.TiCoLoss(beta=0.7, rho=3), theirs.TiCoLoss(beta=0.7, rho=3)
    for step in range(3):
        assert_same(mine, other, normal(9, 5, seed=step), normal(9, 5, seed=step + 10))
    frozen = mine.C.clone()
    mine(normal(9, 5), normal(9, 5), update_covariance_matrix=False)
    assert torch.equal(mine.C, frozen)
    restored = ours.TiCoLoss(beta=0.7, rho=3)
    restored.load_state_dict(mine.state_dict())
    assert torch.equal(restored.C, mine.C)


def test_emp_ssl_is_lightlys_with_the_other_sign_on_the_rate():
    from lightly.loss.emp_ssl_loss import tcr_loss

    views = [normal(7, 12, seed=i) for i in range(4)]

    def papers(*x: Tensor) -> Tensor:
        return theirs.EMPSSLLoss()(list(x)) - 2 * tcr_loss(torch.stack(x), 0.2)

    assert_same(lambda *x: ours.EMPSSLLoss()(list(x)), papers, *views, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 12), (5, 9), (9, 5), (1, 3)])
def test_total_coding_rate(shape):
    z = normal(*shape)
    d, n = shape[-1], shape[-2]
    identity = torch.eye(d, dtype=z.dtype)
    expected = 0.5 * torch.logdet(identity + d / (n * 0.3) * z.mT @ z).mean()
    torch.testing.assert_close(F.total_coding_rate(z, eps=0.3), expected)
    assert torch.autograd.gradcheck(F.total_coding_rate, z.requires_grad_())


def test_w_mse_and_its_running_statistics():
    options = {"embedding_dim": 6, "w_size": 16, "w_iter": 2, "num_samples": 3}
    mine, other = ours.WMSELoss(**options), theirs.WMSELoss(**options)
    assert_same(mine, other, normal(96, 6, dtype=torch.float32), rtol=1e-4)
    assert mine.state_dict().keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value)
    x = normal(5, 6, dtype=torch.float32)
    torch.testing.assert_close(mine.whitening.eval()(x), other.whitening.eval()(x))
    with pytest.raises(ValueError, match="multiple of w_size"):
        mine(normal(60, 6))


def test_mmcr_and_frossl():
    assert_same(ours.MMCRLoss(0.1), theirs.MMCRLoss(0.1), normal(4, 3, 6), normal(4, 3, 6, seed=1))
    for n, d in ((5, 9), (9, 5)):
        views = [normal(n, d, seed=i) for i in range(3)]
        assert_same(lambda *x: ours.FroSSLLoss(0.5)(list(x)), lambda *x: theirs.FroSSLLoss(0.5)(list(x)), *views)


@pytest.mark.parametrize("knots, vectors", [(2, 3), (17, 100)])
def test_sigreg_and_lejepa(knots, vectors, monkeypatch):
    from fastjem.functional import gaussian

    monkeypatch.setattr(gaussian, "ELEMENTS_AT_ONCE", 500)  # many groups of slices
    options = {"knots": knots, "num_vectors": vectors}
    z = [normal(3, 10, 6, dtype=torch.float32), normal(2, 10, 6, seed=1, dtype=torch.float32)]
    mine, other = ours.SIGReg(**options), theirs.SIGReg(**options)
    assert_same(mine, other, z[0], rtol=2e-5)
    assert_same(mine, other, z[0][0], rtol=2e-5)
    assert mine.state_dict().keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value)

    def run(module):
        return lambda a, b: module(local_proj=a, global_proj=b)

    assert_same(run(ours.LeJEPALoss(0.3)), run(theirs.LeJEPALoss(0.3)), *z, rtol=2e-5)
    directions = F.random_directions(4, 5, z[0].double())
    assert torch.autograd.gradcheck(lambda x: F.sigreg(x, directions, knots=knots), normal(2, 5, 4).requires_grad_())


@pytest.mark.parametrize("dim", [0, 1, -1, 2])
def test_negative_cosine_similarity_along_any_dimension(dim):
    a, b = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    assert_same(ours.NegativeCosineSimilarity(dim), theirs.NegativeCosineSimilarity(dim), a, b)
    assert_same(ours.NegativeCosineSimilarity(), theirs.NegativeCosineSimilarity(), a[0], b[0])


@pytest.mark.parametrize("beta", [0, 0.5, 2.0])
def test_regression_is_data2vecs(beta):
    prediction, target = normal(4, 3, 6), normal(4, 3, 6, seed=1) * 3 + 1
    normalised = torch.nn.functional.layer_norm(target, (6,))
    distance = (prediction - normalised).abs()
    if beta:
        expected = torch.where(distance < beta, distance**2 / 2 / beta, distance - beta / 2).mean()
    else:
        expected = distance.square().mean()
    target.requires_grad_()
    loss = F.regression(prediction.requires_grad_(), target, beta=beta)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert target.grad is None and prediction.grad is not None
    half = F.regression(prediction.detach().bfloat16(), target.bfloat16(), beta=beta)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", HEADS)
def test_a_head_computes_the_same_from_the_same_weights(name):
    mine, other = getattr(heads, name), getattr(their_heads, name)
    assert signature(mine.__init__) == signature(other.__init__)
    if name == "ProjectionHead":
        return
    options = [{}]
    parameters = inspect.signature(mine.__init__).parameters
    if "num_layers" in parameters:
        options += [{"num_layers": n} for n in (2, 3, 4)]
    if "batch_norm" in parameters:
        options += [{"batch_norm": flag} for flag in (True, False)]
    for option in options:
        widths = {"input_dim": 12, "hidden_dim": 10, "output_dim": 6}
        a, b = mine(**widths, **option), other(**widths, **option)
        b.load_state_dict(a.state_dict(), strict=True)
        x = normal(8, 12, dtype=torch.float32)
        torch.testing.assert_close(a(x), b(x))
        torch.testing.assert_close(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("buffers", ["leave", "copy", "average"])
def test_update_momentum(buffers):
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student)
    other = copy.deepcopy(student)
    for _ in range(3):
        student(torch.randn(8, 5) * 2 + 1)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        ours.update_momentum(student, teacher, 0.9, buffers=buffers)
        utils.update_momentum(student, other, 0.9)
    for a, b in zip(teacher.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    mine, its = teacher.state_dict(), student.state_dict()
    for key in ("1.running_mean", "1.running_var"):
        average = 0.9 * before[key] + 0.1 * its[key]
        expected = {"leave": before[key], "copy": its[key], "average": average}[buffers]
        torch.testing.assert_close(mine[key], expected)
    assert mine["1.num_batches_tracked"] == (0 if buffers == "leave" else 3)
    # parameters replaced between updates, as load_state_dict(assign=True) and .to() do
    teacher.load_state_dict(copy.deepcopy(before), assign=True)
    ours.update_momentum(student, teacher.double(), 0.5)
    torch.testing.assert_close(teacher[0].weight, 0.5 * before["0.weight"].double() + 0.5 * its["0.weight"].double())
    with pytest.raises(ValueError, match="buffers must be one of leave, copy, average, got 'all'"):
        ours.update_momentum(student, teacher, 0.9, buffers="all")


def test_update_momentum_writes_nothing_before_all_is_checked():
    student = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    student[1].num_batches_tracked.fill_(3)

    def without(name: str) -> torch.nn.Module:
        teacher = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
        setattr(teacher[1], name, torch.zeros(7))
        return teacher

    teachers = [without("running_var"), without("num_batches_tracked"), copy.deepcopy(student).half()]
    for teacher in teachers:
        teacher[1].num_batches_tracked.zero_()
        before = copy.deepcopy(teacher.state_dict())
        for buffers in ("average", "copy"):
            with pytest.raises(ValueError, match=r"(ema_update_|update_momentum): "):
                ours.update_momentum(student, teacher, 0.9, buffers=buffers)
        for key, value in teacher.state_dict().items():
            assert torch.equal(value, before[key]), key
    with pytest.raises(ValueError, match="as many buffers, got 0 and 3"):
        ours.update_momentum(student, torch.nn.Linear(5, 4), 0.9, buffers="copy")


def test_weight_decay_groups_and_frozen_models():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4))
    for norm in (False, True):
        for bias in (False, True):
            mine = momentum.get_weight_decay_parameters([model], norm, bias)
            for a, b in zip(mine, utils.get_weight_decay_parameters([model], norm, bias), strict=True):
                assert [id(p) for p in a] == [id(p) for p in b]
    ours.deactivate_requires_grad(model)
    assert not any(p.requires_grad for p in model.parameters())
    ours.activate_requires_grad(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name, arguments, options",
    [
        ("random_token_mask", ((4, 50),), {}),
        ("random_token_mask", ((4, 50),), {"mask_ratio": 0.75, "mask_class_token": True}),
        ("random_token_mask", ((2, 1),), {"mask_ratio": 0.9}),
        ("random_grid_token_mask", ((3, 65),), {}),
        ("random_prefix_mask", ((5, 9), 6), {}),
        ("random_inverse_block_mask", ((4, 197),), {}),
        ("random_inverse_block_mask", ((4, 49),), {"num_prefix_tokens": 0, "mask_ratio": 0.8, "roll": False}),
        ("random_block_mask", ((8, 14, 14),), {}),
        ("random_block_mask", ((5, 7, 9),), {"batch_mask_ratio": 1.0, "max_num_masks_per_block": 20}),
        ("random_block_mask_image", ((14, 14), 60), {}),
    ],
)
def test_a_seed_gives_lightlys_masks(name, arguments, options):
    mine, other = getattr(masks, name), getattr(utils, name)
    assert signature(mine) == signature(other)
    for seed in range(5):
        results = []
        for function in (mine, other):
            random.seed(seed)
            torch.manual_seed(seed)
            result = function(*arguments, **options)
            results.append(result if isinstance(result, tuple) else (result,))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_token_helpers():
    x, y, token = normal(2, 9, 5), normal(2, 9, 5, seed=1), normal(1, 1, 5)
    index = torch.tensor([[1, 4, 7], [8, 0, 2]])
    mask = normal(2, 9) > 0
    calls = {
        "repeat_token": (token, (2, 3)),
        "expand_index_like": (index, x),
        "get_at_index": (x, index),
        "set_at_index": (x, index, y[:, :3]),
        "mask_at_index": (x, index, token),
        "mask_bool": (x, mask, token),
        "prepend_class_token": (x, token),
        "patchify": (normal(2, 3, 8, 8), 4),
        "unpatchify": (normal(2, 4, 48), 4),
        "most_similar_index": (x, y),
        "select_most_similar": (x, y, y),
        "repeat_interleave_batch": (x.repeat(3, 1, 1), 2, 3),
        "apply_masks": (x, [index, index.flip(0)]),
        "nearest_neighbors": (x, y, torch.cdist(x, y), 4),
    }
    more = {"unpatchify": [("grid", None, inspect.Parameter.KEYWORD_ONLY)]}  # of images that are no squares
    for name, arguments in calls.items():
        mine, other = getattr(tokens, name), getattr(utils, name)
        assert signature(mine) == signature(other) + more.get(name, []), name
        a, b = mine(*arguments), other(*arguments)
        for left, right in zip(*((r if isinstance(r, tuple) else (r,)) for r in (a, b)), strict=True):
            torch.testing.assert_close(left, right, msg=name)


@pytest.mark.parametrize("name", ["cosine_schedule", "cosine_warmup_schedule", "linear_warmup_schedule"])
def test_schedules(name):
    mine, other = getattr(schedules, name), getattr(their_schedules, name)
    assert signature(mine) == signature(other)
    extra = {"cosine_schedule": [()], "linear_warmup_schedule": [()]}.get(name, [(0, 0.1), (3, 0.0), (3, 0.0, 0.7)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for total in (0, 1, 2, 10):
            for step in range(12):
                for values in ((0.996, 1.0), (1.0, 0.001)) if name != "linear_warmup_schedule" else ((0.1, 1.0),):
                    for more in extra:
                        for period in ({}, {"period": 4}) if "cosine" in name else ({},):
                            if more and (more[0] > total or (period and not total)):
                                continue
                            a = mine(step, total, *values, *more, **period)
                            assert a == pytest.approx(
                                other(step, total, *values, *more, **period), rel=1e-12, abs=1e-15
                            )
                            assert type(a) is float
    with pytest.raises(ValueError, match="negative"):
        mine(-1, 10, 0.1, 1.0, *extra[0]) if name != "cosine_warmup_schedule" else schedules.cosine_schedule(
            -1, 10, 0, 1
        )


def test_cosine_warmup_scheduler():
    rates = []
    for scheduler in (schedules.CosineWarmupScheduler, their_schedules.CosineWarmupScheduler):
        assert signature(scheduler.__init__) == signature(their_schedules.CosineWarmupScheduler.__init__)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        steps = scheduler(optimizer, 3, 10, warmup_start_value=0.1)
        own = []
        for _ in range(10):
            own.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            steps.step()
        rates.append(own)
        assert scheduler(optimizer, 3, 10).state_dict().keys() == steps.state_dict().keys()
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


MISTAKES = [
    (
        lambda: F.tico(torch.zeros(3, 4), torch.zeros(5, 4)),
        "tico: z0 and z1 must be [N, D] both, got (3, 4) and (5, 4)",
    ),
    (lambda: F.total_coding_rate(torch.zeros(3)), "total_coding_rate: z must be [N, D] or [V, N, D], got (3,)"),
    (lambda: F.frossl([torch.zeros(3, 4)]), "frossl: views must be at least two, got 1"),
    (lambda: F.whiten(torch.ones(5, 2)), "whiten: the covariance must be positive definite, got a singular one"),
    (lambda: F.sigreg(torch.zeros(3, 4), torch.zeros(5, 2)), "sigreg: directions must be [4, S], got (5, 2)"),
    (lambda: ours.MMCRLoss(-1), "MMCRLoss: lmda must be at least 0 and finite, got -1"),
    (lambda: ours.LeJEPALoss(2), "LeJEPALoss: lambda_param must be in [0, 1], got 2"),
    (lambda: ours.WMSELoss(128, w_size=100), "WMSELoss: w_size must be at least twice embedding_dim = 128, got 100"),
    (
        lambda: F.regression(torch.zeros(3, 4), torch.zeros(4)),
        "regression: prediction and target must be [..., D] both",
    ),
]


@pytest.mark.parametrize("mistake, message", MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_told(mistake, message):
    with pytest.raises(ValueError) as told:
        mistake()
    assert str(told.value).startswith(message)


def test_autocast_and_half_precision_compute_in_float32():
    a, b = normal(6, 10, dtype=torch.float32), normal(6, 10, seed=1, dtype=torch.float32)
    losses = {
        "tico": lambda x, y: F.tico(x, y)[0],
        "rate": lambda x, y: F.total_coding_rate(x),
        "emp_ssl": lambda x, y: F.emp_ssl(torch.stack([x, y])),
        "frossl": lambda x, y: F.frossl([x, y]),
        "mmcr": lambda x, y: F.mmcr(x[None], y[None]),
        "regression": F.regression,
        "sigreg": lambda x, y: F.sigreg(x, torch.eye(10)),
        "visreg": lambda x, y: F.visreg(x[None], y[None], torch.eye(10)),
    }
    for name, loss in losses.items():
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss(a, b), loss(a.clone(), b), msg=name)
            value = loss(a, b)
        torch.testing.assert_close(value, loss(a, b), rtol=1e-6, atol=0, msg=name)
        half = loss(a.bfloat16(), b.bfloat16())
        torch.testing.assert_close(half, loss(a.bfloat16().float(), b.bfloat16().float()), rtol=1e-6, atol=0, msg=name)


NOT_FINITE = {
    "total_coding_rate": lambda a, b: F.total_coding_rate(a) + F.total_coding_rate(torch.stack([b, a])),
    "emp_ssl": lambda a, b: ours.EMPSSLLoss()([a, b]),
    "mmcr": lambda a, b: ours.MMCRLoss()(a[:, None], b[:, None]),
    "frossl": lambda a, b: ours.FroSSLLoss()([a, b]),
    "whiten": lambda a, b: F.whiten(a, eps=0.1)[0].sum() + b.sum(),
    "w_mse": lambda a, b: F.w_mse(a, b, eps=0.1),
    "WMSELoss": lambda a, b: ours.WMSELoss(a.shape[1], w_size=2 * a.shape[1], eps=0.1)(torch.cat([a, b])),
    "tico": lambda a, b: F.tico(a, b)[0],
    "barlow_twins": lambda a, b: seen("barlow_twins", a, b),
    "vicreg": lambda a, b: seen("vicreg", a, b),
}


def seen(op: str, a: Tensor, b: Tensor) -> Tensor:
    health = F.Health(keep_spectrum=True)
    loss = getattr(F, op)(a, b, health=health)
    return loss + health.spectrum().sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_gives_nan_and_no_exception(name, shape, bad):
    """A GradScaler skips a step whose gradient isn't finite; an exception of a decomposition would end the training."""
    a, b = normal(*shape), normal(*shape, seed=1)
    if name == "WMSELoss" and shape[0] < shape[1]:
        return
    finite = NOT_FINITE[name](a, b)
    assert finite.isfinite()
    a[1, 2] = bad
    a.requires_grad_()
    loss = NOT_FINITE[name](a, b)
    loss.backward()
    assert loss.isnan() and a.grad.isnan().any()
