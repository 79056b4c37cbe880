"""Methods with more large views than they have by themselves, small ones, or no momentum encoder: values and gradients.

Each is held in float64 against a composition in plain torch of the loss of two views: each large view is a target of
every other view, and a small one is none. (That two views give what they gave is what tests/test_formulas_*.py hold.)
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from method_formulas import Exact, among, check, contrast, exact, fill, unit
from test_formulas_contrastive import nt_xent
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from fastjem.methods import METHODS, RunFacts, views_of
from fastjem.methods.combinations import why_not
from fastjem.methods.symmetric import mean_over_pairs, symmetric
from fastjem.nn import NTXentLoss

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE, SMALL = 3, 2
Loss = Callable[[Tensor, Tensor], Tensor]


def of_views(
    name: str, momentum_encoder: bool | None = None, large: int = LARGE, small: int = SMALL, **options: object
) -> Exact:
    """A method in float64 with so many views, large ones first, whose momentum encoder holds something of its own."""
    run = RunFacts(large_views=large, momentum_encoder=momentum_encoder)
    it = exact(name, momentum_encoder, run, **options)
    assert it.step.method.views.large == large
    torch.manual_seed(4)
    sizes = [32] * large + [16] * small
    views = [torch.randn(8, 3, size, size, dtype=torch.float64) for size in sizes]
    return replace(it, batch=it.batch._replace(views=views))


def pairs(loss: Loss, queries: list[Tensor], targets: list[Tensor]) -> Tensor:
    """By hand: the mean over large targets of every other view."""
    found = []
    for i, target in enumerate(targets):
        for j, query in enumerate(queries):
            if i != j:
                found.append(loss(query, target))
    return torch.stack(found).mean()


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    total = 25 * (a - b).square().mean()
    for x in (a, b):
        total = total + 25 * (1 - (x.var(0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
        covariance = torch.cov(x.T)
        total = total + (covariance - covariance.diag().diag()).square().sum() / x.shape[1]
    return total


def barlow_twins(a: Tensor, b: Tensor) -> Tensor:
    a, b = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in (a, b))
    c = a.T @ b / len(a)
    diagonal = c.diag()
    return 0.024 * ((diagonal - 1).square().sum() + 0.0051 * (c.square().sum() - diagonal.square().sum()))


def dcl(a: Tensor, b: Tensor) -> Tensor:
    a, b = unit(a), unit(b)
    others = ~torch.eye(len(a), dtype=torch.bool).repeat(1, 2)
    total = torch.zeros(())
    for x, y in ((a, b), (b, a)):
        logits = (x @ torch.cat([x, y]).T / 0.1).masked_fill(~others, -torch.inf)
        total = total + (logits.logsumexp(1) - (x * y).sum(1) / 0.1).mean() / 2
    return total


def simclr(a: Tensor, b: Tensor) -> Tensor:
    return nt_xent(a, b, 0.1)


def frossl(a: Tensor, b: Tensor) -> Tensor:
    columns = [normalize(x, dim=0) for x in (a, b)]
    mean = torch.stack(columns).mean(0)
    total = 0.0
    for x in columns:
        gram = x.T @ x
        total = total + (gram / gram.trace()).square().sum().log()
        total = total + 2.0 * 2 * x.shape[1] * (x - mean).square().mean()
    return total


SYMMETRIC: dict[str, Loss] = {
    "simclr": simclr,
    "vicreg": vicreg,
    "barlow_twins": barlow_twins,
    "dcl": dcl,
    "frossl": frossl,
}


@pytest.mark.parametrize("momentum_encoder", [None, True])
@pytest.mark.parametrize(("large", "small"), [(2, 2), (3, 0), (3, 2)])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_symmetric_loss(name: str, large: int, small: int, momentum_encoder: bool | None) -> None:
    it = of_views(name, momentum_encoder, large, small)

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        targets = it.targets(it.batch.views[:large]) if momentum_encoder else z[:large]
        return pairs(SYMMETRIC[name], z, targets)

    check(it, formula, rtol=1e-6)


@pytest.mark.parametrize("momentum_encoder", [None, False])
def test_byol(momentum_encoder: bool | None) -> None:
    it = of_views("byol", momentum_encoder)

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        predictions = it.method.predictor(torch.cat(z)).chunk(len(z))
        targets = [x.detach() for x in z[:LARGE]] if momentum_encoder is False else it.targets(it.batch.views[:LARGE])
        return 2 * pairs(lambda p, t: (2 - 2 * cosine_similarity(p, t)).mean(), predictions, targets)

    check(it, formula)
    assert (it.method.constant_rate, it.method.asymmetric) == (
        (("predictor",), True) if momentum_encoder is False else ((), False)
    )


@pytest.mark.parametrize("momentum_encoder", [None, True])
def test_simsiam(momentum_encoder: bool | None) -> None:
    it = of_views("simsiam", momentum_encoder)

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        predictions = it.method.predictor(torch.cat(z)).chunk(len(z))
        targets = it.targets(it.batch.views[:LARGE]) if momentum_encoder else [x.detach() for x in z[:LARGE]]
        return pairs(lambda p, t: -cosine_similarity(p, t).mean(), predictions, targets)

    check(it, formula)


@pytest.mark.parametrize("momentum_encoder", [None, False])
def test_mocov3(momentum_encoder: bool | None) -> None:
    it = of_views("mocov3", momentum_encoder, temperature=0.3)

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        queries = it.method.predictor(torch.cat(z)).chunk(len(z))
        keys = [x.detach() for x in z[:LARGE]] if momentum_encoder is False else it.targets(it.batch.views[:LARGE])
        return 4 * 0.3 * pairs(lambda q, k: among(q, k, 0.3), queries, keys)

    check(it, formula)


def test_nnclr() -> None:
    it = of_views("nnclr")
    bank = fill(it.method.queue)

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        predictions = it.method.predictor(torch.cat(z)).chunk(len(z))
        near = [bank[(unit(x.detach()) @ bank.T).argmax(1)] for x in z[:LARGE]]
        return pairs(lambda p, n: nt_xent(n, p, 0.1), predictions, near)

    check(it, formula)


def test_wmse() -> None:
    it = of_views("wmse", whitening_size=8)

    def whiten(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        factor = torch.linalg.cholesky(x.T @ x / (len(x) - 1))
        return torch.linalg.solve_triangular(factor, x.T, upper=False).T

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        return pairs(lambda a, b: (2 - 2 * cosine_similarity(whiten(a), whiten(b))).mean(), z, z[:LARGE])

    check(it, formula, rtol=1e-6)


def queries_and_target(it: Exact) -> tuple[list[Tensor], Tensor]:
    """Of methods with one target an image: the second view is it, all others are queries."""
    views = it.batch.views
    return it.projected([views[0], *views[2:]]), it.targets([views[1]])[0]


def test_moco() -> None:
    it = of_views("moco")
    negatives = fill(it.method.queue)

    def formula() -> Tensor:
        queries, key = queries_and_target(it)
        return torch.stack([contrast(unit(q), unit(key), negatives, 0.2) for q in queries]).mean()

    check(it, formula)
    it.step.step_ends(0, None)
    expected = unit(queries_and_target(it)[1])
    torch.testing.assert_close(it.method.queue.rows[:8], expected, msg="one key an image")


def test_ressl() -> None:
    it = of_views("ressl", large=2)
    earlier = fill(it.method.queue)

    def formula() -> Tensor:
        queries, key = queries_and_target(it)
        targets = (unit(key) @ earlier.T / 0.04).softmax(1)
        losses = [-(targets * (unit(q) @ earlier.T / 0.1).log_softmax(1)).sum(1).mean() for q in queries]
        return torch.stack(losses).mean()

    check(it, formula)


def test_tico() -> None:
    """Each query's covariance has moved by its own rows; the one that stays is their mean."""
    it = of_views("tico")
    start = torch.randn(8, 8, dtype=torch.float64)
    start = start @ start.T / 8
    it.method.covariance.copy_(start)

    def moved(query: Tensor) -> Tensor:
        return 0.9 * start + 0.1 * unit(query).detach().T @ unit(query).detach() / len(query)

    def of_query(query: Tensor, target: Tensor) -> Tensor:
        a, b = unit(query), unit(target)
        return (1 - (a * b).sum(1) + 8 * ((a @ moved(query)) * a).sum(1)).mean()

    def formula() -> Tensor:
        queries, target = queries_and_target(it)
        return torch.stack([of_query(query, target) for query in queries]).mean()

    check(it, formula)
    expected = torch.stack([moved(query) for query in queries_and_target(it)[0]]).mean(0)
    it.step.step_ends(0, None)
    torch.testing.assert_close(it.method.covariance, expected)


