"""Nine methods: their targets, their heads, what is frozen, what collapse looks like."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from fastjem.methods._parts import Defaults, Prototypes, Queue, at_most, mlp, unit_keys
from fastjem.train import Alarm, Step, check_encoder, health
from torch import Tensor, nn

import fastjem.functional as F
from fastjem.data.masks import SAMPLERS
from fastjem.methods import METHODS, views_of
from fastjem.optim import Schedule, build, parameter_groups, scaled


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = {
    "simclr": {"hidden": 16, "dim": 8},
    "moco": {"hidden": 16, "dim": 8, "queue": 24},
    "byol": {"hidden": 16, "dim": 8},
    "simsiam": {"hidden": 16, "dim": 16, "bottleneck": 8},
    "swav": {"hidden": 16, "dim": 8, "prototypes": 12, "frozen_epochs": 0},
    "dino": {"hidden": 16, "bottleneck": 8, "prototypes": 12, "frozen_epochs": 0},
    "barlow_twins": {"hidden": 16},
    "vicreg": {"hidden": 16},
    "data2vec": {"layers": 1},
}


class Encoder(nn.Sequential):
    def __init__(self, width: int = 12):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, width), nn.LayerNorm(width), nn.GELU())


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("test_vit", num_classes=0, patch_size=8, img_size=32, dynamic_img_size=True)


def make(name: str, momentum_encoder: bool | None = None, **options: object) -> tuple[Step, list[Tensor]]:
    torch.manual_seed(0)
    encoder = vit() if name == "data2vec" else Encoder()
    width = encoder.num_features if name == "data2vec" else 12
    kind = METHODS[name]
    step = Step(encoder, kind(width, **{**SMALL[name], **options}), momentum_encoder)
    views = [torch.randn(8, 3, 32, 32) for _ in range(kind.views.large)]
    return step, views + [torch.randn(8, 3, 16, 16) for _ in range(kind.views.small)]


@pytest.mark.parametrize("momentum_encoder", [None, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_all_and_the_teacher_follows(name: str, momentum_encoder: bool | None) -> None:
    step, views = make(name, momentum_encoder)
    optimizer = build("adamw", parameter_groups(step))
    schedule = Schedule(steps=8, learning_rate=3e-3)
    losses = []
    teacher = [p.clone() for p in step.teacher.parameters()]
    for i in range(8):
        schedule.apply(optimizer, i)
        torch.manual_seed(5)  # the same mask: the loss of one batch must fall
        loss, seen = step(views, i)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in step.teacher.parameters())
        without = [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, "DDP waits for ever for a parameter without a gradient"
        optimizer.step()
        step.update_teacher(0.9)
        losses.append(loss.item())
    # Not the last: DINO's teacher moves. MoCo's queue fills with keys of the very same images: it must get worse.
    assert min(losses[1:]) < losses[0] or name == "moco", losses
    assert bool(teacher) == bool(momentum_encoder or METHODS[name].ema)
    assert all(not torch.equal(a, b) for a, b in zip(teacher, step.teacher.parameters(), strict=True) if a.dim() > 1)
    figures = health(seen)
    assert all(torch.isfinite(value) for value in figures.values())
    assert ("teacher_entropy" in figures) == (name in ("swav", "dino"))


def test_simsiams_targets_carry_no_gradient() -> None:
    step, views = make("simsiam")
    z = step.method.projector(step.encoder(torch.cat(views)))
    p0, p1 = step.method.predictor(z).chunk(2)
    z0, z1 = z.detach().chunk(2)
    expected = (F.negative_cosine(p0, z1) + F.negative_cosine(p1, z0)) / 2
    weight = step.encoder[2].weight
    torch.testing.assert_close(
        torch.autograd.grad(step(views, 0)[0], weight), torch.autograd.grad(expected, weight), rtol=1e-4, atol=1e-7
    )


def test_swav_is_the_papers_loss() -> None:
    step, views = make("swav")
    loss, _ = step(views, 0)
    weight = nn.functional.normalize(step.method.prototypes.weight, dim=1)
    z = step.method.projector(torch.cat([step.encoder(view) for view in views]))
    scores = (nn.functional.normalize(z, dim=1) @ weight.T).chunk(len(views))
    total = 0.0
    for i in range(2):
        codes = F.sinkhorn(scores[i])
        total += sum(-(codes * (scores[v] / 0.1).log_softmax(1)).sum(1).mean() for v in range(8) if v != i) / 7
    torch.testing.assert_close(loss, total / 2, rtol=1e-5, atol=1e-6)


def test_dino_is_the_papers_loss_and_its_centre_moves_afterwards() -> None:
    step, views = make("dino", teacher_temperature=0.04)
    step.method.centre.normal_(std=0.01)
    centre = step.method.centre.clone()
    loss, _ = step(views, 0)

    def scores(encoder: nn.Module, projector: nn.Module, prototypes: nn.Module, some: list[Tensor]) -> tuple:
        z = nn.functional.normalize(projector(torch.cat([encoder(view) for view in some])), dim=1)
        return (z @ nn.functional.normalize(prototypes.weight, dim=1).T).chunk(len(some))

    student = scores(step.encoder, step.method.projector, step.method.prototypes, views)
    teacher = scores(step.teacher["encoder"], step.teacher["projector"], step.teacher["prototypes"], views[:2])
    pairs = [
        -(((t - centre) / 0.04).softmax(1) * (s / 0.1).log_softmax(1)).sum(1).mean()
        for i, t in enumerate(teacher)
        for j, s in enumerate(student)
        if i != j
    ]
    torch.testing.assert_close(loss, sum(pairs) / len(pairs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.method.centre, 0.9 * centre + 0.1 * torch.cat(teacher).mean(0))


def test_frozen_prototypes_get_no_gradient_until_their_step() -> None:
    prototypes, x = Prototypes(4, 6, frozen_steps=3), torch.randn(5, 4)
    for step, live in ((2, False), (3, True)):
        (gradient,) = torch.autograd.grad(prototypes(x, torch.tensor(step)).square().sum(), prototypes.weight)
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
    step, views = make("moco")
    loss, _ = step(views, 0)
    with torch.no_grad():
        query = step.method.projector(step.encoder(views[0]))
        keys = unit_keys(step.teacher["projector"](step.teacher["encoder"](views[1])))
    rows = keys[torch.arange(24) % len(keys)]
    torch.testing.assert_close(step.method.queue.rows, rows)
    torch.testing.assert_close(loss, F.info_nce(query, keys, rows, temperature=0.2))


def test_short_runs_have_their_own_defaults() -> None:
    paper = Defaults("sgd", 0.03, 1e-4, momentum=0.999, short=("lars", 1.2), least_momentum=0.99)
    assert paper.of_run(10_000) == paper
    short, chosen = paper.of_run(9_999), paper.of_run(100, own=True)
    assert (short.optimizer, short.learning_rate, short.momentum) == ("lars", 1.2, 1 - 10 / 9_999)
    assert (chosen.optimizer, chosen.learning_rate, chosen.momentum) == ("sgd", 0.03, 0.99)
    assert Defaults("adamw", 1e-3, 0.1).of_run(20) == Defaults("adamw", 1e-3, 0.1, momentum=0.9)


@pytest.mark.parametrize("masking", SAMPLERS)
def test_data2vec_hides_three_quarters_from_the_student(masking: str) -> None:
    step, views = make("data2vec", masking=masking)
    seen_by_student = []
    step.encoder.blocks[0].register_forward_pre_hook(lambda _, x: seen_by_student.append(x[0]))
    torch.manual_seed(1)
    step(views, 0)
    torch.manual_seed(1)
    step([views[0] + 1], 0)  # other pixels in every patch, the same mask
    first, second = (x[:, step.encoder.num_prefix_tokens :] for x in seen_by_student)
    same = (first - second).abs().amax(-1) < 1e-6  # [B, L]
    assert (same.sum(1) == 12).all() and same.shape[1] == 16
    assert len({tuple(row.tolist()) for row in same}) > 1


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
        assert METHODS["dino"](384).prototypes.weight.shape == (65536, 256)
        for name in ("barlow_twins", "vicreg"):
            assert shapes(METHODS[name](2048).projector) == [(8192, 2048), (8192, 8192), (8192, 8192)]
    assert all(layer.bias is None for layer in mlp(4, 4, 4, last_norm=True) if isinstance(layer, nn.Linear))
    assert at_most(65536, 10_000, each=4) == 2048 and at_most(65536, 10_000, each=16) == 512
    assert at_most(65536, 1_281_167, each=16) == 65536 and at_most(65536, 20, each=16) == 8


def test_constant_embeddings_are_refused() -> None:
    encoder = Encoder()
    nn.init.zeros_(encoder[3].weight)
    with pytest.raises(ValueError, match="same embedding"):
        check_encoder(encoder, torch.randn(8, 3, 32, 32))
    with pytest.raises(ValueError, match=r"must map \[B, 3, H, W\] to \[B, D\], got \(8, 3, 4, 4\)"):
        check_encoder(nn.AdaptiveAvgPool2d(4), torch.randn(8, 3, 32, 32))
    assert check_encoder(Encoder(), torch.randn(8, 3, 32, 32)) == 12


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_simsiam_without_stop_gradient_raises_the_alarm_within_50_steps(stop_gradient: bool) -> None:
    torch.manual_seed(0)
    step = Step(Encoder(32), METHODS["simsiam"](32, hidden=64, dim=64, bottleneck=16, stop_gradient=stop_gradient))
    optimizer, alarm, said = build("sgd", parameter_groups(step)), Alarm(asymmetric=True), []
    schedule = Schedule(steps=1000, learning_rate=0.1)
    base = torch.randn(64, 3, 8, 8)
    for i in range(50):
        schedule.apply(optimizer, i)
        views = [nn.functional.interpolate(0.3 * base + torch.randn_like(base), 32) for _ in range(2)]
        loss, seen = step(views, i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 5 == 4:
            said.append(alarm(i, {"loss": loss.item(), **{k: v.item() for k, v in health(seen).items()}}))
    assert any(said) != stop_gradient, (loss.item(), health(seen))


def test_a_std_that_falls_is_an_alarm_where_a_batch_norm_keeps_it() -> None:
    """And a rank that learning lowers is none."""
    for asymmetric, steps, std, alarmed in (
        (False, (5, 20, 30), 0.9, False),
        (True, (5, 20, 30), 0.9, True),
        (True, (5, 20, 30), 0.96, False),
        (True, (5, 60, 70), 0.9, False),
        (True, (5, 60, 70), 0.6, True),
    ):
        alarm, figures = Alarm(asymmetric), {"loss": 1.0, "embedding_std": 0.8, "effective_rank": 10.0}
        said = [
            alarm(step, {**figures, "std": 0.99 if step == 5 else std, "projection_rank": 200.0 / step})
            for step in steps
        ]
        assert any(said) == alarmed, (asymmetric, said)
    assert not METHODS["byol"].__dict__.get("asymmetric", False) and METHODS["simsiam"].asymmetric


def test_what_decays() -> None:
    step, _ = make("byol")
    for group in parameter_groups(step):
        assert all((p.dim() > 1) == group["decays"] for p in group["params"])
    listed = sum(len(group["params"]) for group in parameter_groups(step))
    assert listed == sum(p.requires_grad for p in step.parameters())


def test_rates_grow_with_the_batch_by_the_optimisers_rule() -> None:
    assert scaled("sgd", 0.03, 64) == pytest.approx(0.0075) and scaled("sgd", 0.05, 512) == pytest.approx(0.1)
    # SimCLR's 4.8, BYOL's 3.2, DINO's 2e-3, each at the paper's batch
    for name, batch, rate in (("simclr", 4096, 4.8), ("byol", 4096, 3.2), ("vicreg", 2048, 1.6), ("dino", 1024, 2e-3)):
        defaults = METHODS[name].defaults
        assert scaled(defaults.optimizer, defaults.learning_rate, batch) == pytest.approx(rate, rel=0.01)


def test_no_wait_is_longer_than_a_tenth_of_the_run() -> None:
    for name in ("swav", "dino"):
        method = METHODS[name](32, images=64, steps_per_epoch=50, steps=100)
        assert method.prototypes.frozen_steps == 10 and len(method.prototypes.weight) == 8
        assert METHODS[name](32, images=64, steps_per_epoch=50, steps=5000).prototypes.frozen_steps == 50


def test_short_runs_of_dino_and_swav_keep_their_targets_sharp() -> None:
    """At 0.07 and 0.05 the targets of an encoder that knows nothing are uniform: the loss stays at log K."""
    assert METHODS["dino"](32, prototypes=8, steps_per_epoch=50, steps=100).warmup_steps == 1500
    assert [METHODS["swav"](32, prototypes=8, steps=steps).epsilon for steps in (0, 9999, 10_000)] == [0.05, 0.03, 0.05]
    assert METHODS["swav"](32, prototypes=8, steps=100, epsilon=0.05).epsilon == 0.05


def test_small_views_are_for_images_in_which_they_show_something() -> None:
    assert [views_of("swav", size).small for size in (32, 64, 96, 224)] == [0, 0, 6, 6]
    assert views_of("dino", 32, 4).small == 4 and views_of("dino", 224, 0).small == 0


def test_dinos_head_has_batch_norm_where_the_encoder_has() -> None:
    for batch_norm in (True, False):
        head = METHODS["dino"](32, prototypes=8, batch_norm=batch_norm).projector
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
