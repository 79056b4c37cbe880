"""Contrastive methods and those of pairs of images: loss and gradients by formula, in float64."""

import math

import pytest
import torch
from method_formulas import Exact, among, check, contrast, cross_entropy, exact, fill, unit
from torch import Tensor

from fastjem.methods import RunFacts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layers", [2, 3])
def test_mocov3(layers: int) -> None:
    """Chen, Xie and He 2021, algorithm 1: the positive is among the batch's keys; times 2 temperature."""
    it = exact("mocov3", temperature=0.3, layers=layers)

    def formula() -> Tensor:
        q0, q1 = it.method.predictor(torch.cat(it.projected(it.batch.views))).chunk(2)
        k0, k1 = it.targets(it.batch.views)
        return 2 * 0.3 * (among(q0, k1, 0.3) + among(q1, k0, 0.3))

    check(it, formula)


@pytest.mark.parametrize("momentum_encoder", [None, True])
def test_nnclr(momentum_encoder: bool | None) -> None:
    """Dwibedi et al. 2021, equation 2, both ways, with the candidates that lightly's module has: neighbours and
    predictions alike are told apart from all others, as in NT-Xent."""
    it = exact("nnclr", momentum_encoder)
    bank = fill(it.method.queue)

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        p0, p1 = it.method.predictor(torch.cat(z)).chunk(2)
        sought = it.targets(it.batch.views) if momentum_encoder else z
        near0, near1 = (bank[(unit(x.detach()) @ bank.T).argmax(1)] for x in sought)
        return (nt_xent(near0, p1, 0.1) + nt_xent(near1, p0, 0.1)) / 2

    check(it, formula)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Chen et al. 2020, equation 1."""
    z = unit(torch.cat([a, b]))
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_dcl(sigma: float) -> None:
    """Yeh et al. 2022, equations 4 and 6: candidates are the other images of both views, without the positive."""
    it = exact("dcl", sigma=sigma)

    def formula() -> Tensor:
        z0, z1 = map(unit, it.projected(it.batch.views))
        count = len(z0)
        others = ~torch.eye(count, dtype=torch.bool).repeat(1, 2)
        cosines = (z0 * z1).sum(1)
        weight = 1.0 if not sigma else 2 - count * (cosines.detach() / sigma).softmax(0)
        total = 0.0
        for a, b in ((z0, z1), (z1, z0)):
            logits = torch.cat([a @ b.T, a @ a.T], 1) / 0.1
            total += (logits.masked_fill(~others, -torch.inf).logsumexp(1) - weight * cosines / 0.1).mean()
        return total / 2

    check(it, formula)


def test_supcon() -> None:
    """Khosla et al. 2020, equation 2 (L_out)."""
    it = exact("supcon")

    def formula() -> Tensor:
        z = unit(torch.cat(it.projected(it.batch.views)))
        labels = it.batch.labels.repeat(2)
        logits = (z @ z.T / 0.07).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        positive = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)
        log_p = logits - logits.logsumexp(1, keepdim=True)
        return -(log_p.where(positive, 0).sum(1) / positive.sum(1)).mean()

    check(it, formula)


def test_ressl() -> None:
    """Zheng et al. 2021, equations 4 to 6: relations to the queue; the strong view is the student's."""
    it = exact("ressl")
    queue = fill(it.method.queue)

    def formula() -> Tensor:
        (query,) = it.projected(it.batch.views[:1])
        (key,) = it.targets(it.batch.views[1:])
        wanted = (unit(key) @ queue.T / 0.04).softmax(1)
        return -(wanted * (unit(query) @ queue.T / 0.1).log_softmax(1)).sum(1).mean()

    check(it, formula)