def test_smog() -> None:
    it = of_views("smog", beta=1.0)  # groups stay, so that they are the same for all queries

    def formula() -> Tensor:
        queries, target = queries_and_target(it)
        groups = it.method.groups.double()
        assigned = (unit(target) @ groups.T).argmax(1)
        logits = unit(it.method.predictor(torch.cat(queries))) @ groups.T / 0.1
        return torch.nn.functional.cross_entropy(logits, assigned.repeat(len(queries)))

    check(it, formula, rtol=1e-5)


@pytest.mark.parametrize("large", [2, 3])
def test_dino_without_a_momentum_encoder(large: int) -> None:
    """Its targets are its own, by Sinkhorn (table 7, row 9)."""
    it = of_views("dino", False, large, centring="sinkhorn", teacher_temperature=0.04)

    def formula() -> Tensor:
        weight = unit(it.method.prototypes.weight)
        z = [unit(x) for x in it.projected(it.batch.views)]
        scores = [x @ weight.T for x in z]
        targets = torch.cat(scores[:large]).detach() / 0.04
        for _ in range(3):
            targets = targets - targets.logsumexp(0, keepdim=True)
            targets = targets - targets.logsumexp(1, keepdim=True)
        return pairs(
            lambda s, t: -(t * (s / 0.1).log_softmax(1)).sum(1).mean(), scores, list(targets.exp().chunk(large))
        )

    check(it, formula, rtol=1e-5)


