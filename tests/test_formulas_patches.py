"""Methods that predict hidden patches, or the teacher's distributions: loss and gradients by formula, in float64."""

from pathlib import Path

import pytest
import torch
from method_formulas import Exact, check, entropy_of, exact, unit
from test_methods import given_weights, vit
from torch import Tensor

from fastjem import backbones, encoders
from fastjem.data.batch import Batch
from fastjem.data.pixels import Pixels
from fastjem.data.views import Views
from fastjem.functional import held
from fastjem.methods import RunFacts
from fastjem.methods.hidden import HiddenRows, hidden_rows

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = 21  # in the middle of the temperature's warm-up over 60 steps
NOW = 0.04 + 0.03 * STEP / 60


def hide(it: Exact, masked: str) -> None:
    """Some images without a mask, or all: what "block" draws for a share of the images."""
    masks = {}
    for view, mask in it.batch.masks.items():
        hidden = mask.hidden.clone()
        hidden[3] = False
        if masked == "none":
            hidden[:] = False
        elif view == 1:
            hidden[0] = True  # and one without anything that is seen
        masks[view] = mask._replace(hidden=hidden)
    it.batch = it.batch._replace(masks=masks)


def exact_with_masks(name: str, masked: str = "some", **options: object) -> Exact:
    it = exact(name, run=RunFacts(steps_per_epoch=2), **options)
    it.batch = it.batch._replace(views=it.batch.views[:4])
    hide(it, masked)
    return it


def features(it: Exact) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Student's embeddings and the large views' patches, each view by itself; then the teacher's."""
    seen = [it.step.encoder(it.batch.views[v], hidden=it.batch.masks[v].hidden) for v in range(2)]
    small = [it.step.encoder(view).pooled for view in it.batch.views[2:]]
    with torch.no_grad():
        whole = [it.step.teacher["encoder"](view) for view in it.batch.views[:2]]
    pooled = torch.cat([*(x.pooled for x in seen), *small])
    return pooled, [x.tokens for x in seen], torch.cat([x.pooled for x in whole]), [x.tokens for x in whole]


