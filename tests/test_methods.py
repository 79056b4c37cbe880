"""The methods: their targets, their heads, what is frozen, what collapse looks like."""

import copy
import functools
import itertools
import os
import pickle
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastjem.functional as F
from fastjem import backbones, encoders
from fastjem.commands.tiny_runs import SMALL, Tiny
from fastjem.data.batch import Batch
from fastjem.data.masking import Masks, drawn_masks, mask_specs
from fastjem.data.masks import SAMPLERS
from fastjem.data.parameters import Parameters
from fastjem.data.pixels import Pixels
from fastjem.encoders import measured_width
from fastjem.functional import held
from fastjem.health import Alarm, figures
from fastjem.methods import (
    METHODS,
    Branch,
    Defaults,
    Method,
    RunFacts,
    hidden,
    ibot,
    needs_patches,
    options_of,
    views_of,
)
from fastjem.methods.defaults import at_most
from fastjem.nn import DINOLoss, SwaVLoss
from fastjem.nn.parts import MLP, Prototypes, Queue, unit_keys
from fastjem.optim import OPTIMIZERS, Schedule, build, parameter_groups, scaled
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

NEEDS_IMAGES = {"deepcluster": 8, "pirl": 8}  # what they keep of each image of the data
# Of whose teacher the entropy is noted
HAVE_PROTOTYPES = ("swav", "dino", "ressl", "ibot", "dinov2", "dinov3", "msn", "pmsn")
# Whose loss gets worse at first: MoCo's queue fills with keys of the very same images, TiCo's covariance grows from
# nothing, SimDINO's student begins as its own teacher, DeepCluster has no clusters in its first epoch.
WORSE_AT_FIRST = ("moco", "tico", "simdino", "simdinov2", "deepcluster")


FOLDER = tempfile.TemporaryDirectory()  # until the process ends


@functools.cache
def given_weights() -> str:
    """A file with an encoder's weights."""
    pytest.importorskip("timm")
    with torch.random.fork_rng():  # made once, in whoever's turn it is: that must not see another generator
        torch.manual_seed(3)
        module = backbones.create("test_resnet", 32)
    path = os.path.join(FOLDER.name, "encoder.safetensors")
    encoders.save(module, path, encoders.metadata("test_resnet", "auto", 0, None, Pixels(32)))
    return path


def small_options(name: str) -> dict[str, object]:
    given = {"given": given_weights()} if name == "distill" else {}
    return {**SMALL[name], **given}


def feature_maps() -> nn.Module:
    """A small ResNet of timm's, which has forward_features."""
    timm = pytest.importorskip("timm")
    return timm.create_model("test_resnet", num_classes=0)