def test_swav() -> None:
    it = of_views("swav", queue=24)
    assert len(it.method.queues) == LARGE
    banks = [fill(queue) for queue in it.method.queues]

    def formula() -> Tensor:
        weight = unit(it.method.prototypes.weight)
        scores = [unit(x) @ weight.T for x in it.projected(it.batch.views)]
        codes = []
        for view in range(LARGE):
            q = torch.cat([scores[view].detach(), banks[view] @ weight.detach().T]) / it.method.epsilon
            for _ in range(3):
                q = q - q.logsumexp(0, keepdim=True)
                q = q - q.logsumexp(1, keepdim=True)
            codes.append(q.exp()[:8])
        return pairs(lambda s, t: -(t * (s / 0.1).log_softmax(1)).sum(1).mean(), scores, codes)

    check(it, formula, rtol=1e-5)


@pytest.mark.parametrize("local", [0.0, 0.3])
def test_mmcr_without_a_momentum_encoder(local: float) -> None:
    """Yerxa et al. 2023 as first published: of the online views alone."""
    it = of_views("mmcr", False, 3, 0, local=local)

    def formula() -> Tensor:
        z = torch.stack([unit(x) for x in it.projected(it.batch.views)], 1)  # [B, V, D]
        own = torch.linalg.svdvals(z).sum() / len(z)
        return local * own - torch.linalg.svdvals(z.mean(1)).sum()

    check(it, formula, rtol=1e-6)


def test_a_view_is_not_its_own_target_and_one_pair_is_its_loss() -> None:
    views = [torch.full((1, 1), float(i)) for i in range(5)]
    seen: list[tuple[int, int]] = []

    def loss(query: Tensor, target: Tensor) -> Tensor:
        seen.append((int(query), int(target)))
        return query.sum() + 10 * target.sum()

    mean_over_pairs(loss, views, views[:2])
    assert sorted(seen) == sorted((j, i) for i in range(2) for j in range(5) if i != j)

    class Side:
        momentum = False

        def project(self, views: list[Tensor]) -> Tensor:
            return torch.cat(list(views))

    seen.clear()
    symmetric(loss, Side(), Side(), views, 2)  # type: ignore[arg-type]
    assert set(seen) == {(0, 1), *((j, i) for j in (2, 3, 4) for i in (0, 1))}


