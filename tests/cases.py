"""Every operator's cases: inputs, the public function, and the formula that a user would write in plain torch.

The formula in float64 is the oracle; in the input's own dtype it is the bar: an implementation may err at most twice as
much, plus four units in the last place of the largest value (docs/architecture.md: "Value and gradient").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import option_formulas
import torch
import torch.nn.functional as TF
from torch import Tensor

import fastjem.functional as F
from fastjem.functional.head_usage import head_cross_entropy_and_usage

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
ALL = tuple(DTYPES)


@dataclass(frozen=True)
class Case:
    """`make(generator)` gives float64 tensors, the first `differentiable` of which get gradients."""

    op: str
    name: str
    make: Callable[[torch.Generator], list[Tensor]]
    call: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    differentiable: int = 1
    dtypes: tuple[torch.dtype, ...] = ALL
    # The size of the terms that loss and gradient are sums of, where these may cancel.
    loss_size: float = 0.0
    gradient_size: Callable[..., float] = field(default=lambda *inputs: 0.0)
    interpreted: bool = True  # false: too slow for the interpreter

    def inputs(self, seed: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        tensors = self.make(torch.Generator().manual_seed(seed))
        return [x.to(device, dtype if x.is_floating_point() else None) for x in tensors]

    def run(
        self, function: Callable[..., Tensor], inputs: list[Tensor], upstream: float
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of `upstream * loss`."""
        leaves = [x.detach().requires_grad_() if i < self.differentiable else x for i, x in enumerate(inputs)]
        loss = function(*leaves)
        gradients = torch.autograd.grad(loss * upstream, leaves[: self.differentiable], allow_unused=True)
        return loss.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=False)]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift


def make(*makers: Callable[[torch.Generator], Tensor]) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda g: [m(g) for m in makers]


def _labels(n: int, k: int, ignored: int = 0) -> Callable[[torch.Generator], Tensor]:
    def labels(g: torch.Generator) -> Tensor:
        y = torch.randint(0, k, (n,), generator=g)
        y[:ignored] = -100
        return y

    return labels


def _cross_entropy(n: int, k: int, scale: float = 1.0, ignored: int = 0, **options) -> Case:
    name = f"{n}x{k}" + (f"-sd{scale:g}" if scale != 1 else "") + (f"-{ignored}ignored" if ignored else "")
    return Case(
        "cross_entropy",
        name,
        make(normal(n, k, scale=scale), _labels(n, k, ignored)),
        F.cross_entropy,
        TF.cross_entropy,
        **options,
    )


