"""Masks, views, projectors and momentum encoders of any method: what goes together, and why something else doesn't."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from test_methods import NEEDS_IMAGES, Tiny, small_options, vit
from torch import Tensor

from fastjem import encoders
from fastjem.data.batch import Batch
from fastjem.data.masking import MASKINGS_OF_RUNS, drawn_masks, masks_of_run
from fastjem.data.masks import hidden_patches
from fastjem.data.views import ViewSpec
from fastjem.methods import METHODS, RunFacts, options_of
from fastjem.methods.combinations import why_not
from fastjem.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 8
PATCH = 8
SIZES = {"large": 32, "small": 16}
MASKED = [name for name, kind in METHODS.items() if not why_not(kind, "mask")]


def masked_step(name: str, momentum_encoder: bool | None = None, masking: str = "random") -> tuple[Step, Batch]:
    """A method on a small vision transformer, and a batch with a mask of the run's on every view."""
    torch.manual_seed(0)
    kind = METHODS[name]
    encoder = encoders.wrap(vit())
    run = RunFacts(image_size=32, patch=PATCH, images=NEEDS_IMAGES.get(name, 0), batch=IMAGES)
    step = Step(encoder, kind(encoder.width, run, **small_options(name)), momentum_encoder)
    sizes = [32] * kind.views.large + [16] * kind.views.small
    views = [torch.randn(IMAGES, 3, size, size) for size in sizes]
    specs = masks_of_run([ViewSpec(size=size) for size in sizes], PATCH, 0.75, masking)
    index = torch.arange(IMAGES)
    masks = {spec.view: drawn_masks(spec, 5, 0, index) for spec in specs}
    return step, Batch(views, index, index % 3, masks)


@contextmanager
def called(module: torch.nn.Module) -> Iterator[list[tuple[int, Tensor | None, int]]]:
    """(pixels of a side, the visible patches, tokens that came out) of every call of an encoder."""
    calls: list[tuple[int, Tensor | None, int]] = []

    def note(_: object, given: tuple, options: dict, features: encoders.Features) -> None:
        assert features.tokens is not None
        calls.append((given[0].shape[-1], options.get("visible"), features.tokens.shape[1]))

    handle = module.register_forward_hook(note, with_kwargs=True)
    yield calls
    handle.remove()


