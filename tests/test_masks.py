"""Batched masks against the reference samplers, one image at a time, in distribution."""

import math
import random

import numpy as np
import pytest
import torch

from fastjem.commands.host_steps import Operators
from fastjem.data import masks
from fastjem.data.batch import Crops, finish
from fastjem.data.masking import drawn_masks, drawn_together, mask_specs, most_masked, of_step
from fastjem.data.masks import Keyed
from fastjem.data.philox import FIRST_MASK_BLOCK, drawn_in_a_step, philox
from fastjem.data.views import MaskSpec, Views
from fastjem.errors import UserError
from fastjem.kernels.masks.philox import philox_on_device
from fastjem.nn.masks import random_block_mask, random_inverse_block_mask

GRID = (14, 14)


def close(ours: np.ndarray, theirs: np.ndarray, sigmas: float = 4.5) -> None:
    """Means over the first axis, within the noise of both samples."""
    noise = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= sigmas * noise + 1e-9).all()


def runs(hidden: np.ndarray) -> np.ndarray:
    """[B] how ragged a mask is: neighbours that differ, along both axes."""
    return (hidden[:, 1:] != hidden[:, :-1]).sum((1, 2)) + (hidden[:, :, 1:] != hidden[:, :, :-1]).sum((1, 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_mask() -> None:
    hidden = masks.random_mask(4000, GRID, 0.75, generator=generator())
    assert hidden.shape == (4000, 14, 14) and (hidden.sum((1, 2)) == 196 - 49).all()
    share = hidden.double().mean(0)  # every patch alike
    assert (share - 0.75).abs().max() < 4.5 * math.sqrt(0.75 * 0.25 / 4000)
    assert torch.equal(hidden, masks.random_mask(4000, GRID, 0.75, generator=generator()))
    assert not torch.equal(hidden, masks.random_mask(4000, GRID, 0.75, generator=generator(1)))
    assert not masks.random_mask(3, GRID, 0.0).any() and masks.random_mask(3, (2, 3), 1.0).all()
    with pytest.raises(ValueError, match=r"random_mask: share must be between 0 and 1, got 75"):
        masks.random_mask(3, GRID, 75)


def test_even_block_mask() -> None:
    hidden = masks.even_block_mask(400, (10, 14), 0.6, generator=generator())
    assert hidden.shape == (400, 10, 14) and (hidden.sum((1, 2)) == 84).all()
    assert (hidden.double().mean(0) - 0.6).abs().max() < 0.12  # everywhere alike: 5 standard deviations
    for alike in (hidden[:, 1:] == hidden[:, :-1], hidden[..., 1:] == hidden[..., :-1]):
        assert alike.float().mean() > 0.75  # by lot 0.52
    assert not masks.even_block_mask(3, GRID, 0.0).any() and masks.even_block_mask(3, (2, 3), 1.0).all()


def naive_inverse_block(share: float, rng: np.random.Generator) -> np.ndarray:
    """One image of data2vec 2.0: squares clamped to the grid, then single patches until the number is right."""
    side, patches = GRID[0], GRID[0] * GRID[1]
    seen = np.zeros(GRID, bool)
    for centre in rng.integers(0, patches, int(patches * ((1 - share + 0.07) / 9))):
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                seen[np.clip(centre // side + i, 0, side - 1), np.clip(centre % side + j, 0, side - 1)] = True
    flat, wanted = seen.reshape(-1), int(patches * (1 - share))
    surplus = flat.sum() - wanted
    flat[rng.choice(np.flatnonzero(flat == (surplus > 0)), abs(surplus), replace=False)] = surplus < 0
    return ~seen


def test_inverse_block_mask() -> None:
    rng = np.random.default_rng(0)
    hidden = masks.inverse_block_mask(800, GRID, 0.8, generator=generator()).numpy()
    theirs = np.stack([naive_inverse_block(0.8, rng) for _ in range(800)])
    assert (hidden.sum((1, 2)) == 196 - 39).all()
    close(hidden.astype(float), theirs.astype(float))
    close(runs(hidden), runs(theirs))
    with pytest.raises(ValueError, match="block must be odd, got 4"):
        masks.inverse_block_mask(1, GRID, block=4)


def test_block_mask() -> None:
    random.seed(0)
    ours = torch.cat([masks.block_mask(200, GRID, generator=generator(i)) for i in range(10)]).numpy()
    theirs = np.concatenate([random_block_mask((200, *GRID)).numpy() for _ in range(10)])
    assert (ours.reshape(10, 200, -1).any(2).sum(1) == 100).all()  # half of the images of each batch
    # sorted within a batch: shares are spread evenly, so sums over single images vary less than they seem to
    ours, theirs = (x[x.any((1, 2))] for x in (ours, theirs))
    close(ours.sum((1, 2)), theirs.sum((1, 2)))
    assert abs(ours.sum((1, 2)).std() - theirs.sum((1, 2)).std()) < 2
    close(ours.astype(float), theirs.astype(float))
    close(runs(ours), runs(theirs))
    assert ours.sum((1, 2)).max() <= 98
    # one rectangle or two, whose shape shows
    few = masks.block_mask(1000, GRID, images=1.0, low=0.1, high=0.1, least=16, generator=generator()).numpy()
    theirs = random_block_mask((1000, *GRID), 1.0, 0.1, 0.1, 16).numpy()
    close(few.sum((1, 2)), theirs.sum((1, 2)))
    close(np.abs(few.any(1).sum(1) - few.any(2).sum(1)), np.abs(theirs.any(1).sum(1) - theirs.any(2).sum(1)))
    close(few.astype(float), theirs.astype(float))


def test_block_mask_has_steps_enough(monkeypatch) -> None:
    """More candidates would change nothing."""
    drawn = torch.rand(500, 2 + 4 * (masks.STEPS + 100), generator=generator())
    options = {"images": 1.0, "uniform": lambda count: drawn[:, :count]}
    enough = masks.block_mask(500, (16, 16), **options)
    monkeypatch.setattr(masks, "STEPS", masks.STEPS + 100)
    assert torch.equal(enough, masks.block_mask(500, (16, 16), **options))


def naive_multi_block(sizes: tuple, keep: int, rng: np.random.Generator, scale=(0.15, 0.2)) -> tuple:
    """One image of I-JEPA: targets, then a context without them, tried again until enough is left."""
    blocks = []
    for (low, high), (a, b), u in ((scale, (0.75, 1.5), sizes[0]), ((0.85, 1.0), (1, 1), sizes[1])):
        area, ratio = int(196 * (low + u * (high - low))), a + u * (b - a)
        blocks.append([min(round(math.sqrt(x)), 13) for x in (area * ratio, area / ratio)])

    def place(h: int, w: int) -> np.ndarray:
        mask = np.zeros(GRID, bool)
        top, left = rng.integers(14 - h), rng.integers(14 - w)
        mask[top : top + h, left : left + w] = True
        return mask

    targets = [place(*blocks[0]) for _ in range(4)]
    dropped, tries = 0, 0
    while True:
        context = place(*blocks[1])
        for target in targets[: 4 - dropped]:
            context &= ~target
        if context.sum() > keep:
            return targets, ~context
        tries += 1
        if tries % 20 == 0:
            dropped += 1


@pytest.mark.parametrize(("keep", "scale"), [(10, (0.15, 0.2)), (60, (0.3, 0.3))])
def test_multi_block_mask(keep: int, scale: tuple[float, float]) -> None:
    rng, sizes = np.random.default_rng(0), (0.3, 0.6)
    options = {"keep": keep, "target_scale": scale, "sizes": sizes}
    drawn = masks.multi_block_mask(800, GRID, generator=generator(), **options)
    theirs = [naive_multi_block(sizes, keep, rng, scale) for _ in range(800)]
    ours = torch.zeros(800, 4, 196).scatter_(2, drawn.targets, 1).view(800, 4, 14, 14).numpy()
    close(ours, np.stack([np.stack(targets) for targets, _ in theirs]).astype(float))
    hidden, reference = drawn.context.numpy(), np.stack([context for _, context in theirs])
    close(hidden.astype(float), reference.astype(float))
    close(hidden.sum((1, 2)), reference.sum((1, 2)))
    assert (~hidden).sum((1, 2)).min() > keep
    kept = masks.visible(drawn.context)
    assert kept.shape[1] == (~hidden).sum((1, 2)).min()
    assert not drawn.context.flatten(1).gather(1, kept).any() and (kept.diff(dim=1) > 0).all()


def test_sizes_change_with_the_batch() -> None:
    torch.manual_seed(0)
    sizes = {masks.multi_block_mask(2, GRID).targets.shape[2] for _ in range(20)}
    assert len(sizes) > 1


def test_no_mask_waits_for_the_device() -> None:
    """A meta tensor has no values: whoever asks for one raises."""
    for draw in (masks.random_mask, masks.inverse_block_mask, masks.block_mask):
        assert draw(4, GRID, device="meta").shape == (4, 14, 14)
    drawn = masks.multi_block_mask(4, GRID, device="meta", sizes=(0.5, 0.5))
    assert drawn.context.shape == (4, 14, 14) and drawn.targets.shape[:2] == (4, 4)
    samples = torch.empty(4, dtype=torch.int64, device="meta")
    for masking in masks.SAMPLERS:
        assert drawn_masks(MaskSpec(0, GRID, 0.75, masking), 0, 0, samples).hidden.shape == (4, 14, 14)


def test_philox_is_the_same_on_the_device() -> None:
    """Bit for bit numpy's, which has the known answers; words of all 32 bits, samples beyond them."""
    rng = np.random.default_rng(0)
    counter = [rng.integers(0, 2**32, 500) for _ in range(4)]
    counter[0] += 2**33
    for seed in (0, 5, 2**32 + 7, 2**64 - 1):
        expected = philox(counter, seed)
        found = philox_on_device([torch.from_numpy(word) for word in counter], seed)
        assert np.array_equal(found.numpy(), expected)
    samples = torch.tensor([3, 2**31 + 1, 9])
    numbers = Keyed(samples, 7, 2, 1)
    first, second = numbers(6), numbers(3)
    for block, drawn in ((0, first[:, :4]), (1, first[:, 4:]), (2, second)):
        expected = philox([samples.numpy(), np.int64(2), np.int64(1), np.int64(FIRST_MASK_BLOCK + block)], 7)
        assert np.array_equal(drawn.numpy(), expected.T[:, : drawn.shape[1]])


def keyed_blocks(samples: torch.Tensor, seed: int = 0, epoch: int = 0, view: int = 0) -> torch.Tensor:
    return masks.block_mask(len(samples), GRID, uniform=Keyed(samples, seed, epoch, view))


def keyed_multi_block(samples: torch.Tensor, seed: int = 0, epoch: int = 0, view: int = 0) -> torch.Tensor:
    """Contexts and targets in one tensor."""
    drawn = masks.multi_block_mask(len(samples), GRID, sizes=(0.3, 0.6), uniform=Keyed(samples, seed, epoch, view))
    return torch.cat([drawn.context.flatten(1).long(), drawn.targets.flatten(1)], 1)


def keyed_hidden(masking: str):
    def draw(samples: torch.Tensor, seed: int = 0, epoch: int = 0, view: int = 0) -> torch.Tensor:
        return drawn_masks(MaskSpec(view, GRID, 0.6, masking), seed, epoch, samples).hidden

    return draw


KEYED = {masking: keyed_hidden(masking) for masking in masks.SAMPLERS}
KEYED |= {"block": keyed_blocks, "multi_block": keyed_multi_block}


@pytest.mark.parametrize("draw", KEYED.values(), ids=KEYED.keys())
def test_masks_depend_on_nothing_but_their_key(draw) -> None:
    samples = torch.randperm(64, generator=generator())
    whole = draw(samples)
    for size in (1, 3, 32):  # other batches, other ranks, another place in the batch
        assert torch.equal(whole, torch.cat([draw(part) for part in samples.split(size)]))
    order = torch.randperm(64, generator=generator(1))
    assert torch.equal(whole[order], draw(samples[order]))
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 1}):
        assert (draw(samples, **other) != whole).flatten(1).any(1).float().mean() > 0.4  # blocks: half are empty
    assert len(whole.flatten(1).unique(dim=0)) > 25


def test_sizes_follow_seed_and_step() -> None:
    drawn = np.array([of_step(seed, step) for seed in range(20) for step in range(50)])
    assert of_step(3, 7) == drawn[157].tolist() and len(np.unique(drawn)) == drawn.size
    assert np.abs(drawn.mean(0) - 0.5).max() < 4.5 * math.sqrt(1 / 12 / 1000) and 0 < drawn.min() < drawn.max() < 1


@pytest.mark.parametrize("masking", masks.SAMPLERS)
def test_keyed_masks_have_the_samplers_statistics(masking: str) -> None:
    ours = drawn_masks(MaskSpec(0, GRID, 0.6, masking), 3, 5, torch.arange(2000)).hidden.numpy()
    theirs = masks.SAMPLERS[masking](2000, GRID, 0.6, generator=generator()).numpy()
    assert (ours.sum((1, 2)) == theirs.sum((1, 2))).all()
    close(ours.astype(float), theirs.astype(float))
    close(runs(ours), runs(theirs))
    neighbours = (ours[1:] == ours[:-1]).mean((1, 2))  # samples with neighbouring numbers have nothing in common
    close(neighbours, (theirs[1:] == theirs[:-1]).mean((1, 2)))


def test_keyed_blocks_have_the_statistics_of_a_batch() -> None:
    ours = keyed_blocks(torch.arange(2000)).numpy()
    theirs = np.concatenate([random_block_mask((200, *GRID)).numpy() for _ in range(10)])
    assert abs(ours.any((1, 2)).mean() - 0.5) < 4.5 * math.sqrt(0.25 / 2000)
    ours, theirs = (x[x.any((1, 2))] for x in (ours, theirs))
    close(ours.astype(float), theirs.astype(float))
    close(ours.sum((1, 2)), theirs.sum((1, 2)))
    close(runs(ours), runs(theirs))


def test_a_batch_has_the_masks_of_its_images() -> None:
    specs = Views(large=1, recipe="data2vec", mask=0.75).specs(32)
    wanted = mask_specs(Views(large=2, recipe="data2vec", mask=0.75, masking="random"), 32, 8)
    assert wanted == [MaskSpec(0, (4, 4), 0.75, "random"), MaskSpec(1, (4, 4), 0.75, "random")]
    assert mask_specs(Views(large=2), 32, 8) == []
    with pytest.raises(UserError, match="no masking 'blocks'; did you mean"):
        mask_specs(Views(mask=0.5, masking="blocks"), 32, 8)
    index = torch.tensor([5, 2, 9])
    view, table = torch.zeros(3, 32, 32, 3, dtype=torch.uint8), torch.zeros(3, 13)
    batch = finish(Crops([view], [table], index, 4, None, []), specs, "cpu", masks=wanted[:1], seed=7)
    assert torch.equal(batch.masks[0].hidden, drawn_masks(wanted[0], 7, 4, index).hidden)
    assert (batch.masks[0].hidden.sum((1, 2)) == masks.hidden_patches((4, 4), 0.75)).all()


def test_views_alike_are_drawn_together() -> None:
    """Blocks of all views of a batch, bit for bit, in as many operators as those of one view: a GPU launches each."""
    specs = [
        *(MaskSpec(view, GRID, 0.5, "block", least=0.1, images=0.5) for view in range(2)),
        MaskSpec(2, (7, 7), 0.5, "block", least=0.1),
        MaskSpec(3, GRID, 0.75, "random", drops=True),
    ]
    samples = torch.arange(9) * 5
    together = drawn_together(specs, 7, 4, samples, 3)
    assert list(together) == [0, 1, 2, 3]
    for spec in specs:
        for a, b in zip(together[spec.view], drawn_masks(spec, 7, 4, samples, 3), strict=True):
            assert a is b is None or torch.equal(a, b)
    assert not torch.equal(together[0].hidden, together[1].hidden)
    counts = []
    for chosen in (specs[:1], specs[:2]):
        with Operators() as counted:
            counted.on = True
            drawn_together(chosen, 7, 4, torch.empty(9, dtype=torch.int64, device="meta"))
        counts.append(counted.calls)
    assert counts[1] < 1.05 * counts[0] + 100  # the numbers that are drawn, once more
    assert drawn_together(specs, 7, 4, torch.arange(0))[1].hidden.shape == (0, *GRID)


def test_inverse_rectangles_are_seen_and_go_around_the_edges() -> None:
    for grid in ((14, 14), (8, 8), (6, 10), (1, 4)):
        for share in (0.0, 0.4, 0.65, 0.9, 1.0):
            seen = ~masks.inverse_rectangle_mask(300, grid, share, generator=generator()).numpy()
            patches = grid[0] * grid[1]
            assert (seen.sum((1, 2)) == patches - masks.hidden_patches(grid, share)).all()
            columns = np.array([len(set(np.roll(row, 0).nonzero()[0])) for row in seen.any(1)])
            rows = np.array([row.sum() for row in seen.any(2)])
            assert (rows * columns - seen.sum((1, 2)) < np.maximum(columns, 1)).all()  # less than a row is cut off
    drawn = (~masks.inverse_rectangle_mask(4000, GRID, generator=generator(1))).float().numpy()
    close(drawn, np.broadcast_to(drawn.mean((1, 2), keepdims=True), drawn.shape))  # every patch as often
    tall = drawn.any(2).sum(1) / drawn.any(1).sum(1)
    assert tall.min() > 0.4 and tall.max() < 2.3 and abs(np.log(tall).mean()) < 0.1
    grid, share = (14, 14), 0.65  # as lightly's form draws them: how ragged they are
    kept = [random_inverse_block_mask((1, 197), share)[0][0, 1:] - 1 for _ in range(1000)]
    theirs = torch.ones(1000, 196, dtype=torch.bool).scatter_(1, torch.stack(kept), False).view(-1, *grid)
    ours = masks.inverse_rectangle_mask(1000, grid, share, generator=generator(2))
    assert abs(runs(ours.numpy()).mean() - runs(theirs.numpy()).mean()) < 2


def test_dropped_patches_come_with_those_that_are_left() -> None:
    samples = torch.arange(50)
    for masking in masks.SAMPLERS:
        plain = drawn_masks(MaskSpec(0, GRID, 0.6, masking), 3, 5, samples)
        drawn = drawn_masks(MaskSpec(0, GRID, 0.6, masking, drops=True), 3, 5, samples)
        assert plain.visible is None and torch.equal(plain.hidden, drawn.hidden)
        assert (drawn.visible.diff(dim=1) > 0).all()
        found = torch.ones(50, 196, dtype=torch.bool).scatter_(1, drawn.visible, False)
        assert torch.equal(found.view(-1, *GRID), drawn.hidden)
    wanted = mask_specs(Views(large=2, mask=0.15, masking="random", drops=True, masked_views=(1,)), 32, 8)
    assert wanted == [MaskSpec(1, (4, 4), 0.15, "random", drops=True)]
    with pytest.raises(UserError, match="can only be replaced"):
        mask_specs(Views(mask=0.5, masking="block", drops=True), 32, 8)


@pytest.mark.parametrize("side", [4, 8, 14])
def test_the_blocks_of_a_run_are_even_and_depend_on_the_image_alone(side: int) -> None:
    spec = MaskSpec(0, (side, side), 0.5, "multi_block", drops=True)
    samples = torch.arange(200)
    sizes = set()
    for step in range(10):
        drawn = drawn_masks(spec, 3, 5, samples, step)
        patches = drawn.targets.shape[2]
        assert drawn.visible.shape == (200, max(side**2 - 4 * patches, side**2 // 8, 1))
        in_target = torch.zeros(200, side**2, dtype=torch.bool).scatter_(1, drawn.targets.flatten(1), True)
        if side > 4:  # of 16 patches blocks may cover all
            assert not in_target.gather(1, drawn.visible).any()
        assert (drawn.visible.diff(dim=1) > 0).all()
        alone = drawn_masks(spec, 3, 5, samples[7:8], step)
        assert all(torch.equal(one[0], all_[7]) for one, all_ in zip(alone, drawn, strict=True))
        sizes.add(patches)
    assert len(sizes) > 1 or side == 4


def test_blocks_follow_the_views_shares() -> None:
    spec = MaskSpec(0, GRID, 0.3, "block", least=0.1, images=0.25)
    hidden = drawn_masks(spec, 0, 0, torch.arange(4000)).hidden.flatten(1)
    has = hidden.any(1)
    assert abs(has.float().mean() - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 4000)
    share = hidden[has].float().mean(1)
    assert share.max() <= 0.3 and 0.15 < share.mean() < 0.21
    sums = hidden.sum(1).split(64)
    rows = most_masked(spec, 64)
    assert sum(int(part.sum()) > rows for part in sums) == 0 and rows < 64 * 196 * 0.25
    assert most_masked(MaskSpec(0, GRID, 0.6, "random"), 64) == 64 * masks.hidden_patches(GRID, 0.6)


@pytest.mark.parametrize("grid", [(0, 6), (6, 0)])
@pytest.mark.parametrize("name", [*(f"{masking}_mask" for masking in masks.SAMPLERS), "block_mask", "multi_block_mask"])
def test_a_grid_without_patches_is_refused(name: str, grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .*grid"):
        getattr(masks, name)(2, grid)


def test_targets_are_of_a_patch_at_least() -> None:
    found = masks.multi_block_mask(2, (4, 4), target_scale=(0.0, 0.01))
    assert found.targets.shape == (2, 4, 1)
    with pytest.raises(ValueError, match="multi_block_mask: needs a target"):
        masks.multi_block_mask(2, (6, 6), targets=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_images_numbers_of_any_integer_dtype_are_the_same(dtype: torch.dtype) -> None:
    samples, step = torch.tensor([3, 0, 200]), torch.tensor(4)
    assert torch.equal(Keyed(samples.to(dtype), 1, 0, 0)(5), Keyed(samples, 1, 0, 0)(5))
    ours = drawn_in_a_step(samples.to(dtype), step.to(dtype), 3, 1)
    assert torch.equal(ours, drawn_in_a_step(samples, step, 3, 1))


@pytest.mark.parametrize("samples, step", [([1.0], 4), ([[1]], 4), ([1], 4.5), ([1], [4])])
def test_images_numbers_must_be_whole(samples: list, step: object) -> None:
    with pytest.raises(ValueError, match=r"must be [01]-dim, of an integer dtype"):
        drawn_in_a_step(torch.tensor(samples), torch.tensor(step), 3, 0)