def test_a_small_view_is_small_whatever_the_recipe() -> None:
    """SwAV cut its small views from 5 to 14 % of the image for other losses, too."""
    for name in METHODS:
        if not why_not(METHODS[name], "small_views"):
            specs = views_of(name, 224, 2).specs(224)
            large = METHODS[name].views.large
            assert [spec.size for spec in specs] == [224] * large + [96] * 2
            assert specs[-1].scale[1] <= 0.4 < specs[0].scale[1], name
    simclr = views_of("simclr", 224, 2).specs(224)
    assert simclr[-1] == replace(simclr[0], size=96, scale=(0.05, 0.14))
    ressl = views_of("ressl", 224, 2).specs(224)
    assert ressl[-1] == replace(ressl[0], size=96, scale=(0.05, 0.14)), "a query is changed as the student's view is"


@pytest.mark.parametrize("option", ["large_views", "small_views", "no_momentum_encoder", "projector"])
@pytest.mark.parametrize("name", METHODS)
def test_whatever_is_refused_has_a_reason(name: str, option: str) -> None:
    """Of its own: no method falls back to the words for methods that nobody has thought about."""
    kind = METHODS[name]
    reason = why_not(kind, option)
    if reason:
        assert option in kind.refuses and len(reason) > 30, reason


@pytest.mark.parametrize("momentum_encoder", [None, True])
@pytest.mark.parametrize(("large", "small"), [(2, 0), (3, 2)])
@pytest.mark.parametrize(("name", "sigma"), [("simclr", 0.0), ("dcl", 0.0), ("dcl", 0.5)])
def test_a_queue_in_place_of_the_batch(
    name: str, sigma: float, large: int, small: int, momentum_encoder: bool | None
) -> None:
    """Of two views alone it is lightly's NTXentLoss with a memory bank: the first looks for the second."""
    options = {"sigma": sigma} if sigma else {}
    it = of_views(name, momentum_encoder, large, small, queue=24, **options)
    earlier = fill(it.method.queue)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query), unit(key)
        if name == "simclr":
            return contrast(query, key, earlier, 0.1)
        cosines = (query * key).sum(1)
        weights = 2 - len(cosines) * (cosines.detach() / sigma).softmax(0) if sigma else 1.0
        return ((query @ earlier.T / 0.1).logsumexp(1) - weights * cosines / 0.1).mean()

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        if momentum_encoder:
            return pairs(loss, z, it.targets(it.batch.views[:large]))
        found = 2 * [loss(z[i], z[j]) for i in range(large) for j in range(i + 1, large)]
        found += [loss(query, key) for query in z[large:] for key in z[:large]]
        return torch.stack(found).mean()

    check(it, formula, rtol=1e-6)
    views = it.batch.views
    keys = unit((it.targets(views[:large]) if momentum_encoder else it.projected(views))[1].detach())
    assert torch.equal(it.method.queue.rows, earlier), "nothing moves before the step's end"
    it.step.step_ends(0, None)
    torch.testing.assert_close(it.method.queue.rows[:8], keys)
    assert torch.equal(it.method.queue.rows[8:], earlier[8:])


def test_simclr_with_a_queue_is_the_module_with_a_memory_bank() -> None:
    it = exact("simclr", queue=24)
    module = NTXentLoss(0.1, memory_bank_size=(24, 8), rows_per_step=8).double()
    rows = fill(it.method.queue)
    module.memory_bank.bank.copy_(rows)
    for _ in range(2):
        loss, _ = it.step(it.batch, 0)
        torch.testing.assert_close(loss, module(*it.projected(it.batch.views)), rtol=1e-7, atol=1e-9)
        it.step.step_ends(0, None)
        module.step_ends()
    torch.testing.assert_close(it.method.queue.rows, module.memory_bank.bank)