def test_all4one() -> None:
    """Estepa et al. 2023, equations 1 to 7, with solo-learn's weights: 0.5, 0.5 and 5."""
    it = exact("all4one", dropout=0.0, neighbours=3)
    queue = fill(it.method.queue)
    method = it.method

    def formula() -> Tensor:
        z = it.projected(it.batch.views)
        t = it.targets(it.batch.views)
        near = [queue[(unit(x) @ queue.T).topk(3, dim=1).indices] for x in t]  # [B, 3, D]
        p = method.predictor(torch.cat(z)).chunk(2)
        neighbour = (among(near[0][:, 0], p[1], 0.2) + among(near[1][:, 0], p[0], 0.2)) / 2
        along = torch.arange(8, dtype=torch.float64)  # PositionalEncodingPermute1D of 3 channels, which it makes 4
        codes = torch.stack([along.sin(), along.cos(), (along / 100).sin()])
        q = method.centroid_predictor(torch.cat(z)).chunk(2)
        shifted = [torch.cat([q[i][:, None], near[i][:, :2]], 1) for i in range(2)]
        rich = [method.transformer(x + codes)[:, 0] for x in near]
        strange = [method.transformer(x + codes)[:, 0] for x in shifted]
        centroid = (among(rich[0], strange[1], 0.1) + among(rich[1], strange[0], 0.1)) / 2
        on, off = [], []
        for target, x in ((unit(t[0]), z[1]), (unit(t[1]), z[0])):
            c = (target / target.norm(dim=0)).T @ (x / x.norm(dim=0))
            on.append((c.diagonal() - 1).square().mean())
            off.append(c[~torch.eye(len(c), dtype=torch.bool)].square().mean())
        features = 10 * (0.5 * (sum(on) / 2).sqrt() + 0.5 * (sum(off) / 2).sqrt())
        return 0.5 * neighbour + 0.5 * centroid + 0.5 * features

    check(it, formula, rtol=1e-6)  # the codes are float32


def test_pirl() -> None:
    """Misra and van der Maaten 2020, equations 4 and 5, with a softmax; an image's own row is no negative."""
    it = exact("pirl", run=RunFacts(images=20))
    memory = it.method.memory.rows.clone()
    index = it.batch.index

    def formula() -> Tensor:
        z = it.method.projector(it.encoder(it.batch.views[0]))
        pieces = it.method._pieces(it.batch.views[1], index, torch.tensor(0))
        pieces = it.method.pieces(it.encoder(pieces)).view(len(z), 9, -1)
        shuffled = it.method.jigsaw(pieces.flatten(1))
        others = it.method._others(torch.tensor(0))
        assert others.min() >= 0 and others.max() < 20 and len(set(others.tolist())) > 5
        return 0.5 * (_found(shuffled, others) + _found(z, others))

    def _found(query: Tensor, others: Tensor) -> Tensor:
        rows = []
        for i, q in zip(index, unit(query), strict=True):
            negatives = memory[others[others != i]]
            logits = torch.cat([memory[i][None], negatives]) @ q / 0.07
            rows.append(logits.logsumexp(0) - logits[0])
        return torch.stack(rows).mean()

    check(it, formula)
    before = memory[index]
    now = unit(it.method.projector(it.encoder(it.batch.views[0])))
    it.step.step_ends(0, 0.9)
    torch.testing.assert_close(it.method.memory.rows[index], unit((before + now) / 2))
    assert torch.equal(it.method.memory.rows[8:20], memory[8:20])


def test_pirls_pieces_are_the_images_own() -> None:
    """Nine squares of a third of the side, each once, in another order in other images and steps."""
    method = exact("pirl", run=RunFacts(images=20)).method
    images = torch.arange(4 * 3 * 32 * 32.0).view(4, 3, 32, 32)
    index = torch.tensor([3, 0, 7, 5])
    pieces = method._pieces(images, index, torch.tensor(2))
    assert torch.equal(pieces[9:18], method._pieces(images[1:2], index[1:2], torch.tensor(2))), "by image, not by place"
    assert not torch.equal(pieces, method._pieces(images, index, torch.tensor(3)))
    assert torch.equal(method._others(torch.tensor(2)), method._others(torch.tensor(2)))
    assert not torch.equal(method._others(torch.tensor(2)), method._others(torch.tensor(3)))
    pieces = pieces.view(4, 9, 3, 10, 10)
    orders = set()
    for image, found in zip(images, pieces, strict=True):
        whole = [image[:, 10 * i : 10 * i + 10, 10 * j : 10 * j + 10] for i in range(3) for j in range(3)]
        order = tuple(next(k for k, square in enumerate(whole) if torch.equal(square, piece)) for piece in found)
        assert sorted(order) == list(range(9))
        orders.add(order)
    assert len(orders) > 1