@pytest.mark.parametrize("momentum_encoder", [None, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_trained_encoder_is_given_the_visible_patches_alone(name: str, momentum_encoder: bool | None) -> None:
    """In every call, a quarter of each view's; a momentum encoder sees whole views; all parameters learn."""
    if name not in MASKED:
        return
    step, batch = masked_step(name, momentum_encoder)
    teacher = step.teacher["encoder"] if step.teacher else encoders.wrap(Tiny(), 12)
    with called(step.encoder) as of_student, called(teacher) as of_teacher:
        loss, _ = step(batch, 0)
    shown = {spec.shape[-1]: (spec.shape[-1] // PATCH) ** 2 for spec in batch.views}
    assert of_student and {size for size, _, _ in of_student} <= set(shown)
    for size, visible, tokens in of_student:
        assert visible is not None and tokens == visible.shape[1] == shown[size] // 4
    assert all(visible is None and tokens == shown[size] for size, visible, tokens in of_teacher)
    assert torch.isfinite(loss)
    loss.backward()
    assert not [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in MASKED])
def test_masks_that_cant_be_are_refused_with_the_reason(name: str) -> None:
    kind = METHODS[name]
    reason = why_not(kind, "mask")
    if not kind.views.mask:
        assert len(reason) > 30, "a reason of its own"
        return
    assert "masks its images by itself" in reason
    assert ("--options mask=" in reason) == ("mask" in options_of(kind))


def test_views_and_masks_belong_together_whatever_is_encoded_first() -> None:
    """MoCo's student is given view 0, another method's the views in another order: each has its own mask."""
    step, batch = masked_step("simclr")
    student, _ = step.branches(batch)
    with called(step.encoder) as calls:
        student.encode(batch.views[::-1])
        student.encode(batch.views[1:])
    expected = [batch.masks[view].visible for view in (1, 0)]
    assert torch.equal(calls[0][1], torch.cat(expected)) and torch.equal(calls[1][1], expected[0])


def test_a_masked_step_is_the_loss_of_the_visible_patches() -> None:
    step, batch = masked_step("vicreg")
    loss, _ = step(batch, 0)
    z = []
    for i, view in enumerate(batch.views):
        vit = step.encoder.backbone
        tokens = vit._pos_embed(vit.patch_embed(view))
        at = batch.masks[i].visible[..., None].expand(-1, -1, tokens.shape[2])
        kept = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, at)], 1)
        z.append(vit.forward_head(vit.norm(vit.blocks(kept))))
    z0, z1 = step.method.projector(torch.cat(z)).chunk(2)
    invariance = 25 * (z0 - z1).square().mean()
    rest = 0.0
    for x in (z0, z1):
        rest = rest + 25 * (1 - (x.var(0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
        covariance = torch.cov(x.T)
        rest = rest + (covariance - covariance.diag().diag()).square().sum() / x.shape[1]
    torch.testing.assert_close(loss, invariance + rest, rtol=1e-4, atol=1e-5)


def test_what_would_leave_the_masks_out_is_an_error() -> None:
    step, batch = masked_step("simclr")
    student, teacher = step.branches(batch)
    assert teacher is student
    with pytest.raises(ValueError, match="through encode or project alone"):
        student.encoder(batch.views[0])
    with pytest.raises(ValueError, match=r"views have masks, and number 1 of the 2 that came is none of them"):
        student.encode([batch.views[0], batch.views[1] + 0])
    for options in ({"layers": 1}, {"tokens": True}, {"masks": {0: batch.masks[0]}}):
        with pytest.raises(ValueError, match="no others, layers or whole tokens"):
            student.encode(batch.views, **options)


@pytest.mark.parametrize(
    "name", [name if name == "simclr" else pytest.param(name, marks=pytest.mark.exhaustive) for name in MASKED]
)
def test_a_compiled_step_has_the_same_masks(name: str) -> None:
    step, batch = masked_step(name)
    for module in step.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    other = copy.deepcopy(step)
    torch._dynamo.reset()
    losses = []
    for function in (step, torch.compile(other, fullgraph=True, backend="eager")):
        torch.manual_seed(1)
        losses.append(function(batch, torch.tensor(2))[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masking", MASKINGS_OF_RUNS)
def test_masks_hide_as_many_patches_in_each_image_and_follow_their_key_alone(masking: str) -> None:
    specs = [ViewSpec(size=224), ViewSpec(size=224), ViewSpec(size=96)]
    found = masks_of_run(specs, 16, 0.6, masking)
    assert [(spec.view, spec.grid) for spec in found] == [(0, (14, 14)), (1, (14, 14)), (2, (6, 6))]
    index = torch.arange(40)
    for spec in found:
        whole = drawn_masks(spec, 3, 2, index)
        seen = whole.visible
        assert seen is not None
        assert seen.shape[1] == spec.grid[0] ** 2 - hidden_patches(spec.grid, 0.6)
        assert not whole.hidden.flatten(1).gather(1, seen).any() and (seen.diff(dim=1) > 0).all()
        part = drawn_masks(spec, 3, 2, index[7:9])
        assert torch.equal(part.hidden, whole.hidden[7:9])
    first, second = (drawn_masks(spec, 3, 2, index).hidden for spec in found[:2])
    assert not torch.equal(first, second)
    with pytest.raises(Exception, match="leaves none of the 4 patches of a view of 32 pixels"):
        masks_of_run([replace(specs[0], size=32)], 16, 0.9, masking)