def vit(**options: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("test_vit", num_classes=0, patch_size=8, img_size=32, dynamic_img_size=True, **options)


def masks_of(method: Method, images: int = 8) -> dict[int, Masks]:
    """The same masks for one batch at every call, where the method wants some."""
    specs = mask_specs(method.views, 32, 8)
    return {spec.view: drawn_masks(spec, 5, 0, torch.arange(images)) for spec in specs}


def make(
    name: str, momentum_encoder: bool | None = None, run: RunFacts = RunFacts(), **options: object
) -> tuple[Step, Batch]:
    torch.manual_seed(0)
    kind = METHODS[name]
    module: nn.Module = Tiny()
    if needs_patches(kind):
        module = vit()
    elif name == "vicregl":
        module = feature_maps()
    encoder = encoders.wrap(module, 12 if isinstance(module, Tiny) else None, mask_token=kind.mask_token)
    run = replace(run, image_size=32, patch=encoder.patch, images=run.images or NEEDS_IMAGES.get(name, 0))
    method = kind(encoder.width, run, **{**small_options(name), **options})
    step = Step(encoder, method, momentum_encoder)
    views = [torch.randn(8, 3, 32, 32) for _ in range(method.views.large)]
    views += [torch.randn(8, 3, 16, 16) for _ in range(kind.views.small)]
    tables = torch.from_numpy(Parameters(kind.views.specs(32))(0, 0, np.arange(8), 40, 40))
    return step, Batch(views, torch.arange(8), torch.arange(8) % 3, masks_of(method), list(tables))


@pytest.mark.parametrize("momentum_encoder", [None, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_all_and_the_teacher_follows(name: str, momentum_encoder: bool | None) -> None:
    step, batch = make(name, momentum_encoder)
    optimizer = build("adamw", parameter_groups(step))
    schedule = Schedule(steps=8, learning_rate=3e-3)
    losses = []
    teacher = [p.clone() for p in step.teacher.parameters()]
    for i in range(8):
        if name == "deepcluster":
            step.method.epoch_begins(i)
        schedule.apply(optimizer, i)
        loss, notes = step(batch, i)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in step.teacher.parameters())
        without = [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, "DDP waits for ever for a parameter without a gradient"
        optimizer.step()
        step.step_ends(i, 0.9)
        losses.append(loss.item())
    # Not the last: DINO's teacher moves.
    assert min(losses[1:]) < losses[0] or name in WORSE_AT_FIRST, losses
    assert bool(teacher) == bool(momentum_encoder or METHODS[name].momentum)
    assert all(not torch.equal(a, b) for a, b in zip(teacher, step.teacher.parameters(), strict=True) if a.dim() > 1)
    found = figures(notes)
    assert all(torch.isfinite(value) for value in found.values())
    assert ("teacher_entropy" in found) == (name in HAVE_PROTOTYPES)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_pickled_and_copied_after_use(name: str) -> None:
    step, batch = make(name)
    loss, _ = step(batch, 0)
    loss.backward()
    step.step_ends(0, 0.9)
    step.eval()  # batch norms whose statistics stay
    others = [pickle.loads(pickle.dumps(step)), copy.deepcopy(step)]
    losses = []
    for one in (step, *others):
        torch.manual_seed(1)  # some draw directions, or parts of the batch
        losses.append(one(batch, 1)[0])
    for other, loss in zip(others, losses[1:], strict=True):
        assert torch.equal(loss, losses[0])
        assert all(map(torch.equal, step.state_dict().values(), other.state_dict().values()))


def test_simsiams_targets_carry_no_gradient() -> None:
    step, batch = make("simsiam")
    z = step.method.projector(step.encoder(torch.cat(batch.views)).pooled)
    p0, p1 = step.method.predictor(z).chunk(2)
    z0, z1 = z.detach().chunk(2)
    expected = (F.negative_cosine(p0, z1) + F.negative_cosine(p1, z0)) / 2
    weight = step.encoder.backbone[2].weight
    torch.testing.assert_close(
        torch.autograd.grad(step(batch, 0)[0], weight), torch.autograd.grad(expected, weight), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("fused", [False, True])
def test_swav_is_the_papers_loss(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        monkeypatch.setattr(held, "LARGEST_SCORES", 0)
    step, batch = make("swav")
    loss, _ = step(batch, 0)
    weight = nn.functional.normalize(step.method.prototypes.weight, dim=1)
    z = step.method.projector(torch.cat([step.encoder(view).pooled for view in batch.views]))
    scores = (nn.functional.normalize(z, dim=1) @ weight.T).chunk(len(batch.views))
    total = 0.0
    for i in range(2):
        codes = F.sinkhorn(scores[i])
        total += sum(-(codes * (scores[v] / 0.1).log_softmax(1)).sum(1).mean() for v in range(8) if v != i) / 7
    torch.testing.assert_close(loss, total / 2, rtol=1e-5, atol=1e-6)


def scores_of(encoder: nn.Module, projector: nn.Module, prototypes: nn.Module, views: list[Tensor]) -> tuple:
    z = nn.functional.normalize(projector(torch.cat([encoder(view).pooled for view in views])), dim=1)
    return (z @ nn.functional.normalize(prototypes.weight, dim=1).T).chunk(len(views))


def both_scores(step: Step, views: list[Tensor], large: int = 2) -> tuple[tuple, tuple]:
    """Student's and teacher's, by the formula."""
    student = scores_of(step.encoder, step.method.projector, step.method.prototypes, views)
    teacher = scores_of(step.teacher["encoder"], step.teacher["projector"], step.teacher["prototypes"], views[:large])
    return student, teacher


def test_dino_is_the_papers_loss_and_its_centre_moves_afterwards() -> None:
    step, batch = make("dino", teacher_temperature=0.04)
    step.method.centre.center.normal_(std=0.01)
    centre = step.method.centre.value.clone()
    loss, _ = step(batch, 0)
    student, teacher = both_scores(step, batch.views)
    pairs = [
        -(((t - centre) / 0.04).softmax(1) * (s / 0.1).log_softmax(1)).sum(1).mean()
        for i, t in enumerate(teacher)
        for j, s in enumerate(student)
        if i != j
    ]
    torch.testing.assert_close(loss, sum(pairs) / len(pairs), rtol=1e-5, atol=1e-6)
    assert torch.equal(step.method.centre.value, centre)
    step.method.step_ends(torch.tensor(0))
    torch.testing.assert_close(step.method.centre.value, 0.9 * centre + 0.1 * torch.cat(teacher).mean(0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_dino_by_method_is_dino_by_module(centring: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradient and centre, in the middle of the temperature's warm-up; the head-fused operator too."""
    if fused:
        monkeypatch.setattr(held, "LARGEST_SCORES", 0)
    step, batch = make("dino", run=RunFacts(steps_per_epoch=2), centring=centring)
    step.double()
    views = [view.double() for view in batch.views]
    now = 0.04 + (0.07 - 0.04) * 21 / 60
    loss, _ = step(Batch(views, batch.index), 21)
    module = DINOLoss(12, teacher_temp=now, centering="center" if centring == "mean" else "sinkhorn").double()
    student, teacher = both_scores(step, views)
    expected = module(list(teacher), list(student))
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    parameters = list(step.encoder.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)  # the schedule's numbers are float32
    if centring == "mean":
        step.method.step_ends(torch.tensor(0))
        torch.testing.assert_close(step.method.centre.value, module.center.flatten(), rtol=1e-6, atol=1e-9)


def test_hidden_patches_count_alike_however_many_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU more rows are taken than are hidden, as counting them would wait: neither loss nor centre feels it."""
    found = []
    for spare in (0, 7):
        step, batch = make("ibot")
        mask = torch.cat([batch.masks[view].hidden for view in (0, 1)])
        count = int(mask.sum()) + spare
        monkeypatch.setattr(hidden, "most_masked", lambda spec, images, count=count: count)
        rows = hidden.hidden_rows(batch, step.method.views, padded=True)
        assert len(rows.rows) == count and mask.flatten()[rows.rows].all()
        monkeypatch.setattr(ibot, "hidden_rows", lambda *_, rows=rows: rows)
        loss, _ = step(batch, 0)
        step.step_ends(0, 0.9)
        found.append((loss, step.method.patch_centre.value.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_swav_by_method_is_swav_by_module() -> None:
    step, batch = make("swav", queue=24, run=RunFacts(batch=8))
    for queue in step.method.queues:
        queue.came.fill_(24)
    expected_rows = [queue.rows.clone() for queue in step.method.queues]
    loss, _ = step(batch, 0)
    weight = nn.functional.normalize(step.method.prototypes.weight, dim=1)
    scores = scores_of(step.encoder, step.method.projector, step.method.prototypes, batch.views)
    queued = [rows @ weight.T for rows in expected_rows]
    expected = SwaVLoss()(list(scores[:2]), list(scores[2:]), queued)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


def test_frozen_prototypes_get_no_gradient_until_their_step() -> None:
    head, x = Prototypes(4, 6, frozen_steps=3), torch.randn(5, 4)
    for step, live in ((2, False), (3, True)):
        (gradient,) = torch.autograd.grad(head(x, torch.tensor(step)).square().sum(), head.weight)
        assert bool(gradient.abs().max() > 0) == live


def test_queue_goes_around_the_end() -> None:
    queue = Queue(5, 2)
    for start in (0, 3, 6):
        keys = unit_keys(torch.tensor([[i + 1.0, 1.0] for i in range(start, start + 3)]))
        queue.begin(keys)
        if not start:
            assert torch.equal(queue.rows, keys[[0, 1, 2, 0, 1]])  # of no consequence once there are others
        queue.push(keys)
    newest_first = [(i % 5, i + 1.0) for i in range(8, 3, -1)]
    for row, value in newest_first:
        torch.testing.assert_close(queue.rows[row], nn.functional.normalize(torch.tensor([value, 1.0]), dim=0))
    assert queue.pointer == 9 % 5


def test_moco_begins_against_real_keys() -> None:
    step, batch = make("moco")
    loss, _ = step(batch, 0)
    with torch.no_grad():
        query = step.method.projector(step.encoder(batch.views[0]).pooled)
        keys = unit_keys(step.teacher["projector"](step.teacher["encoder"](batch.views[1]).pooled))
    step.method.step_ends(torch.tensor(0))
    rows = keys[torch.arange(24) % len(keys)]
    torch.testing.assert_close(step.method.queue.rows, rows)
    torch.testing.assert_close(loss, F.info_nce(query, keys, rows, temperature=0.2))


def test_short_runs_have_their_own_defaults() -> None:
    paper = Defaults("sgd", 0.03, 1e-4, momentum=0.999, short=("lars", 1.2), small=("adamw", 4e-3), least_momentum=0.99)
    assert paper.of_run(10_000, parameters=1000) == paper
    short, chosen = paper.of_run(9_999), paper.of_run(100, chosen=True, parameters=1000)
    assert (short.optimizer, short.learning_rate, short.momentum) == ("lars", 1.2, 1 - 10 / 9_999)
    assert (chosen.optimizer, chosen.learning_rate, chosen.momentum) == ("sgd", 0.03, 0.99)
    small = paper.of_run(9_999, parameters=1_999_999)
    assert (small.optimizer, small.learning_rate) == ("adamw", 4e-3)
    assert "adamw at 0.004 in place of the paper's sgd at 0.03" in small.unlike(paper)
    # A transformer takes AdamW whatever its size, at a rate that it can bear; one that has none of its own the short's.
    for parameters in (1000, 86_000_000):
        transformer = paper.of_run(9_999, parameters=parameters, transformer=True)
        assert (transformer.optimizer, transformer.learning_rate) == ("adamw", 1e-3)
    plain = replace(paper, small=None).of_run(9_999, transformer=True)
    assert (plain.optimizer, plain.learning_rate) == ("lars", 1.2)
    assert paper.of_run(10_000, transformer=True) == paper
    assert Defaults("adamw", 1e-3, 0.1).of_run(20) == Defaults("adamw", 1e-3, 0.1, momentum=0.9)
    assert "at 0.001 in place" in Defaults("adamw", 1e-5, 0.1, short=("adamw", 1e-3)).of_run(20).unlike(paper)


@pytest.mark.parametrize("masking", SAMPLERS)
def test_data2vec_hides_three_quarters_from_the_student(masking: str) -> None:
    step, batch = make("data2vec", masking=masking)
    seen_by_student = []
    step.encoder.backbone.blocks[0].register_forward_pre_hook(lambda _, x: seen_by_student.append(x[0]))
    step(batch, 0)
    step(batch._replace(views=[batch.views[0] + 1]), 0)  # other pixels in every patch, the same mask
    first, second = (x[:, step.encoder.prefix_tokens :] for x in seen_by_student)
    same = (first - second).abs().amax(-1) < 1e-6  # [B, L]
    assert (same.sum(1) == 12).all() and same.shape[1] == 16
    assert len({tuple(row.tolist()) for row in same}) > 1
    assert torch.equal(same, batch.masks[0].hidden.flatten(1))


@pytest.mark.parametrize("target_norm", ["layer", "instance"])
def test_data2vecs_targets_are_normalised_over_channels_or_over_patches(target_norm: str) -> None:
    step, batch = make("data2vec", target_norm=target_norm)
    student, teacher = step.branches(batch)
    over = {"layer": 2, "instance": 1}[target_norm]
    with torch.no_grad():
        outputs = teacher.encode(batch.views, layers=step.method.layers).layers
        normalised = [(x - x.mean(over, True)) / x.var(over, correction=0, keepdim=True) ** 0.5 for x in outputs]
        mean = sum(normalised) / len(normalised)
        target = (mean - mean.mean(2, True)) / mean.var(2, correction=0, keepdim=True) ** 0.5
    predicted = step.method.projector(student.encode(batch.views, batch.masks).tokens)
    hidden = batch.masks[0].hidden.flatten(1)
    expected = nn.functional.smooth_l1_loss(predicted[hidden], target[hidden], beta=step.method.beta)
    torch.testing.assert_close(
        step.method.loss(student, teacher, batch, torch.tensor(0)), expected, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="target_norm"):
        make("data2vec", target_norm="batch")


def rope_vit(mixed: bool) -> nn.Module:
    """timm's Eva with rotary positions, one table for all blocks or one of each block's own."""
    models = pytest.importorskip("timm.models")
    torch.manual_seed(0)
    return models.Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, use_rot_pos_emb=True,
        use_abs_pos_emb=False, dynamic_img_size=True, rope_type="mixed" if mixed else "cat",
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "eva", "eva_mixed"])
def test_an_encoder_drops_and_replaces_patches(kind: str) -> None:
    torch.manual_seed(1)
    module = vit().eval() if kind == "vit" else rope_vit(kind == "eva_mixed")
    encoder = encoders.wrap(module, mask_token=True)
    images = torch.randn(2, 3, 32, 32)
    plain = encoder(images)
    torch.testing.assert_close(plain.pooled, module(images))
    assert plain.tokens.shape == (2, 16, encoder.width)

    # all patches visible, or none hidden: nothing changes; the layers' last is what the last norm sees
    everything = encoder(images, visible=torch.arange(16).expand(2, 16), layers=2)
    torch.testing.assert_close(everything.pooled, plain.pooled, rtol=1e-4, atol=1e-5)
    assert len(everything.layers) == 2
    torch.testing.assert_close(encoder(images, hidden=torch.zeros(2, 4, 4, dtype=torch.bool)).tokens, plain.tokens)

    # what isn't visible doesn't matter, and each image has its own; the order of tokens is that of `visible`
    visible = torch.stack([torch.tensor([0, 3, 5, 10]), torch.tensor([15, 1, 2, 7])])
    other = images.clone()
    keep = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, visible, True).view(2, 1, 4, 4)
    keep = keep.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images)
    other[~keep] += 1
    some = encoder(images, visible=visible)
    assert some.tokens.shape[1] == 4
    torch.testing.assert_close(some.tokens, encoder(other, visible=visible).tokens)
    torch.testing.assert_close(
        encoder(images, visible=visible.flip(1)).tokens, some.tokens.flip(1), rtol=1e-4, atol=1e-5
    )

    # positions are the patches' own: with the attention cut off from others, a token alone tells where it stands
    alone = [encoder(images, visible=torch.full((2, 1), place)).tokens for place in (0, 9)]
    assert not torch.allclose(*alone)


def test_masks_need_patches() -> None:
    encoder = encoders.wrap(Tiny(), 12)
    with pytest.raises(ValueError, match="sliding windows see the edges"):
        encoder(torch.randn(2, 3, 32, 32), visible=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="has no mask token"):
        encoders.wrap(vit())(torch.randn(2, 3, 32, 32), hidden=torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="width must be given, as Tiny has no num_features"):
        encoders.wrap(Tiny())


def test_views_of_one_size_go_through_in_one_call() -> None:
    calls = []
    encoder = encoders.wrap(Tiny(), 12)
    encoder.register_forward_hook(lambda _, x, y: calls.append(len(x[0])))
    views = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16, 16)]
    branch = Branch(encoder, {})
    features = branch.encode(views)
    assert calls == [8, 12] and features.tokens is None
    torch.testing.assert_close(features.pooled, torch.cat([encoder(view).pooled for view in views]))
    assert torch.equal(branch.notes["embedding"], features.pooled[:4])


class TwoTerms(Method):
    """A method of a user's own, whose loss has terms."""

    def __init__(self, width: int, run: RunFacts = RunFacts(), *, factor: float = 2.0):
        super().__init__(width, run)
        self.projector = nn.Linear(width, 4)
        self.factor = factor

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        z = student.project(batch.views)
        return {"size": self.factor * z.square().mean(), "shift": z.mean().square()}


def test_smogs_groups_move_with_the_batch_and_pass_its_gradient_on() -> None:
    step, batch = make("smog")
    loss, _ = step(batch, 0)
    z = step.method.projector(step.encoder(batch.views[0]).pooled)
    with torch.no_grad():
        target = nn.functional.normalize(step.teacher["projector"](step.teacher["encoder"](batch.views[1]).pooled))
    unit, groups = nn.functional.normalize(z), step.method.groups.clone()
    moved = []
    for k, group in enumerate(groups):
        own = unit[(unit @ groups.T).argmax(1) == k]
        moved.append(nn.functional.normalize(0.99 * group + 0.01 * own.mean(0), dim=0) if len(own) else group)
    logits = nn.functional.normalize(step.method.predictor(z)) @ torch.stack(moved).T / 0.1
    expected = nn.functional.cross_entropy(logits, (target @ groups.T).argmax(1))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    weight = step.encoder.backbone[2].weight
    ours, theirs = (torch.autograd.grad(one, weight, retain_graph=True)[0] for one in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    step.step_ends(0, 0.9)
    torch.testing.assert_close(step.method.groups, torch.stack(moved).detach(), rtol=1e-5, atol=1e-6)


def test_all4ones_features_are_decorrelated_as_its_code_does_it() -> None:
    """Columns of the teacher's rows, which have length one before."""
    step, batch = make("all4one")
    _, notes = step(batch, 0)
    z = step.method.projector(step.encoder(torch.cat(batch.views)).pooled).chunk(2)
    with torch.no_grad():
        t = step.teacher["projector"](step.teacher["encoder"](torch.cat(batch.views)).pooled).chunk(2)
    on, off = 0.0, 0.0
    for target, other in zip(t, reversed(z), strict=True):
        rows = nn.functional.normalize(target, dim=1)
        correlation = nn.functional.normalize(rows, dim=0).T @ nn.functional.normalize(other, dim=0)
        diagonal = torch.eye(8, dtype=torch.bool)
        on = on + (correlation[diagonal] - 1).square().mean() / 2
        off = off + correlation[~diagonal].square().mean() / 2
    torch.testing.assert_close(figures(notes)["loss_features"], 2.5 * (on.sqrt() + off.sqrt()), rtol=1e-4, atol=1e-5)


def test_terms_of_a_loss_are_summed_and_logged() -> None:
    torch.manual_seed(0)
    step = Step(encoders.wrap(Tiny(), 12), TwoTerms(12))
    loss, notes = step(Batch([torch.randn(8, 3, 32, 32)] * 2, torch.arange(8)), 0)
    found = figures(notes)
    torch.testing.assert_close(found["loss_size"] + found["loss_shift"], loss.detach())
    assert options_of(TwoTerms) == {"factor": 2.0}


def test_heads_have_the_papers_shapes() -> None:
    def shapes(module: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(layer.weight.shape) for layer in module if isinstance(layer, nn.Linear)]

    with torch.device("meta"):
        assert shapes(METHODS["simclr"](2048).projector) == [(2048, 2048), (128, 2048)]
        assert shapes(METHODS["moco"](2048).projector) == [(2048, 2048), (128, 2048)]
        assert shapes(METHODS["byol"](2048).projector) == [(4096, 2048), (256, 4096)]
        assert shapes(METHODS["byol"](2048).predictor) == [(4096, 256), (256, 4096)]
        assert shapes(METHODS["simsiam"](2048).projector) == [(2048, 2048)] * 3
        assert shapes(METHODS["simsiam"](2048).predictor) == [(512, 2048), (2048, 512)]
        assert shapes(METHODS["swav"](2048).projector) == [(2048, 2048), (128, 2048)]
        assert METHODS["swav"](2048).prototypes.weight.shape == (3000, 128)
        assert shapes(METHODS["dino"](384).projector) == [(2048, 384), (2048, 2048), (256, 2048)]
        resnet, vit = METHODS["mocov3"](2048), METHODS["mocov3"](384, **METHODS["mocov3"].presets["vit"].options)
        assert [len(shapes(m.projector)) for m in (resnet, vit)] == [2, 3]
        assert [isinstance(m.predictor[-1], nn.BatchNorm1d) for m in (resnet, vit)] == [False, True]
        assert not any("bias" in name for name, _ in resnet.predictor.named_parameters() if not name.startswith("1."))
        assert METHODS["dino"](384).prototypes.weight.shape == (65536, 256)
        for name in ("barlow_twins", "vicreg"):
            assert shapes(METHODS[name](2048).projector) == [(8192, 2048), (8192, 8192), (8192, 8192)]
    assert all(layer.bias is None for layer in MLP(4, 4, 4, last_norm=True) if isinstance(layer, nn.Linear))
    assert at_most(65536, 10_000, each=4) == 2048 and at_most(65536, 10_000, each=16) == 512
    assert at_most(65536, 1_281_167, each=16) == 65536 and at_most(65536, 20, each=16) == 8


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in METHODS for preset in METHODS[name].presets])
def test_presets_make_a_method_and_its_views(name: str, preset: str) -> None:
    kind = METHODS[name]
    given = kind.presets[preset]
    options = options_of(kind)
    assert set(given.options) <= set(options)
    assert all(options[option] != value for option, value in given.options.items())  # else it says nothing
    with torch.device("meta"):
        kind(384, RunFacts(images=50_000, batch=256, image_size=32, patch=4), **given.options)
    views = views_of(kind, 32, preset=preset)
    assert len(views.specs(32)) == views.large + views.small
    assert all(getattr(views, field) == value for field, value in given.views.items())
    assert given.source and (given.defaults is None or given.defaults.optimizer in OPTIMIZERS)


@pytest.mark.parametrize("loss", [1.0, None, {}, torch.zeros(2), {"a": torch.zeros(2)}, (torch.zeros(()),)])
def test_a_loss_is_a_number(loss: object) -> None:
    class Mine(Method):
        def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor):
            return loss

    step = Step(Tiny(), Mine(12))
    with pytest.raises(TypeError, match=r"Mine: the (loss|term 'a' of its loss) must be a 0-dim tensor, got"):
        step(Batch([torch.randn(8, 3, 32, 32)] * 2, torch.arange(8)), 0)
    with pytest.raises(ValueError, match="compares at least 2 views, the batch has 1"):
        step(Batch([torch.randn(8, 3, 32, 32)], torch.arange(8)), 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="BYOL was made for embeddings of 16, the encoder's have 64"):
        Step(vit(), METHODS["byol"](16))

    class Misspelt(METHODS["byol"]):
        momentum = ("encoder", "projektor")

    with pytest.raises(ValueError, match="no part 'projektor'"):
        Step(Tiny(), Misspelt(12))
    branch = Branch(encoders.wrap(vit()), {})
    hidden = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks = {0: Masks(hidden, torch.zeros(4, 2, dtype=torch.long)), 1: Masks(hidden)}
    with pytest.raises(ValueError, match="all have visible patches in their masks, or none"):
        branch.encode([torch.randn(4, 3, 32, 32)] * 2, masks)


def test_nan_reaches_the_alarm() -> None:
    found = figures({"embedding": torch.full((8, 4), torch.nan), "projection": torch.full((8, 4), torch.nan)})
    assert all(torch.isnan(value) for value in found.values())
    alarm, row = Alarm(), {"loss": float("nan"), **{name: value.item() for name, value in found.items()}}
    assert not alarm(1, row) and "the loss is not a number" in alarm(2, row)
    assert figures({}) == {}  # a method that calls its encoder by itself


def test_constant_embeddings_are_refused() -> None:
    encoder = Tiny()
    nn.init.zeros_(encoder[3].weight)
    with pytest.raises(ValueError, match="same embedding"):
        measured_width(encoder, torch.randn(8, 3, 32, 32))
    with pytest.raises(ValueError, match=r"must map \[B, 3, H, W\] to \[B, D\], got \(8, 3, 4, 4\)"):
        measured_width(nn.AdaptiveAvgPool2d(4), torch.randn(8, 3, 32, 32))
    assert measured_width(Tiny(), torch.randn(8, 3, 32, 32)) == 12


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_simsiam_without_stop_gradient_raises_the_alarm_within_50_steps(stop_gradient: bool) -> None:
    torch.manual_seed(0)
    method = METHODS["simsiam"](32, hidden=64, dim=64, bottleneck=16, stop_gradient=stop_gradient)
    step = Step(encoders.wrap(Tiny(32), 32), method)
    optimizer, alarm, said = build("sgd", parameter_groups(step)), Alarm(asymmetric=True), []
    schedule = Schedule(steps=1000, learning_rate=0.1)
    base = torch.randn(64, 3, 8, 8)
    for i in range(50):
        schedule.apply(optimizer, i)
        views = [nn.functional.interpolate(0.3 * base + torch.randn_like(base), 32) for _ in range(2)]
        loss, notes = step(Batch(views, torch.arange(64)), i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 5 == 4:
            said.append(alarm(i, {"loss": loss.item(), **{k: v.item() for k, v in figures(notes).items()}}))
    assert any(said) != stop_gradient, (loss.item(), figures(notes))


def test_a_std_that_falls_is_an_alarm_where_a_batch_norm_keeps_it() -> None:
    """And a rank that learning lowers is none."""
    for asymmetric, steps, std, alarmed in (
        (False, (5, 20, 30), 0.9, False),
        (True, (5, 20, 30), 0.9, True),
        (True, (5, 20, 30), 0.96, False),
        (True, (5, 60, 70), 0.9, False),
        (True, (5, 60, 70), 0.6, True),
    ):
        alarm, healthy = Alarm(asymmetric), {"loss": 1.0, "embedding_std": 0.8, "effective_rank": 10.0}
        said = [
            alarm(step, {**healthy, "std": 0.99 if step == 5 else std, "projection_rank": 200.0 / step})
            for step in steps
        ]
        assert any(said) == alarmed, (asymmetric, said)
    assert not METHODS["byol"].asymmetric and METHODS["simsiam"].asymmetric


def test_what_decays() -> None:
    step, _ = make("byol")
    for group in parameter_groups(step):
        assert all((p.dim() > 1) == group["decays"] for p in group["params"])
    listed = sum(len(group["params"]) for group in parameter_groups(step))
    assert listed == sum(p.requires_grad for p in step.parameters())


def test_rates_grow_with_the_batch_by_the_optimisers_rule() -> None:
    assert scaled("sgd", 0.03, 64) == pytest.approx(0.0075) and scaled("sgd", 0.05, 512) == pytest.approx(0.1)
    # The papers' rates, each at the paper's batch
    for name, batch, rate in (
        ("simclr", 4096, 4.8),
        ("byol", 4096, 3.2),
        ("vicreg", 2048, 1.6),
        ("dino", 1024, 2e-3),
        ("mocov3", 4096, 9.6),
        ("nnclr", 4096, 4.8),
        ("wmse", 512, 2e-3),
        ("mmcr", 2048, 4.8),
        ("empssl", 100, 0.3),
        ("ijepa", 2048, 1e-3),
        ("mae", 4096, 2.4e-3),
        ("ibot", 1024, 2e-3),
        ("dinov2", 1024, 4e-3),
        ("simdino", 512, 1e-3),
        ("simdinov2", 1024, 4e-3),
        ("msn", 1024, 1e-3),
        ("deepcluster", 4096, 4.8),
        ("pirl", 1024, 0.12),
        ("vicregl", 512, 1e-3),
        ("capi", 16384, 1e-3),
    ):
        defaults = METHODS[name].defaults
        assert scaled(defaults.optimizer, defaults.learning_rate, batch) == pytest.approx(rate, rel=0.01)


def test_no_wait_is_longer_than_a_tenth_of_the_run() -> None:
    for name in ("swav", "dino"):
        method = METHODS[name](32, RunFacts(images=64, steps_per_epoch=50, steps=100))
        assert method.prototypes.frozen_steps == 10 and len(method.prototypes.weight) == 8
        assert METHODS[name](32, RunFacts(images=64, steps_per_epoch=50, steps=5000)).prototypes.frozen_steps == 50


def test_short_runs_of_dino_and_swav_keep_their_targets_sharp() -> None:
    """At 0.07 and 0.05 the targets of an encoder that knows nothing are uniform: the loss stays at log K."""
    assert METHODS["dino"](32, RunFacts(steps_per_epoch=50, steps=100), prototypes=8).centre.warmup_steps == 1500
    assert [METHODS["swav"](32, RunFacts(steps=steps), prototypes=8).epsilon for steps in (0, 9999, 10_000)] == [
        0.05,
        0.03,
        0.05,
    ]
    assert METHODS["swav"](32, RunFacts(steps=100), prototypes=8, epsilon=0.05).epsilon == 0.05


def test_small_views_are_for_images_in_which_they_show_something() -> None:
    assert [views_of("swav", size).small for size in (32, 64, 96, 224)] == [0, 0, 6, 6]
    assert views_of("dino", 32, 4).small == 4 and views_of("dino", 224, 0).small == 0


def test_dinos_head_has_batch_norm_where_the_encoder_has() -> None:
    for batch_norm in (True, False):
        head = METHODS["dino"](32, RunFacts(batch_norm=batch_norm), prototypes=8).projector
        assert any(isinstance(layer, nn.BatchNorm1d) for layer in head) == batch_norm


def test_schedule() -> None:
    schedule = Schedule(
        steps=100, learning_rate=1.0, warmup=10, weight_decay=0.04, final_weight_decay=0.4, momentum=0.9
    )
    rates = [schedule.at(i)["learning_rate"].item() for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1 and rates[-1] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert schedule.at(0)["momentum"].item() == 0.9 and schedule.at(99)["momentum"].item() == 1
    assert schedule.at(99)["weight_decay"].item() == pytest.approx(0.4)
    assert all(value.dim() == 0 for value in schedule.at(5).values())