def pairs(it: Exact) -> tuple[Tensor, Tensor]:
    heads = it.method.projectors
    return unit(heads[0](it.encoder(it.batch.views[0]))), unit(heads[1](it.encoder(it.batch.views[1])))


@pytest.mark.parametrize("temperature", [0.07, 0.001])
def test_clip(temperature: float) -> None:
    """Radford et al. 2021, figure 3."""
    it = exact("clip", temperature=temperature)

    def formula() -> Tensor:
        x, y = pairs(it)
        logits = it.method.log_scale.exp() * x @ y.T
        labels = torch.arange(len(x))
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    check(it, formula)
    assert it.step(it.batch, 0)[1]["logit_scale"] == pytest.approx(1 / temperature, rel=1e-5)


@pytest.mark.parametrize("scale, held", [(1000.0, 100.0), (0.5, 1.0), (30.0, 30.0)])
def test_clips_scale_is_held_behind_a_step_and_comes_back(scale: float, held: float) -> None:
    """As in open_clip's training: within 1 and 100, and with a gradient at either end."""
    it = exact("clip")
    with torch.no_grad():
        it.method.log_scale.fill_(math.log(scale))
    it.step.step_ends(0, 0.9)
    torch.testing.assert_close(it.method.log_scale.exp(), torch.tensor(held, dtype=torch.float64))
    loss, _ = it.step(it.batch, 1)
    loss.backward()
    assert it.method.log_scale.grad.abs() > 0


def test_siglip() -> None:
    """Zhai et al. 2023, algorithm 1: the sum over all pairs, by the number of images."""
    it = exact("siglip", bias=-2.0)

    def formula() -> Tensor:
        x, y = pairs(it)
        logits = it.method.log_scale.exp() * x @ y.T + it.method.bias
        signs = 2 * torch.eye(len(x), dtype=torch.float64) - 1
        return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(x)

    check(it, formula)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("layers", [1, 2])
def test_distill(loss: str, layers: int) -> None:
    it = exact("distill", loss=loss, layers=layers, hidden=16)
    given = it.method.given

    def formula() -> Tensor:
        images = it.batch.views[0]
        with torch.no_grad():
            target = given.encoder.backbone(images)
        prediction = it.method.predictor(it.encoder(images))
        if loss == "mse":
            return (unit(prediction) - unit(target)).square().sum(1).mean()
        return (1 - torch.cosine_similarity(prediction, target)).mean()

    assert (given.mean, given.std) == (it.method.mean, it.method.std)  # the given encoder sees the images as they are
    check(it, formula)
    assert not any(p.requires_grad for p in given.encoder.parameters()) and not given.encoder.backbone.training
    assert not [key for key in it.step.state_dict() if "given" in key]


def test_distills_teacher_has_a_normalisation_and_a_size_of_its_own() -> None:
    """What it is shown are the same pixels, in its own units and at its own size."""
    it = exact("distill", size=48)
    given = it.method.given
    it.method.mean, it.method.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)

    def formula() -> Tensor:
        images = it.batch.views[0]
        mean, std, own_mean, own_std = (
            torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
            for x in (it.method.mean, it.method.std, given.mean, given.std)
        )
        pixels = images * std + mean
        pixels = torch.nn.functional.interpolate(pixels, (48, 48), mode="bicubic", antialias=True)
        with torch.no_grad():
            target = given.encoder.backbone((pixels - own_mean) / own_std)
        return (1 - torch.cosine_similarity(it.method.predictor(it.encoder(images)), target)).mean()

    check(it, formula)


def test_contrast_is_moco_s() -> None:
    """The helper itself: a key's own cosine stands first."""
    q, k, other = (unit(torch.randn(n, 3, dtype=torch.float64)) for n in (2, 2, 4))
    by_hand = [torch.cat([(q[i] @ k[i])[None], other @ q[i]]).softmax(0)[0].log() for i in range(2)]
    torch.testing.assert_close(contrast(q, k, other, 1.0), -sum(by_hand) / 2)