def _cross_entropy_rows(n: int, k: int, reduction: str, ignored: int = 0, **options) -> Case:
    """Weighted and smoothed; single rows' losses are added by hand."""

    def inputs(g: torch.Generator) -> list[Tensor]:
        weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.1
        return [torch.randn(n, k, generator=g, dtype=torch.float64), _labels(n, k, ignored)(g), weights]

    def ours(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        loss = F.cross_entropy(x, labels, weights=weights, reduction=reduction, label_smoothing=0.2)
        return (loss * weights).sum() if reduction == "none" else loss

    def eager(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = TF.cross_entropy(x, labels, reduction="none", label_smoothing=0.2) * weights
        if reduction == "none":
            return (losses * weights).sum()
        return losses.sum() / (weights[labels != -100].sum() if reduction == "mean" else 1)

    name = f"{n}x{k}-{reduction}" + (f"-{ignored}ignored" if ignored else "")
    return Case("cross_entropy_rows", name, inputs, ours, eager, **options)


def _negative_cosine(n: int, d: int, scale: float = 1.0, shift: float = 0.0, **options) -> Case:
    return Case(
        "negative_cosine",
        f"{n}x{d}" + (f"-sd{scale:g}" if scale != 1 else "") + (f"-mean{shift:g}" if shift else ""),
        make(normal(n, d, scale=scale, shift=shift), normal(n, d, scale=scale, shift=shift)),
        F.negative_cosine,
        lambda p, z: -TF.cosine_similarity(p, z, dim=1).mean(),
        differentiable=2,
        loss_size=1,
        # both terms of the gradient have size 1 / (N |p|) and may cancel (always, for D = 1)
        gradient_size=lambda p, z: 1 / len(p) / min(p.norm(dim=1).min().item(), z.norm(dim=1).min().item()),
        **options,
    )


def _dtypes_of_smooth_l1() -> tuple[torch.dtype, ...]:
    """torch 2.9 has no float16 backward of it on the CPU: no bar."""
    x = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    try:
        TF.smooth_l1_loss(x, torch.zeros_like(x)).backward()
    except NotImplementedError:
        return tuple(dtype for dtype in ALL if dtype != torch.float16)
    return ALL


def _regression(n: int, d: int, beta: float = 2.0, normalize: bool = True, shift: float = 0.0) -> Case:
    def eager(x: Tensor, y: Tensor) -> Tensor:
        y = TF.layer_norm(y, y.shape[1:]) if normalize else y
        return TF.smooth_l1_loss(x, y, beta=beta) if beta else TF.mse_loss(x, y)

    return Case(
        "regression",
        f"{n}x{d}-beta{beta:g}" + ("" if normalize else "-asis") + (f"-mean{shift:g}" if shift else ""),
        make(normal(n, d, scale=2), normal(n, d, shift=shift)),
        lambda x, y: F.regression(x, y, beta=beta, normalize=normalize),
        eager,
        dtypes=_dtypes_of_smooth_l1() if beta else ALL,
    )


def eager_nt_xent(*views: Tensor, temperature: float = 0.5) -> Tensor:
    z = TF.normalize(torch.cat([*views]), dim=1)
    n, v = len(views[0]), len(views)
    similarities = z @ z.T / temperature
    similarities.fill_diagonal_(float("-inf"))
    log_p = similarities.log_softmax(1)
    image = torch.arange(v * n, device=z.device) % n
    positive = (image[:, None] == image) & ~torch.eye(v * n, dtype=torch.bool, device=z.device)
    return -log_p[positive].mean()


def _nt_xent(n: int, d: int, temperature: float, views: int = 2, **options) -> Case:
    call = (
        (lambda *z: F.nt_xent(*z, temperature=temperature))
        if views == 2
        else (lambda *z: F.nt_xent(torch.stack(z), temperature=temperature))
    )
    return Case(
        "nt_xent",
        f"{views}x{n}x{d}-tau{temperature:g}",
        make(*[normal(n, d)] * views),
        call,
        lambda *z: eager_nt_xent(*z, temperature=temperature),
        differentiable=views,
        **options,
    )


def eager_info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    q, p, k = (TF.normalize(x, dim=1) for x in (query, positive, negatives))
    logits = torch.cat([(q * p).sum(1, keepdim=True), q @ k.T], 1) / temperature
    return TF.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def _info_nce(
    n: int, k: int, d: int, temperature: float, differentiable: int = 2, offset: int | None = None, **options
) -> Case:
    def eager(q: Tensor, p: Tensor, negatives: Tensor) -> Tensor:
        if offset is None:
            return eager_info_nce(q, p, negatives, temperature)
        q, p, k = (TF.normalize(x, dim=1) for x in (q, p, negatives))
        own = torch.arange(n, device=q.device)[:, None] + offset
        others = (q @ k.T).scatter(1, own, -torch.inf)
        logits = torch.cat([(q * p).sum(1, keepdim=True), others], 1) / temperature
        return TF.cross_entropy(logits, torch.zeros(n, dtype=torch.long, device=q.device))

    return Case(
        "info_nce",
        f"{n}x{k}x{d}-tau{temperature:g}"
        + ("-learned" if differentiable == 3 else "")
        + ("" if offset is None else f"-own{offset}"),
        make(normal(n, d), normal(n, d), normal(k, d)),
        lambda *x: F.info_nce(*x, temperature=temperature, label_offset=offset),
        eager,
        differentiable=differentiable,
        **options,
    )


def alike(n: int, d: int, sign: float = 1.0) -> Callable[[torch.Generator], list[Tensor]]:
    """Pairs that are identical, or opposite."""

    def pair(g: torch.Generator) -> list[Tensor]:
        z = torch.randn(n, d, generator=g, dtype=torch.float64)
        return [z, z * sign]

    return pair


def eager_dcl(z0: Tensor, z1: Tensor, weights: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    z, n = TF.normalize(torch.cat([z0, z1]), dim=1), len(z0)
    similarities = z @ z.T / temperature
    image = torch.arange(2 * n, device=z.device) % n
    lse = similarities.masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    positives = similarities.diagonal(n).repeat(2)
    return (lse - (positives if weights is None else positives * weights.repeat(2))).mean()


def eager_dclw(z0: Tensor, z1: Tensor) -> Tensor:
    cosines = TF.cosine_similarity(z0.double(), z1.double(), dim=1)
    return eager_dcl(z0, z1, (2 - len(z0) * (cosines / 0.5).softmax(0)).detach().to(z0.dtype))


def eager_supcon(*views: Tensor, temperature: float = 0.07) -> Tensor:
    *views, labels = views
    z, y = TF.normalize(torch.cat(views), dim=1), labels.repeat(len(views))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (y[:, None] == y) & ~itself
    return -(log_p.where(positive, 0).sum(1) / positive.sum(1).clamp_min(1)).mean()


def _supcon(views: int, n: int, d: int, classes: int) -> Case:
    return Case(
        "nt_xent",
        f"supcon-{views}x{n}x{d}-{classes}",
        make(*[normal(n, d)] * views, _labels(n, classes)),
        lambda *x: F.supcon(torch.stack(x[:-1]), x[-1]),
        eager_supcon,
        differentiable=views,
    )


def eager_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, pairs = scale * x @ y.T, torch.arange(len(x), device=x.device)
    return (TF.cross_entropy(logits, pairs) + TF.cross_entropy(logits.T, pairs)) / 2


def eager_siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -TF.logsigmoid(labels * (scale * x @ y.T + bias)).sum() / len(x)


def _image_text(op: str, n: int, d: int, scale: float, length: float = 1.0, bias: float = -10.0, **options) -> Case:
    def inputs(g: torch.Generator) -> list[Tensor]:
        x, y = (TF.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) * length for _ in range(2))
        return [x, y, torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)]

    clip = op == "clip_loss"
    return Case(
        op,
        f"{n}x{d}-scale{scale:g}" + (f"-length{length:g}" if length != 1 else ""),
        lambda g: inputs(g)[: 3 if clip else 4],
        F.clip_loss if clip else F.siglip_loss,
        eager_clip if clip else eager_siglip,
        differentiable=3 if clip else 4,
        # the scale's gradient is a sum of N^2 terms that cancel
        gradient_size=lambda x, y, *_: length * length if n > 1 else 1,
        **options,
    )


def _siglip_pairs(kind: str, n: int = 37, d: int = 33) -> Case:
    """With ids or with masks, and all else."""

    def inputs(g: torch.Generator) -> list[Tensor]:
        x, y = (TF.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
        numbers = torch.tensor([10.0, -1.0], dtype=torch.float64)
        masks = [torch.rand(n, n, generator=g) < 0.2 for _ in range(2)]
        ids = torch.randint(0, 9, (n,), generator=g)
        return [x, y, *numbers, torch.rand(n, generator=g, dtype=torch.float64) + 0.1, ids, *masks]

    def call(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, ids: Tensor, *masks: Tensor) -> Tensor:
        together = {"ids": ids} if kind == "ids" else {"positives": masks[0]}
        options = {"exclude": masks[1], "weights": weights, "label_smoothing": 0.1} | together
        return F.siglip_loss(x, y, scale, bias, **options)

    def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, ids: Tensor, *masks: Tensor):
        together = (ids[:, None] == ids) if kind == "ids" else masks[0]
        target = together.to(x.dtype) * 0.9 + 0.05
        logits = scale * x @ y.T + bias
        pairs = -(target * TF.logsigmoid(logits) + (1 - target) * TF.logsigmoid(-logits)).masked_fill(masks[1], 0)
        return (pairs.sum(1) * weights).sum() / weights.sum()

    return Case("siglip_pairs", f"{n}x{d}-{kind}", inputs, call, eager, differentiable=4, gradient_size=lambda *_: 1)


def eager_prototype_cross_entropy(
    student: list[Tensor],
    teacher: list[Tensor],
    pairs: str,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    w = torch.ones_like(student[0][:, 0]) if weights is None else weights
    terms = []
    for j, t in enumerate(teacher):
        own = 0 if bias is None else bias if bias.dim() == 1 else bias[j]
        q = (t / 0.3 + own).softmax(1).detach()
        for i, s in enumerate(student):
            if pairs == "all" or (i == j) == (pairs == "same"):
                terms.append(-((q * (s / 0.2).log_softmax(1)).sum(1) * w).sum() / w.sum())
    return torch.stack(terms).mean()


def _prototype_cross_entropy(
    s: int, t: int, b: int, k: int, pairs: str, bias: str = "", weighted: bool = False
) -> Case:
    biases = {"": [], "K": [normal(k)], "TK": [normal(t, k)]}[bias]
    weights = [lambda g: torch.rand(b, generator=g, dtype=torch.float64) + 0.1] if weighted else []

    def through(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*x: Tensor) -> Tensor:
            rest = list(x[s + t :])
            return function(
                list(x[:s]), list(x[s : s + t]), rest.pop(0) if bias else None, rest.pop(0) if weighted else None
            )

        return call

    return Case(
        "prototype_cross_entropy",
        f"{s}x{t}x{b}x{k}-{pairs}" + (f"-bias{bias}" if bias else "") + ("-weighted" if weighted else ""),
        make(*[normal(b, k)] * (s + t), *biases, *weights),
        through(
            lambda student, teacher, bias, weights: F.prototype_cross_entropy(
                student,
                teacher,
                student_temperature=0.2,
                teacher_temperature=0.3,
                teacher_bias=bias,
                weights=weights,
                pairs=pairs,
            )
        ),
        through(
            lambda student, teacher, bias, weights: eager_prototype_cross_entropy(
                student, teacher, pairs, bias, weights
            )
        ),
        differentiable=s,
    )


def _prototype_head(
    s: int, t: int, b: int, k: int, d: int, pairs: str, bias: str = "", weighted: bool = False, interpreted: bool = True
) -> Case:
    biases = {"": [], "K": [normal(k)], "TK": [normal(t, k)]}[bias]
    weights = [lambda g: torch.rand(b, generator=g, dtype=torch.float64) + 0.1] if weighted else []

    def unpacked(x: tuple[Tensor, ...]) -> tuple:
        rest = list(x[s + t + 2 :])
        student, teacher = list(x[:s]), list(x[s + 1 : s + 1 + t])
        return student, x[s], teacher, x[s + 1 + t], rest.pop(0) if bias else None, rest.pop(0) if weighted else None

    def call(*x: Tensor) -> Tensor:
        student, w, teacher, v, own, weight = unpacked(x)
        return F.prototype_head_cross_entropy(
            student,
            teacher,
            w,
            v,
            student_temperature=0.2,
            teacher_temperature=0.3,
            teacher_bias=own,
            weights=weight,
            pairs=pairs,
        )

    def eager(*x: Tensor) -> Tensor:
        student, w, teacher, v, own, weight = unpacked(x)
        logits = [z @ w.T for z in student], [z @ v.T for z in teacher]
        return eager_prototype_cross_entropy(*logits, pairs, own, weight)

    features, prototypes = normal(b, d, scale=d**-0.5), normal(k, d)
    return Case(
        "prototype_head_cross_entropy",
        f"{s}x{t}x{b}x{k}x{d}-{pairs}" + (f"-bias{bias}" if bias else "") + ("-weighted" if weighted else ""),
        make(*[features] * s, prototypes, *[features] * t, prototypes, *biases, *weights),
        call,
        eager,
        differentiable=s + 1,
        # logits of size 3 / temperature, known to a rounding each, in the loss and in the probabilities
        loss_size=15.0,
        gradient_size=lambda *x: 15.0 / b / (d**0.5),
        interpreted=interpreted,
    )


def _prototype_head_usage(s: int, t: int, b: int, k: int, d: int, pairs: str, bias: bool = False) -> Case:
    """The loss, and what says how evenly the student uses the prototypes."""

    def call(*x: Tensor) -> Tensor:
        student, w, teacher = list(x[:s]), x[s], list(x[s + 1 : s + 1 + t])
        loss, total = head_cross_entropy_and_usage(
            "prototype_head_usage",
            student,
            teacher,
            w,
            student_temperature=0.2,
            teacher_temperature=0.3,
            teacher_bias=x[-1] if bias else None,
            pairs=pairs,
        )
        mean = total / (s * b)
        return loss + 2 * (mean * mean.log()).sum().to(loss.dtype)

    def eager(*x: Tensor) -> Tensor:
        student, w, teacher = list(x[:s]), x[s], list(x[s + 1 : s + 1 + t])
        logits = [z @ w.T for z in student]
        targets = [z @ w.detach().T for z in teacher]
        loss = eager_prototype_cross_entropy(logits, targets, pairs, x[-1] if bias else None)
        mean = (torch.cat(logits) / 0.2).softmax(1).mean(0)
        return loss + 2 * (mean * mean.log()).sum()

    return Case(
        "prototype_head_usage",
        f"{s}x{t}x{b}x{k}x{d}-{pairs}" + ("-bias" if bias else ""),
        make(*[normal(b, d, scale=d**-0.5)] * s, normal(k, d), *[normal(b, d, scale=d**-0.5)] * t, *[normal(k)] * bias),
        call,
        eager,
        differentiable=s + 1,
        # as for the head's cross-entropy, and a mean entropy of size log K
        loss_size=15.0 + 2 * math.log(k),
        gradient_size=lambda *x: 15.0 / b / (d**0.5),
    )


def _mean_entropy(v: int, b: int, k: int, scale: float = 1.0, dtypes=(torch.float64, torch.float32)) -> Case:
    def eager(*scores: Tensor) -> Tensor:
        p = (torch.cat(scores) / 0.1).softmax(1).mean(0)
        return (p * p.log()).sum() + math.log(k)

    return Case(
        "mean_entropy",
        f"{v}x{b}x{k}-sd{scale:g}",
        make(*[normal(b, k, scale=scale)] * v),
        lambda *scores: F.mean_entropy(list(scores), temperature=0.1),
        eager,
        differentiable=v,
        loss_size=math.log(k + 1),
        gradient_size=lambda *x: 10 * math.log(k + 1) / (v * b),
        dtypes=dtypes,  # eager's 0 log 0 is NaN in float16 where scores are large
    )


def eager_koleo(x: Tensor, topk: int = 1, group_size: int | None = None, p: float = 2) -> Tensor:
    """The mean over groups, each for itself, over rows and over each row's k-th neighbour."""
    losses = []
    for rows in x.split(group_size or len(x)):
        u = TF.normalize(rows, dim=1, eps=1e-8)
        similarities = (u @ u.T).fill_diagonal_(-2)
        order = similarities.argsort(1, descending=True)
        losses += [-(TF.pairwise_distance(u, u[order[:, k]], p, 1e-8) + 1e-8).log().mean() for k in range(topk)]
    return torch.stack(losses).mean()


def _koleo(n: int, d: int, **options) -> Case:
    return Case(
        "koleo",
        f"{n}x{d}" + "".join(f"-{name}{value:g}" for name, value in options.items()),
        make(normal(n, d)),
        lambda x: F.koleo(x, **options),
        lambda x: eager_koleo(x, **options),
        loss_size=20,
        gradient_size=lambda x: 10 / len(x) / x.norm(dim=1).min().item(),
        dtypes=(torch.float64, torch.float32),  # in half precision another row may be the nearest
        interpreted=n < 300,
    )


def directions(d: int, slices: int, like: Tensor) -> Tensor:
    x = torch.arange(1.0, d * slices + 1, dtype=torch.float64).square().cos().reshape(d, slices)
    return TF.normalize(x, dim=0).to(like.device, like.dtype)


def eager_sigreg(z: Tensor, slices: int, knots: int, t_max: float) -> Tensor:
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    phi, weight = (-t.square() / 2).exp(), torch.full_like(t, 2 * t_max / (knots - 1))
    weight[[0, -1]] /= 2
    angles = (z @ directions(z.shape[-1], slices, z))[..., None] * t  # [V, N, S, knots]
    error = (angles.cos().mean(1) - phi).square() + angles.sin().mean(1).square()
    return z.shape[1] * (error * weight * phi).sum(-1).mean()


def _sigreg(v: int, n: int, d: int, slices: int, knots: int = 17, t_max: float = 3.0, scale: float = 1.0) -> Case:
    return Case(
        "characteristic",
        f"sigreg-{v}x{n}x{d}-{slices}-{knots}knots" + (f"-sd{scale:g}" if scale != 1 else ""),
        make(normal(v, n, d, scale=scale)),
        lambda z: F.sigreg(z, directions(d, slices, z), knots=knots, t_max=t_max),
        lambda z: eager_sigreg(z, slices, knots, t_max),
        dtypes=(torch.float64, torch.float32),  # cosines of angles rounded to half precision are no bar
    )


def eager_barlow_twins(z0: Tensor, z1: Tensor) -> Tensor:
    a, b = (TF.batch_norm(z, None, None, training=True) for z in (z0, z1))
    c = a.T @ b / len(a)
    on_diagonal = (c.diagonal() - 1).square().sum()
    return on_diagonal + 5e-3 * (c.square().sum() - c.diagonal().square().sum())


def eager_vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    def regularise(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z - z.mean(0)
        variance = (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()
        c = z.T @ z / (len(z) - 1)
        return variance, (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]

    (v0, c0), (v1, c1) = regularise(z0), regularise(z1)
    return 25 * TF.mse_loss(z0, z1) + 25 * (v0 + v1) / 2 + c0 + c1


def _covariance(op: str, n: int, d: int, scale: float = 1.0) -> Case:
    return Case(
        op,
        f"{n}x{d}" + (f"-sd{scale:g}" if scale != 1 else ""),
        make(normal(n, d, scale=scale), normal(n, d, scale=scale)),
        getattr(F, op),
        {"barlow_twins": eager_barlow_twins, "vicreg": eager_vicreg}[op],
        differentiable=2,
        # through the batch norm, whose centring can cancel everything (always, for N = 2)
        gradient_size=lambda a, b: 1 / len(a) / min(a.std(0).min().item(), b.std(0).min().item()),
        # Half precision as a user would write it overflows or falls to batch norm's own kernels: the bar is float32's.
        dtypes=(torch.float64, torch.float32),
    )


def _ids(n: int, kinds: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(kinds, (n,), generator=g)


def _mask(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(*shape, generator=g) < 0.2


def _weights(n: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(n, generator=g, dtype=torch.float64)


def _views_with_options(n: int, d: int, temperature: float, prior: float = 0.0, **options) -> Case:
    """Ids, a learned temperature, label smoothing, weights, a prior, hard negatives."""

    def function(nt_xent: Callable) -> Callable:
        def call(z0: Tensor, z1: Tensor, hard: Tensor, temperature: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            given = {"ids": ids, "weights": weights, "hard_negatives": hard, "label_smoothing": 0.1, "prior": prior}
            return nt_xent(torch.stack([z0, z1]), temperature=temperature, **given)

        return call

    rows = (normal(n, d), normal(n, d), normal(n, 2, d))
    learned = lambda g: torch.tensor(temperature, dtype=torch.float64)  # noqa: E731
    return Case(
        "similarity_logsumexp",
        f"nt_xent-{n}x{d}-tau{temperature:g}",
        make(*rows, learned, _ids(n, n), _weights(n)),
        function(F.nt_xent),
        function(option_formulas.nt_xent),
        differentiable=4,
        **options,
    )


def _queue_with_options(n: int, k: int, d: int, temperature: float, **options) -> Case:
    """A mask, a temperature of each query, harder negatives."""

    def function(info_nce: Callable) -> Callable:
        def call(query: Tensor, positive: Tensor, queue: Tensor, temperature: Tensor, exclude: Tensor) -> Tensor:
            return info_nce(query, positive, queue, temperature=temperature, exclude=exclude, hardness=0.5)

        return call

    by_query = lambda g: temperature + torch.rand(n, generator=g, dtype=torch.float64) * temperature  # noqa: E731
    return Case(
        "similarity_logsumexp",
        f"info_nce-{n}x{k}x{d}-tau{temperature:g}",
        make(normal(n, d), normal(n, d), normal(k, d), by_query, _mask(n, k)),
        function(F.info_nce),
        function(option_formulas.info_nce),
        differentiable=4,
        **options,
    )


def _pairs_with_options(n: int, d: int, scale: float, **options) -> Case:
    """A mask for both directions, label smoothing, the sum."""

    def function(clip_loss: Callable) -> Callable:
        def call(x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor) -> Tensor:
            return clip_loss(x, y, scale, exclude=exclude, label_smoothing=0.2, reduction="sum")

        return call

    def pairs(g: torch.Generator) -> list[Tensor]:
        x, y = (TF.normalize(z(g), dim=1) for z in (normal(n, d), normal(n, d)))
        return [x, y, torch.tensor(scale, dtype=torch.float64), _mask(n, n)(g)]

    return Case(
        "similarity_logsumexp",
        f"clip-{n}x{d}-scale{scale:g}",
        pairs,
        function(F.clip_loss),
        function(option_formulas.clip_loss),
        differentiable=3,
        **options,
    )


def _gram(b: int, p: int, d: int, scale: float = 1.0, **options) -> Case:
    def eager(s: Tensor, t: Tensor) -> Tensor:
        wide = torch.promote_types(s.dtype, torch.float32)  # the paper computes in float32
        u, v = s.to(wide), t.to(wide)
        if options.get("normalize", True):
            u, v = TF.normalize(u, dim=2), TF.normalize(v, dim=2)
        if options.get("level") == "batch":
            u, v = u.flatten(0, 1), v.flatten(0, 1)
        a, b = u @ u.mT, v @ v.mT
        negatives = options.get("negatives")
        if negatives == "clamp":
            a = a.relu()
        elif negatives == "clamp_teacher":
            a = torch.where((a < 0) & (b < 0), 0, a)
        return TF.mse_loss(a, b if negatives is None else b.relu())

    return Case(
        "gram_loss",
        f"{b}x{p}x{d}" + "".join(f"-{value}" for value in options.values()),
        make(normal(b, p, d, scale=scale), normal(b, p, d, scale=scale)),
        lambda s, t: F.gram_loss(s, t, **options),
        eager,
        loss_size=1.0,
        # a row's gradient is 4 / P of its errors, of size 1, over its length; its part along the row is taken out again
        gradient_size=lambda s, t: 4 / s.shape[1] / s.shape[0] / s.norm(dim=2).min().item(),
    )


def _regression_rows(n: int, d: int, rows: list[int], beta: float = 2.0, weighted: bool = True) -> Case:
    """Patches of two images, of which one has another number of masked ones."""
    index = torch.tensor(rows)
    weights = torch.linspace(0.2, 1, len(rows), dtype=torch.float64)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        at = index.to(x.device)
        losses = TF.smooth_l1_loss(x[at], TF.layer_norm(y, (d,))[at], beta=beta, reduction="none").mean(1)
        w = weights.to(losses) if weighted else torch.ones_like(losses)
        return (losses * w).sum() / w.sum()

    return Case(
        "regression_rows",
        f"{n}x{d}-{len(rows)}rows" + ("" if weighted else "-alike"),
        make(normal(n, d), normal(n, d)),
        lambda x, y: F.regression(
            x, y, beta=beta, rows=index.to(x.device), weights=weights.to(x.device) if weighted else None
        ),
        eager,
        dtypes=_dtypes_of_smooth_l1(),
        loss_size=1.0,
        gradient_size=lambda x, y: 1 / len(rows) / d,
    )


LOSSES = [
    # one row; odd widths (no 128-bit loads); the class counts of CIFAR, ImageNet and SwAV; K too large for registers
    _cross_entropy(1, 1),
    _cross_entropy(1, 7),
    _cross_entropy(33, 10),
    _cross_entropy(5, 1003, scale=10),
    _cross_entropy(17, 3000, ignored=5),
    _cross_entropy(3, 70_001),
    _cross_entropy(2, 131_072),
    _cross_entropy_rows(1, 1, "sum"),
    _cross_entropy_rows(33, 10, "mean", ignored=5),
    _cross_entropy_rows(5, 1003, "none", ignored=1),
    _cross_entropy_rows(3, 70_001, "mean"),
    # D = 1 (the gradient is 0), odd, below and above a block, a large common mean
    _negative_cosine(1, 1),
    _negative_cosine(3, 7),
    _negative_cosine(37, 128),
    _negative_cosine(5, 300, scale=100),
    _negative_cosine(16, 2048, shift=3),
    _negative_cosine(2, 20_001),
    _nt_xent(1, 16, 0.5),
    _nt_xent(9, 33, 0.1),
    _nt_xent(40, 128, 0.5),
    _nt_xent(7, 16, 0.2, views=4),
    # more rows than a tile; the running maximum, and pairs that are all that counts or nothing; rows of large norm
    _nt_xent(700, 20, 0.1, interpreted=False),
    _nt_xent(600, 16, 0.01, interpreted=False),
    _nt_xent(20, 24, 0.01, views=3),
    Case(
        "nt_xent",
        "identical-tau0.01",
        alike(33, 64),
        lambda *z: F.nt_xent(*z, temperature=0.01),
        lambda *z: eager_nt_xent(*z, temperature=0.01),
        differentiable=2,
        gradient_size=lambda *z: 1e-4,
    ),
    Case(
        "nt_xent",
        "opposite-tau0.01",
        alike(33, 64, -1),
        lambda *z: F.nt_xent(*z, temperature=0.01),
        lambda *z: eager_nt_xent(*z, temperature=0.01),
        differentiable=2,
    ),
    Case(
        "nt_xent",
        "large-norm",
        make(normal(9, 40, scale=3000), normal(9, 40, scale=3000)),
        F.nt_xent,
        eager_nt_xent,
        differentiable=2,
        dtypes=(torch.float64, torch.float32, torch.bfloat16),
    ),
    Case("nt_xent", "dcl-12x33", make(normal(12, 33), normal(12, 33)), F.dcl, eager_dcl, differentiable=2),
    Case("nt_xent", "dclw-12x33", make(normal(12, 33), normal(12, 33)), F.dclw, eager_dclw, differentiable=2),
    _supcon(1, 20, 16, 5),
    _supcon(2, 20, 33, 4),
    _supcon(3, 7, 16, 100),
    _nt_xent(9, 40, 0.2),
    _info_nce(1, 1, 5, 0.1),
    _info_nce(7, 2100, 128, 0.1, interpreted=False),
    _info_nce(12, 40, 24, 0.01, differentiable=3),
    _info_nce(1100, 600, 8, 0.01, interpreted=False),  # more than one tile, each with a running maximum
    _info_nce(9, 30, 16, 0.1, differentiable=3, offset=4),
    _info_nce(12, 100, 32, 0.2),
    _info_nce(12, 50, 17, 0.07, differentiable=3),
    _image_text("clip_loss", 1, 16, 14.0),
    _image_text("clip_loss", 37, 33, 14.0),
    _image_text("clip_loss", 40, 64, 100.0),
    _image_text("clip_loss", 1100, 16, 30.0, interpreted=False),
    _image_text("clip_loss", 1500, 8, 20.0, interpreted=False),  # columns' sums of many small numbers
    _image_text("clip_loss", 12, 48, 10.0, length=9.0),
    _image_text("clip_loss", 24, 40, 14.0),
    _image_text("siglip_loss", 1, 16, 10.0),
    _image_text("siglip_loss", 1100, 16, 10.0, interpreted=False),
    _image_text("siglip_loss", 37, 33, 10.0, bias=-1.0),
    *(_siglip_pairs(kind) for kind in ("ids", "masks")),
    # smallest first: on it the compiled graphs are tried, too; then a running maximum, and more rows than a tile has
    _views_with_options(7, 9, 0.3, prior=0.05),
    _views_with_options(24, 33, 0.01),
    _views_with_options(530, 16, 0.1, interpreted=False),
    _queue_with_options(9, 40, 16, 0.1),
    _queue_with_options(1, 33, 8, 0.01),
    _queue_with_options(70, 1100, 16, 0.01, interpreted=False),
    _pairs_with_options(13, 16, 10.0),
    _pairs_with_options(40, 24, 100.0),
    _pairs_with_options(1100, 8, 20.0, interpreted=False),
    _prototype_cross_entropy(2, 2, 3, 7, "different"),
    _prototype_cross_entropy(4, 2, 5, 100, "different", bias="K"),
    _prototype_cross_entropy(3, 2, 6, 33, "different", bias="TK", weighted=True),
    _prototype_cross_entropy(2, 2, 5, 12, "same", weighted=True),
    _prototype_cross_entropy(3, 1, 4, 30, "all"),
    # one image; three teachers (the sum of the other two); more than a block of 1024, in odd numbers
    _prototype_cross_entropy(2, 2, 1, 3, "different"),
    _prototype_cross_entropy(1, 3, 4, 17, "different", bias="TK"),
    _prototype_cross_entropy(4, 3, 9, 1031, "different", bias="K"),
    _prototype_cross_entropy(2, 3, 3, 1025, "same"),
    _prototype_head(2, 2, 1, 3, 5, "different"),
    _prototype_head(4, 2, 5, 130, 16, "different", bias="TK"),
    _prototype_head(2, 3, 33, 700, 32, "different", bias="K", weighted=True, interpreted=False),
    _prototype_head(3, 1, 7, 67, 8, "all", bias="K", weighted=True),
    _prototype_head(2, 3, 5, 129, 40, "same"),
    _prototype_head(2, 2, 3, 20, 130, "different", weighted=True),  # on a GPU: chunks of 64 columns, the last of 2
    _prototype_head_usage(3, 1, 5, 67, 8, "all", bias=True),
    _prototype_head_usage(3, 2, 4, 130, 16, "different"),
    _prototype_head_usage(1, 1, 1, 3, 5, "all"),
    _mean_entropy(1, 1, 3),
    _mean_entropy(4, 9, 100),
    _mean_entropy(2, 3, 1500, scale=0.1, dtypes=ALL),
    _koleo(3, 8),
    _koleo(300, 33),
    # several neighbours; groups smaller and larger than a strip of tiles; another norm
    _koleo(40, 16, topk=3),
    _koleo(60, 9, topk=2, group_size=12),
    _koleo(600, 8, group_size=300),
    _koleo(35, 12, topk=2, p=1),
    _koleo(35, 12, p=3),
    # odd widths, several blocks of 1024, large means, both kinds of error, squared error
    _regression(1, 1),
    _regression(5, 37),
    _regression(9, 2050, beta=0.5),
    _regression(7, 130, beta=0),
    _regression(3, 8200),
    _regression(7, 130, normalize=False),
    _regression(5, 96, shift=30),
    # some rows out of order, one, all of them; more than a block of a row
    _regression_rows(9, 37, [7, 0, 3, 8]),
    _regression_rows(3, 1030, [1]),
    _regression_rows(3, 8200, [2, 0]),
    _regression_rows(4, 5, [0, 1, 2, 3], weighted=False),
    # one patch; odd numbers; negatives; more than a tile of rows, and than one tile's images
    _gram(1, 1, 1),
    _gram(3, 7, 5),
    _gram(2, 9, 6, negatives="clamp"),
    _gram(2, 9, 6, negatives="clamp_teacher"),
    _gram(2, 5, 6, level="batch", normalize=False),
    _gram(2, 300, 4),
    # slices that fill lanes and don't; few and many frequencies; embeddings so large that angles wrap many times
    _sigreg(2, 9, 5, 21),
    _sigreg(1, 300, 8, 16, knots=2),
    _sigreg(1, 33, 16, 40, knots=9, t_max=5.0, scale=100),
    _covariance("barlow_twins", 2, 3),
    _covariance("barlow_twins", 16, 40),
    _covariance("barlow_twins", 40, 16),
    _covariance("vicreg", 2, 3),
    _covariance("vicreg", 16, 40, scale=0.5),
    _covariance("vicreg", 40, 16),
]
