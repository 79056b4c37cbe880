"""Exact large batches: by micro-batches, the loss, the gradients and whatever moves are those of the whole batch."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_methods import Tiny, make, vit
from test_methods_distributed import made
from torch import Tensor, nn

from fastjem import encoders
from fastjem.data.batch import Batch, part_of
from fastjem.data.masking import Masks
from fastjem.encoders import Encoder, Features
from fastjem.given import Given
from fastjem.health import figures
from fastjem.large_batches import forward_backward, joined_notes
from fastjem.methods import METHODS, Branch, Codes, Method, RunFacts, SimCLR, needs_patches
from fastjem.micro_batches import Passes, parts_of
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = RunFacts(batch=8, steps_per_epoch=2)
SEED = 3


class InOneGraph(Passes):
    """The same micro-batches, each with its graph at once: what dropout and batch norm are held to."""

    def encode(
        self, encoder: Encoder, views: Sequence[Tensor], masks: dict[str, list[Tensor]], options: dict[str, Any]
    ) -> Features:
        found = []
        for part in parts_of(len(views[0]), self.size):
            given = {name: torch.cat([x[part] for x in of_views]) for name, of_views in masks.items()}
            found.append(encoder(torch.cat([view[part] for view in views]), **given, **options))
        parts = [[one.pooled, *([] if one.tokens is None else [one.tokens]), *one.layers] for one in found]
        of_views = [[x.unflatten(0, (len(views), -1)) for x in part] for part in parts]
        pooled, *others = [torch.cat(same, 1).flatten(0, 1) for same in zip(*of_views, strict=True)]
        tokens = None if found[0].tokens is None else others.pop(0)
        return Features(pooled, tokens, tuple(others), found[0].grid)


def gradients(step: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in step.named_parameters()}


def alike(got: nn.Module, wanted: nn.Module, *, rtol: float = 1e-10) -> None:
    """Gradients to `rtol` of a parameter's largest, and what both have moved."""
    theirs = gradients(wanted)
    assert any(x is not None and x.abs().max() > 0 for x in theirs.values())
    for name, gradient in gradients(got).items():
        other = theirs[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            worst = (gradient - other).abs().max()
            assert worst <= rtol * other.abs().max(), f"{name}: {worst:.1e} of {other.abs().max():.1e}"
    for (name, x), (_, y) in zip(got.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def taken(step: Step, batch: Batch, passes: Passes | None) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Loss, notes, and a number that the generator gives behind it."""
    torch.manual_seed(SEED)
    if passes is None:
        loss, notes = step(batch, 3)
        loss.backward()
    elif isinstance(passes, InOneGraph):
        step.passes = passes
        loss, notes = step(batch, 3)
        step.passes = None
        loss.backward()
    else:
        loss, notes = forward_backward(step, batch, 3, passes)
    after = torch.rand(())
    step.step_ends(3, None)
    return loss.detach(), notes, after


def compared(step: Step, batch: Batch, *, against: Passes | None = None, rtol: float = 1e-10) -> Step:
    """The step by micro-batches of 3, which must be what it is with `against` (None: the batch at once)."""
    other = copy.deepcopy(step)
    rows: list[int] = []
    copies = dict(step.teacher.items())
    for module in (step.encoder, *(copies[name] for name in copies if name == "encoder")):
        module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    loss, notes, after = taken(step, batch, Passes(3))
    views = 9 if isinstance(step.method, METHODS["pirl"]) else len(batch.views)  # its pieces
    assert rows and max(rows) <= 3 * views
    wanted, others, same = taken(other, batch, against)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    assert after == same, "the generator isn't where the batch at once leaves it"
    alike(step, other, rtol=rtol)
    told = figures(notes)
    assert told.keys() == figures(others).keys()
    for name, figure in figures(others).items():
        torch.testing.assert_close(told[name].double(), figure.double(), rtol=1e-4, atol=1e-5, msg=name)
    return step


def whole_sized(batch: Batch) -> Batch:
    """Small views as large as the others: timm resamples positions in float32, whose rounding isn't ours."""
    views = [view if view.shape == batch.views[0].shape else torch.randn_like(batch.views[0]) for view in batch.views]
    return batch._replace(views=views)


@pytest.mark.parametrize(
    ("name", "momentum_encoder"),
    [*((name, None) for name in METHODS), *((name, True) for name, kind in METHODS.items() if not kind.momentum)],
)
def test_a_step_is_that_of_the_whole_batch(name: str, momentum_encoder: bool | None) -> None:
    """Of 8 images by 3, so by 3, 3 and 2."""
    step, batch = made(name, RUN)
    if momentum_encoder:
        step = Step(step.encoder, step.method, True).double()
    if needs_patches(METHODS[name]):
        batch = whole_sized(batch)
    compared(step, batch)


@pytest.mark.parametrize("name", ["simclr", "simsiam", "vicreg", "distill"])
def test_batch_norms_of_heads_see_the_whole_batch(name: str) -> None:
    options: dict[str, object] = {"layers": 2, "hidden": 8} if name == "distill" else {}
    step, batch = make(name, run=RUN, **options)
    step = step.double().train()
    batch = batch._replace(views=[view.double() for view in batch.views])
    assert encoders.has_batch_norm(step.method) and not encoders.has_batch_norm(step.encoder)
    compared(step, batch)


def test_masks_of_the_run_hide_patches_of_any_method() -> None:
    step, batch = masked_simclr()
    compared(step, batch)


def masked_simclr() -> tuple[Step, Batch]:
    torch.manual_seed(0)
    encoder = encoders.wrap(vit())
    method = SimCLR(encoder.width, RUN, hidden=16, dim=8, norm="layer")
    views = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    masks = {
        view: Masks(torch.zeros(8, 4, 4, dtype=torch.bool), torch.rand(8, 16).argsort(1)[:, :7]) for view in range(2)
    }
    return Step(encoder, method).double(), Batch(views, torch.arange(8), masks=masks)


class Drops(Tiny):
    """An encoder with dropout, and with a buffer that moves with each pass and changes what comes out."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.append(nn.Dropout(0.3))
        self.append(nn.Linear(12, 12))
        self.append(nn.Dropout(0.3))
        self.register_buffer("seen", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        self.seen.mul_(1.25)
        return super().forward(images) * self.seen.clone()


def test_dropout_and_buffers_are_those_of_the_same_micro_batches_in_one_graph() -> None:
    torch.manual_seed(0)
    step = Step(encoders.wrap(Drops(), 12), SimCLR(12, RUN, hidden=16, dim=8, norm="layer"), True).double()
    batch = Batch([torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)], torch.arange(8))
    step = compared(step, batch, against=InOneGraph(3))
    seen = dict(step.encoder.named_buffers())["backbone.seen"]
    assert seen.item() == pytest.approx(1.25**3)  # the first passes alone have moved it
    # Another seed gives other gradients: it is the seed that makes them alike.
    other = copy.deepcopy(step)
    other.zero_grad()
    torch.manual_seed(SEED + 1)
    forward_backward(other, batch, 3, Passes(3))
    with pytest.raises(AssertionError):
        alike(other, step)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2), nn.BatchNorm2d(6), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 12)
    )


@pytest.mark.parametrize("name", ["dino", "all4one", "ibot"])
def test_drop_path_and_batch_norm_are_those_of_the_same_micro_batches(name: str) -> None:
    """Of a convolutional encoder with multi-crop, where dropout in a head follows the encoder's, and of a transformer
    with a momentum copy."""
    own, batch = made(name, RUN)
    kind = METHODS[name]
    if needs_patches(kind):
        module: nn.Module = vit(drop_path_rate=0.4, proj_drop_rate=0.2)
        batch = whole_sized(batch)
    else:
        module = convolutional()
    encoder = encoders.wrap(module, own.method.width, mask_token=kind.mask_token)
    step = Step(encoder, own.method, own.teacher is not None and bool(own.teacher)).double().train()
    compared(step, batch, against=InOneGraph(3))
    if "1.num_batches_tracked" in step.encoder.backbone.state_dict():
        groups = len({view.shape for view in batch.views})
        assert step.encoder.backbone.state_dict()["1.num_batches_tracked"] == 3 * groups  # once a step and micro-batch


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.mean_over_images])
def test_a_mean_over_images_is_the_weighted_mean_of_its_parts(name: str) -> None:
    """With dropout, too; and heads, not the encoder alone, see no more than a micro-batch."""
    own, batch = made(name, RUN)
    if needs_patches(METHODS[name]):
        module: nn.Module = vit(proj_drop_rate=0.2)
        encoder = encoders.wrap(module, mask_token=METHODS[name].mask_token)
    else:
        encoder = encoders.wrap(Drops(), 12)
    step = Step(encoder, own.method).double()
    other = copy.deepcopy(step)
    heads = [module for module in step.method.children() if not isinstance(module, Given)]
    rows: list[int] = []
    for head in heads:
        head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    loss, _, _ = taken(step, batch, Passes(3))
    torch.manual_seed(SEED)
    parts = [part_of(batch, at) for at in (slice(0, 3), slice(3, 6), slice(6, 8))]
    wanted = torch.stack([other(part, 3)[0] * len(part.index) / 8 for part in parts]).sum()
    wanted.backward()
    other.step_ends(3, None)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=1e-14)
    alike(step, other)
    assert rows and max(rows) <= 3 * 9


class Own(Method):
    """Calls the encoder several times, for all that it gives, and with tokens that it hasn't asked for."""

    about = METHODS["simclr"].about
    defaults = METHODS["simclr"].defaults
    views = METHODS["simclr"].views

    def __init__(self, width: int, run: RunFacts = RunFacts(), *, part: str = "all"):
        super().__init__(width, run)
        self.projector = nn.Linear(width, 6)
        self.unused = nn.Linear(2, 2)
        self.part = part

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> dict[str, Tensor]:
        terms = {}
        first, second = batch.views
        if self.part in ("all", "tokens"):
            both = student.encode([first, second])
            assert both.tokens is not None
            terms["unasked"] = self.projector(both.tokens).square().mean() + both.pooled.tanh().mean()
        if self.part in ("all", "layers"):
            deep = student.encode([first], layers=2)
            terms["layers"] = deep.layers[0].sin().mean() + deep.layers[1].mul(0.5).cos().mean()
        if self.part in ("all", "twice"):
            pooled, tokens, layers, grid = student.encode([second], tokens=True)
            assert tokens is not None and not layers and grid == (4, 4)
            tokens *= 0.5  # in place, as a method may
            z = self.projector(student.encode([first]).pooled)
            terms["twice"] = (tokens.mean((1, 2)) * z.sum(1)).mean() + pooled.var(0).sum()
        if self.part in ("all", "sizes"):
            wide, high = first[..., :16, :], first[..., :16].clone()
            joined = student.encode([wide, high])  # of two sizes, with as many tokens
            assert joined.tokens is not None and len(joined.tokens) == 2 * len(first) and joined.grid is None
            terms["sizes"] = joined.tokens.square().mean()
            with torch.no_grad():
                whole = teacher.encode([first]).tokens
            terms["constant"] = (whole * student.encode([second]).tokens).mean()
        return terms


@pytest.mark.parametrize(
    ("part", "momentum_encoder"),
    [("tokens", False), ("layers", False), ("twice", False), ("sizes", False), ("all", True)],
)
def test_a_method_of_ones_own_may_take_all_that_the_encoder_gives(part: str, momentum_encoder: bool) -> None:
    torch.manual_seed(0)
    encoder = encoders.wrap(vit(drop_path_rate=0.3))
    step = Step(encoder, Own(encoder.width, part=part), momentum_encoder).double()
    batch = Batch([torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)], torch.arange(8))
    resampled = 1e-6 if part in ("sizes", "all") else 1e-10  # timm resamples positions in float32
    assert step.training
    for drops in (True, False):
        if not drops:
            step = Step(encoders.wrap(vit()), step.method, momentum_encoder).double()
        step.zero_grad()
        compared(copy.deepcopy(step), batch, against=InOneGraph(3) if drops else None, rtol=resampled)


class PastTheBranch(SimCLR):
    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        return student.encoder(batch.views[0]).pooled.square().mean()


def test_a_call_past_the_branch_is_an_error() -> None:
    step = Step(encoders.wrap(Tiny(), 12), PastTheBranch(12, RUN, hidden=16, dim=8))
    batch = Batch([torch.randn(8, 3, 32, 32) for _ in range(2)], torch.arange(8))
    taken(step, batch, None)
    with pytest.raises(ValueError, match="micro-batches the Encoder is called through encode or project alone"):
        taken(step, batch, Passes(3))
    assert step.passes is None  # and the step is as it was
    taken(step, batch, None)


class OfPairs(METHODS["mae"]):
    """A loss of its own in a class whose own is a mean over images."""

    def loss(self, student: Branch, teacher: Branch, batch: Batch, step: Tensor) -> Tensor:
        tokens = student.encode(batch.views[:1], batch.masks).tokens
        assert tokens is not None
        return torch.pdist(tokens.tanh().mean(1)).mean()


def test_another_loss_is_taken_for_no_mean_over_images() -> None:
    own, batch = made("mae", RUN)
    assert METHODS["mae"].mean_over_images and not OfPairs.mean_over_images
    options = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    compared(Step(own.encoder, OfPairs(own.method.width, own.method.run, **options)).double(), batch)


def test_micro_batches_are_as_equal_as_they_can_be() -> None:
    assert parts_of(10, 4) == [slice(0, 4), slice(4, 7), slice(7, 10)]
    assert parts_of(8, 4) == [slice(0, 4), slice(4, 8)]
    assert parts_of(3, 8) == [slice(0, 3)]
    for rows in range(1, 40):
        for size in range(1, 12):
            lengths = [part.stop - part.start for part in parts_of(rows, size)]
            assert sum(lengths) == rows and len(lengths) == -(-rows // size)
            assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    with pytest.raises(ValueError, match="Passes: size must be at least 1, got 0"):
        Passes(0)


def test_notes_of_parts_are_those_of_the_batch() -> None:
    codes = [Codes(torch.rand(n, 4), torch.eye(4), torch.zeros(4), 0.1) for n in (3, 2)]
    parts = [
        {"embedding": torch.rand(n, 5), "codes": codes[i], "loss_a": torch.tensor(1.0 + i)} for i, n in ((0, 3), (1, 2))
    ]
    found = joined_notes([(0.6, parts[0]), (0.4, parts[1])])
    assert torch.equal(found["embedding"], torch.cat([part["embedding"] for part in parts]))
    assert torch.equal(found["codes"].features, torch.cat([one.features for one in codes]))
    assert found["loss_a"].item() == pytest.approx(1.4)


def test_half_precision_and_a_scaled_loss_go_the_same_way() -> None:
    """Under autocast leaves and their gradients are bfloat16, and what is scaled is scaled throughout."""
    torch.manual_seed(0)
    step = Step(encoders.wrap(convolutional(), 12), SimCLR(12, RUN, hidden=16, dim=8, norm="layer"))
    other = copy.deepcopy(step)
    batch = Batch([torch.randn(8, 3, 32, 32) for _ in range(2)], torch.arange(8))
    around = partial(torch.autocast, "cpu", torch.bfloat16)

    def scaled(loss: Tensor) -> Tensor:
        return loss * 1024 / 2

    torch.manual_seed(SEED)
    loss, _ = forward_backward(step, batch, 3, Passes(3), around=around, scaled=scaled)
    torch.manual_seed(SEED)
    other.passes = InOneGraph(3)
    with around():
        wanted, _ = other(batch, 3)
    scaled(wanted).backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0)
    for (name, mine), theirs in zip(gradients(step).items(), gradients(other).values(), strict=True):
        assert mine is not None and theirs is not None
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 0.02, f"{name}: {error:.1e}"  # bfloat16's rounding of sums in another order


def test_torch_compile_takes_both_passes() -> None:
    """And a batch of equal parts needs a graph for each: without a gradient, and with one."""
    own, batch = made("simclr", RUN)
    graphs: list[bool] = []

    def compiled(module: nn.Module) -> Any:
        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            graphs.append(torch.is_grad_enabled())
            return graph.forward

        return torch.compile(module, backend=backend)

    other = copy.deepcopy(own)
    passes = Passes(4, compiler=compiled)
    model = compiled(own)
    for _ in range(2):
        own.zero_grad()
        torch.manual_seed(SEED)
        loss, _ = forward_backward(own, batch, 3, passes, model=model)
    assert sorted(graphs) == [False, True]
    wanted, _, _ = taken(other, batch, None)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(gradients(own).values(), gradients(other).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
