"""A method's step in float64 against a formula, written from its paper or by the authors' code, in plain torch.

Encoders and heads are called as modules; everything behind them is the formula's own. Momentum copies and memories hold
something of their own, so that a formula that takes the one for the other fails.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from test_methods import make
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastjem.data.batch import Batch
from fastjem.methods import METHODS, RunFacts
from fastjem.step import Step


@dataclass
class Exact:
    """A method's step, and its batch, in float64."""

    step: Step
    batch: Batch

    @property
    def method(self) -> nn.Module:
        return self.step.method

    def encoder(self, images: Tensor, **options: Tensor) -> Tensor:
        return self.step.encoder(images, **options).pooled

    def teacher_encoder(self, images: Tensor) -> Tensor:
        return self.step.teacher["encoder"](images).pooled

    def projected(self, views: list[Tensor]) -> list[Tensor]:
        """The student's projections of views of one size or of several, as many tensors."""
        return list(self.method.projector(torch.cat([self.encoder(v) for v in views])).chunk(len(views)))

    def targets(self, views: list[Tensor]) -> list[Tensor]:
        """The momentum encoder's."""
        with torch.no_grad():
            pooled = torch.cat([self.teacher_encoder(v) for v in views])
            return list(self.step.teacher["projector"](pooled).chunk(len(views)))


def exact(name: str, momentum_encoder: bool | None = None, run: RunFacts = RunFacts(), **options: object) -> Exact:
    """See the module's text."""
    step, batch = make(name, momentum_encoder, run, **options)
    step.double()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in step.parameters():
            if p.dim() < 2 and p.numel() > 1:  # biases and the like, which many layers begin without
                p.add_(0.1 * torch.randn_like(p))
        for p in step.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    kinds = METHODS[name].views
    if kinds.small and not kinds.mask:
        batch = batch._replace(views=batch.views[: kinds.large + 2])
    views = [view.double() for view in batch.views]
    return Exact(step, batch._replace(views=views, tables=[table.double() for table in batch.tables]))


def check(it: Exact, formula: Callable[[], Tensor], at: int = 0, rtol: float = 1e-7) -> Tensor:
    """The step's loss and its gradients are the formula's; the loss.

    rtol: of gradients that pass a schedule's float32 numbers, more.
    """
    torch.manual_seed(5)
    loss, _ = it.step(it.batch, at)
    assert loss.dtype == torch.float64, "a formula in float64 tells more digits"
    torch.manual_seed(5)
    expected = formula()
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-9)
    trained = [(name, p) for name, p in it.step.named_parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(value, [p for _, p in trained], allow_unused=True) for value in (loss, expected)
    )
    moved = 0
    for (name, p), a, b in zip(trained, ours, theirs, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        scale = max(float(b.abs().max()), 1e-3)
        torch.testing.assert_close(
            a, b, rtol=10 * rtol, atol=10 * rtol * scale, msg=lambda text, n=name: f"{n}: {text}"
        )
        moved += bool(b.abs().max() > 0)
    assert moved, "no parameter has a gradient"
    return loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over rows [N, K]."""
    return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()


def contrast(queries: Tensor, keys: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """Of unit rows; each key is the positive, all candidates are negatives (He et al. 2020, equation 1)."""
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ candidates.T], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def among(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Each query must find its own among the keys."""
    return cross_entropy(unit(queries) @ unit(keys).T / temperature, torch.arange(len(queries)))


def unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1)


def fill(queue: nn.Module) -> Tensor:
    """A queue that has been used, and a copy of its rows."""
    queue.rows.copy_(unit(torch.randn_like(queue.rows)))
    queue.came.fill_(len(queue.rows))
    return queue.rows.clone()


def entropy_of(targets: Tensor, logits: Tensor) -> Tensor:
    """The cross-entropy of each row [..., K]."""
    return -(targets * logits.log_softmax(-1)).sum(-1)