def mean_over_hidden(it: Exact, losses: list[Tensor]) -> Tensor:
    """main_ibot.py: over each image's hidden patches, then over images and views; an image without any counts as 0."""
    of_views = []
    for view, loss in enumerate(losses):
        mask = it.batch.masks[view].hidden.flatten(1).double()
        of_views.append(((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean())
    return sum(of_views) / len(of_views)


def codes(scores: Tensor, centring: str, centre: Tensor) -> Tensor:
    """The teacher's distributions [N, K]; Sinkhorn as DINOv2's `sinkhorn_knopp_teacher`."""
    if centring == "mean":
        return ((scores - centre) / NOW).softmax(1)
    q = ((scores - scores.max()) / NOW).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def ibot_losses(it: Exact, centring: str) -> Tensor:
    method, copies = it.method, it.step.teacher
    name = "" if method.shared else "patch_"
    pooled, patches, whole, whole_patches = features(it)

    def scores(x: Tensor, parts: dict, which: str) -> Tensor:
        return unit(parts[f"{which}projector"](x)) @ unit(parts[f"{which}prototypes"].weight).T

    live = dict(method.named_children())
    student = scores(pooled, live, "").chunk(len(it.batch.views))
    student_patches = [scores(x, live, name) for x in patches]
    with torch.no_grad():
        # Sinkhorn of both views together, as ssl_meta_arch.py has it
        teacher = codes(scores(whole, copies, ""), centring, method.centre.value).chunk(2)
        raw = torch.stack([scores(x, copies, name) for x in whole_patches])  # [2, B, L, K]
        hidden = torch.stack([it.batch.masks[v].hidden.flatten(1) for v in range(2)])
        targets = torch.zeros_like(raw)
        if hidden.any():
            targets[hidden] = codes(raw[hidden], centring, method.patch_centre.value)
    pairs = [entropy_of(t, s / 0.1).mean() for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
    of_patches = mean_over_hidden(it, [entropy_of(t, s / 0.1) for t, s in zip(targets, student_patches, strict=True)])
    return sum(pairs) / len(pairs) + method.patch_weight * of_patches


UNTIED = {"shared": False, "patch_prototypes": 10}


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden patches are as many rows as all patches there are, of which those that aren't hidden fill up."""

    def filled(batch: Batch, views: Views) -> HiddenRows:
        return hidden_rows(batch, views, padded=True)

    every = "fastjem.methods.hidden.most_masked"
    monkeypatch.setattr(every, lambda spec, images: images * spec.grid[0] * spec.grid[1])
    monkeypatch.setattr("fastjem.methods.ibot.hidden_rows", filled)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("masked", ["some", "none"])
@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
@pytest.mark.parametrize("heads", [{}, UNTIED], ids=["shared", "untied"])
def test_ibot(
    heads: dict, centring: str, masked: str, fused: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zhou et al. 2022, equations 1 to 3, by main_ibot.py; with the shapes that a GPU has, too."""
    if fused:
        monkeypatch.setattr(held, "LARGEST_SCORES", 0)
    if device == "gpu":
        as_on_a_gpu(monkeypatch)
    it = exact_with_masks("ibot", masked, centring=centring, patch_weight=0.7, **heads)
    for centre in (it.method.centre, it.method.patch_centre):
        centre.center.normal_(std=0.02)
    check(it, lambda: ibot_losses(it, centring), STEP, rtol=1e-6)


@pytest.mark.parametrize("masked", ["some", "none"])
def test_ibots_centres_are_of_images_and_of_hidden_patches(masked: str) -> None:
    it = exact_with_masks("ibot", masked, **UNTIED)
    method, copies = it.method, it.step.teacher
    for centre in (method.centre, method.patch_centre):
        centre.center.normal_(std=0.02)
    before = [method.centre.value.clone(), method.patch_centre.value.clone()]
    it.step(it.batch, STEP)
    assert torch.equal(method.centre.value, before[0]) and torch.equal(method.patch_centre.value, before[1])
    method.step_ends(torch.tensor(STEP))
    _, _, whole, patches = features(it)
    scores = unit(copies["projector"](whole)) @ unit(copies["prototypes"].weight).T
    hidden = torch.cat([it.batch.masks[v].hidden.flatten(1) for v in range(2)])
    rows = torch.cat(patches)[hidden]
    torch.testing.assert_close(method.centre.value, 0.9 * before[0] + 0.1 * scores.mean(0), rtol=1e-6, atol=1e-8)
    expected = before[1]
    if len(rows):
        of_rows = unit(copies["patch_projector"](rows)) @ unit(copies["patch_prototypes"].weight).T
        expected = 0.9 * before[1] + 0.1 * of_rows.mean(0)
    torch.testing.assert_close(method.patch_centre.value, expected, rtol=1e-6, atol=1e-8)


def koleo(x: Tensor) -> Tensor:
    """DINOv2's KoLeoLoss: -log of the distance to the nearest of the batch."""
    x = unit(x)
    near = (x @ x.T - 2 * torch.eye(len(x), dtype=x.dtype)).argmax(1)
    return -((x - x[near] + 1e-8).norm(dim=1) + 1e-8).log().mean()


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_dinov2(centring: str) -> None:
    """ssl_meta_arch.py: iBOT's two losses, and KoLeo of each large view's embeddings with its mask."""
    it = exact_with_masks("dinov2", centring=centring)

    def formula() -> Tensor:
        pooled, *_ = features(it)
        return ibot_losses(it, centring) + 0.1 * sum(map(koleo, pooled[:16].chunk(2)))

    check(it, formula, STEP, rtol=1e-6)


def gram_teacher(size: int, folder: Path) -> str:
    torch.manual_seed(4)
    module = backbones.create("test_vit", size, patch=8)
    path = str(folder / "encoder.safetensors")
    encoders.save(module, path, encoders.metadata("test_vit", "auto", 8, None, Pixels(size)))
    return path


@pytest.mark.parametrize("gram_size", [0, 64])
@pytest.mark.parametrize("gram_from", [0.0, 0.5])
def test_dinov3(gram_size: int, gram_from: float, tmp_path: Path) -> None:
    """Siméoni et al. 2025, equations 1 and 2: the mean square between Gram matrices of an image's unit patches; a
    teacher of larger images has its map made smaller."""
    run = RunFacts(steps_per_epoch=2, steps=100)
    it = exact(
        "dinov3",
        run=run,
        given=gram_teacher(gram_size or 32, tmp_path),
        gram_size=gram_size,
        gram_from=gram_from,
        gram_weight=3.0,
    )
    it.batch = it.batch._replace(views=it.batch.views[:4])
    hide(it, "some")

    def formula() -> Tensor:
        pooled, patches, *_ = features(it)
        loss = ibot_losses(it, "sinkhorn") + 0.1 * sum(map(koleo, pooled[:16].chunk(2)))
        if gram_from * 100 > STEP:
            return loss
        grams = []
        for images, tokens in zip(it.batch.views[:2], patches, strict=True):
            if gram_size:
                images = torch.nn.functional.interpolate(images, (64, 64), mode="bicubic", antialias=True)
            with torch.no_grad():
                anchor = it.method.given.encoder(images).tokens
            if gram_size:
                anchor = anchor.mT.view(len(anchor), -1, 8, 8)
                anchor = torch.nn.functional.interpolate(anchor, (4, 4), mode="bicubic", antialias=True)
                anchor = anchor.flatten(2).mT
            a, b = unit(tokens), unit(anchor)
            grams.append((a @ a.mT - b @ b.mT).square().mean())
        return loss + 3.0 * sum(grams) / 2

    check(it, formula, STEP, rtol=1e-6)
    assert ("loss_gram" in it.step(it.batch, STEP)[1]) and it.method.momentum[-1] == "patch_prototypes"


def test_dinov3_without_a_gram_teacher_and_with_one_that_has_no_patches() -> None:
    assert "loss_gram" not in exact("dinov3").step(exact("dinov3").batch, 0)[1]
    it = exact("dinov3", given=given_weights())
    with pytest.raises(ValueError, match="dinov3: the Gram teacher must be a vision transformer"):
        it.step(it.batch, 0)


def coding_rate(x: Tensor, eps: float) -> Tensor:
    """simdino/main_dino.py's expansion of one view [N, D]."""
    rows, width = x.shape
    gamma = (width + rows) / (width * rows)
    matrix = torch.eye(width, dtype=x.dtype) + width / (rows * eps) * x.T @ x
    return gamma * matrix.logdet() / 2


def simdino_loss(x: list[Tensor], y: list[Tensor], eps: float, expansion: str) -> Tensor:
    similar = [(s * t).sum(1).mean() for i, t in enumerate(y) for j, s in enumerate(x) if i != j]
    spread = x[:2] if expansion == "student" else [(s + t) / 2 for s, t in zip(x[:2], y, strict=True)]
    return -sum(similar) / len(similar) - sum(coding_rate(view, eps) for view in spread) / 2


@pytest.mark.parametrize("expansion", ["student", "mean"])
def test_simdino(expansion: str) -> None:
    """Wu et al. 2025, equation 8, by simdino/main_dino.py's MCRLoss."""
    it = exact("simdino", eps=0.5, expansion=expansion, norm="none")

    def formula() -> Tensor:
        x = [unit(view) for view in it.projected(it.batch.views)]
        y = [unit(view) for view in it.targets(it.batch.views[:2])]
        return simdino_loss(x, y, 0.5, expansion)

    check(it, formula)


@pytest.mark.parametrize("masked", ["some", "none"])
def test_simdinov2(masked: str) -> None:
    """simdinov2/loss: beside it the cosine of hidden patches."""
    it = exact_with_masks("simdinov2", masked, patch_weight=0.7)

    def formula() -> Tensor:
        pooled, patches, whole, targets = features(it)
        head, copy = it.method.projector, it.step.teacher["projector"]
        x = [unit(view) for view in head(pooled).chunk(len(it.batch.views))]
        with torch.no_grad():
            y = [unit(view) for view in copy(whole).chunk(2)]
        cosines = [
            torch.cosine_similarity(head(s), copy(t).detach(), dim=2) for s, t in zip(patches, targets, strict=True)
        ]
        return simdino_loss(x, y, 0.05, "mean") - 0.7 * mean_over_hidden(it, cosines)

    check(it, formula)


def test_ijepa() -> None:
    """Assran et al. 2023, by src/train.py: smooth L1 to the target encoder's normalised patches, block by block."""
    it = exact("ijepa")

    def formula() -> Tensor:
        images, mask = it.batch.views[0], it.batch.masks[0]
        with torch.no_grad():
            whole = it.step.teacher["encoder"](images).tokens
            whole = torch.nn.functional.layer_norm(whole, whole.shape[2:])
        context = it.step.encoder(images, visible=mask.visible).tokens
        losses = []
        for i in range(len(images)):
            for block in mask.targets[i]:
                found = it.method.predictor(context[i : i + 1], mask.visible[i : i + 1], block[None])[0]
                losses.append(torch.nn.functional.smooth_l1_loss(found, whole[i, block]))
        return torch.stack(losses).mean()

    mask = it.batch.masks[0]
    for targets, visible in zip(mask.targets, mask.visible, strict=True):
        assert not set(targets.flatten().tolist()) & set(visible.tolist()), "the context has nothing of a target"
    check(it, formula)


@pytest.mark.parametrize("normalise", [True, False])
def test_mae(normalise: bool) -> None:
    """He et al. 2022, by models_mae.py: the mean square over the hidden patches' pixels, channels last in a patch."""
    it = exact("mae", normalise=normalise, mask=0.5)

    def formula() -> Tensor:
        images, mask = it.batch.views[0], it.batch.masks[0]
        tokens = it.step.encoder(images, visible=mask.visible).tokens
        squares = []
        for i, hidden in enumerate(mask.hidden.flatten(1)):
            wanted = hidden.nonzero()[:, 0]
            found = it.method.decoder(tokens[i : i + 1], mask.visible[i : i + 1], wanted[None])[0]
            for pixels, place in zip(found, wanted.tolist(), strict=True):
                row, column = divmod(place, 4)
                square = images[i, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                target = square.permute(1, 2, 0).flatten()
                if normalise:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                squares.append((pixels - target).square().mean())
        assert len(squares) == 8 * len(images)
        return torch.stack(squares).mean()

    check(it, formula)


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_rows_that_fill_up_count_in_nothing(centring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU there are always as many rows, some of weight 0: loss, gradients and centres are those without."""
    it = exact_with_masks("ibot", centring=centring, **UNTIED)
    expected = it.step(it.batch, STEP)[0]
    it.method.step_ends(torch.tensor(STEP))
    centre = it.method.patch_centre.value.clone()
    gradients = torch.autograd.grad(expected, it.step.encoder.backbone.parameters())

    again = exact_with_masks("ibot", centring=centring, **UNTIED)
    plain = hidden_rows(again.batch, again.method.views)

    def filled(*_: object) -> object:
        rows = torch.cat([plain.rows, torch.arange(5)])
        weights = torch.cat([plain.weights, torch.zeros(5, dtype=plain.weights.dtype)])
        return HiddenRows(rows, weights, plain.images, filled=True)

    monkeypatch.setattr("fastjem.methods.ibot.hidden_rows", filled)
    loss, _ = again.step(again.batch, STEP)
    again.method.step_ends(torch.tensor(STEP))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, again.step.encoder.backbone.parameters()), gradients)
    torch.testing.assert_close(again.method.patch_centre.value, centre)


def test_a_transformer_with_registers_has_the_same_patches() -> None:
    """The class token and registers are no patches."""
    torch.manual_seed(0)
    encoder = encoders.wrap(vit(reg_tokens=2).eval(), mask_token=True)
    assert encoder.prefix_tokens == 3
    assert encoder(torch.randn(2, 3, 32, 32)).tokens.shape[1] == 16
