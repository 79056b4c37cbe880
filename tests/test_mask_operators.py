"""The operators that masks are drawn with: bit for bit their specification's, on every implementation.

What the masks are like is tested in test_masks.py.
"""

import hashlib
from dataclasses import replace

import launches
import numpy as np
import pytest
import torch
from conftest import INTERPRETING
from torch import Tensor

from fastjem import ops
from fastjem.data import masks
from fastjem.data.masking import MASKINGS, drawn_masks, drawn_together
from fastjem.data.philox import philox
from fastjem.data.views import MaskSpec

call = torch.ops.fastjem
IMAGES = 3 if INTERPRETING else 130  # of which two threads have 64 and more each
TRIES, PLACES = (12, 3) if INTERPRETING else (48, 20)
GRIDS = [(14, 14), (6, 10), (3, 70), (40, 33)]  # one word a row; words of 32 and of 64 bits; several


def uniform(images: int, count: int, seed: int = 0) -> Tensor:
    return torch.rand(images, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(op: str, images: int, grid: tuple[int, int], seed: int = 0) -> tuple:
    height, width = grid
    patches = height * width
    block = (min(5, height - 1), min(6, width - 1))
    context = (max(height - 2, 1), max(width - 3, 1))
    return {
        "block_masks": lambda: (
            uniform(images, 2 + 4 * TRIES, seed), None, height, width, 0.8, 0.1, 0.5, 4, patches, 0.3, 10,
        ),
        "even_block_scores": lambda: (uniform(images, 4 * 32 + patches, seed), height, width),
        "inverse_rectangle_masks": lambda: (uniform(images, 3, seed), height, width, patches // 3, -0.7, 0.7),
        "multi_block_masks": lambda: (
            uniform(images, 2 * (4 + 5 * PLACES), seed), height, width, list(block), list(context), 4, 10,
        ),
    }[op]()  # fmt: skip


OPERATORS = ("block_masks", "even_block_scores", "inverse_rectangle_masks", "multi_block_masks")


_expected: dict = {}  # the specification's, of the same arguments for every implementation


def check(op: str, given: tuple, device: str) -> tuple[Tensor, ...]:
    """The operator's results are its specification's."""
    there = [x.to(device) if isinstance(x, Tensor) else x for x in given]
    found = getattr(call, op)(*there)
    key = (op, *(x.numpy().tobytes() if isinstance(x, Tensor) else str(x) for x in given))
    if key not in _expected:
        _expected[key] = ops.reference(op)(*given)
    expected = _expected[key]
    pair = (found, expected) if isinstance(found, tuple) else ((found,), (expected,))
    for x, y in zip(*pair, strict=True):
        if x.is_floating_point():  # a power of another library may have another last bit
            torch.testing.assert_close(x.cpu(), y, rtol=1e-15, atol=0)
        else:
            assert torch.equal(x.cpu(), y)
    return pair[1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_masks_are_the_specifications(op: str, grid: tuple[int, int], implementation) -> None:
    if implementation.name == "reference":
        pytest.skip("compared with itself")
    given = arguments(op, IMAGES, grid)
    expected = check(op, given, implementation.device)
    assert len(expected[0].flatten(1).unique(dim=0)) >= min(IMAGES, 4) - 1  # there is something to be told apart
    if grid == GRIDS[0] or not INTERPRETING:
        check(op, (given[0].float(), *given[1:]), implementation.device)
        check(op, (given[0].T.contiguous().T, *given[1:]), implementation.device)


def test_block_masks_follow_their_options(implementation) -> None:
    drawn = uniform(IMAGES, 2 + 4 * 48)
    wanted = torch.arange(IMAGES) % 90.0
    for numbers in (
        (14, 14, 1.0, 0.1, 0.1, 16, 30, 0.3, 10),
        (14, 14, 1.0, 0.6, 0.9, 1, 196, 1.0, 1),
        (14, 14, 0.5, 0.1, 0.5, 300, 196, 0.3, 10),  # none is as large
        (2, 2, 1.0, 0.5, 1.0, 1, 4, 0.3, 10),
        (1, 9, 1.0, 0.5, 1.0, 1, 9, 0.3, 10),  # a rectangle were as high as the grid
    ):
        check("block_masks", (drawn, None, *numbers), implementation.device)
        check("block_masks", (drawn[:, :22], wanted.float(), *numbers), implementation.device)
    assert call.block_masks(drawn[:0].to(implementation.device), None, 5, 4, *numbers[2:]).shape == (0, 5, 4)


@pytest.mark.parametrize("keep", [0, 20, 60, 500])
def test_contexts_without_room_let_targets_in(keep: int, implementation) -> None:
    """Of 500 patches no place has enough: the last round's first one."""
    given = (uniform(IMAGES, 2 * (4 + 5 * PLACES)), 9, 9, [6, 6], [8, 8], 4, keep)
    hidden, targets = check("multi_block_masks", given, implementation.device)
    in_targets = torch.zeros(IMAGES, 81, dtype=torch.bool).scatter_(1, targets.flatten(1), True)
    seen = ~hidden.flatten(1)
    if keep <= 60:
        assert (seen.sum(1) > keep).all()
    assert (seen & in_targets).any() == (keep >= 20)


def test_grids_of_more_patches_than_a_program_holds(implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    if implementation.name != "triton":
        pytest.skip("a limit of Triton's kernels")
    from fastjem.kernels.masks import gpu

    monkeypatch.setattr(gpu, "MOST_WORDS", 16)
    for op in ("block_masks", "multi_block_masks"):
        monkeypatch.setattr(gpu, f"_{op}_kernel", None)  # it isn't launched
        check(op, arguments(op, 3, (14, 14)), implementation.device)


def test_numbers_are_philoxs(implementation) -> None:
    """numpy's, which has the known answers: words of all 32 bits and beyond, views, an epoch that is a tensor."""
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 2**40, 7)
    there = torch.from_numpy(samples).to(implementation.device)
    for seed in (0, 5, 2**32 + 7, -1, -(2**63)):
        for epoch, view, views, first, count in (
            (3, 1, 1, 3 << 30, 6),
            (2**32 - 1, 7, 3, 15 << 28, 103),
            (0, 2**32 - 1, 1, 0, 1),
        ):
            found = call.keyed_uniform(there, None, epoch, view, views, first, count, seed)
            step = torch.tensor(epoch, device=implementation.device)
            again = call.keyed_uniform(there, step, 99, view, views, first, count, seed)
            assert found.dtype == torch.float64 and torch.equal(found, again)
            blocks = first + np.arange(-(-count // 4))
            for i in range(views):
                words = [samples[:, None], np.int64(epoch), np.int64(view + i), blocks]
                expected = philox(words, seed).transpose(1, 2, 0).reshape(7, -1)[:, :count]
                assert np.array_equal(found[7 * i : 7 * (i + 1)].cpu().numpy(), expected)
    apart = torch.stack([there, there], 1)[:, 0]
    assert torch.equal(
        call.keyed_uniform(apart, None, 1, 2, 1, 0, 5, 3), call.keyed_uniform(there, None, 1, 2, 1, 0, 5, 3)
    )
    assert call.keyed_uniform(there[:0], None, 1, 2, 3, 0, 5, 3).shape == (0, 5)


# Of the version before masks were operators: a run that was begun by it goes on with the same ones.
MASKS = {
    "even_block": "4aa4016566269306",
    "random": "818bd5058294dc22",
    "inverse_block": "d0ff1890ceaef90c",
    "inverse_rectangle": "4e186fc3e8e4072e",
    "block": "7a0d9a101869b5d5",
    "multi_block": "c7f20546d4b52d76",
}


@pytest.mark.parametrize("masking", MASKINGS)
def test_masks_of_a_key_stay_what_they_were(masking: str, implementation) -> None:
    samples = torch.arange(9, device=implementation.device) * (2**31 + 17)
    spec = MaskSpec(1, (14, 14), 0.6, masking, masking != "block", least=0.1, images=0.7)
    of_all = hashlib.sha256()
    for x in drawn_masks(spec, 2**63 + 11, 4, samples, 9):
        if x is not None:
            of_all.update(x.cpu().long().numpy().tobytes())
    assert of_all.hexdigest()[:16] == MASKS[masking]


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block_mask: uniform\(194\) must give \[3, 194\] float32 or float64, got"):
        masks.block_mask(3, (4, 4), uniform=lambda count: torch.rand(2, count))
    with pytest.raises(ValueError, match=r"got \(3, 16\) int64"):
        masks.random_mask(3, (4, 4), uniform=lambda count: torch.zeros(3, count, dtype=torch.int64))
    drawn = uniform(2, 208)
    with pytest.raises(ValueError, match="multi_block_masks: target must be smaller than the grid, 4 x 9"):
        call.multi_block_masks(drawn, 4, 9, [4, 3], [2, 2], 4, 10)
    with pytest.raises(ValueError, match="even_block_scores: drawn must be "):
        call.even_block_scores(uniform(2, 16 + 4 * 63), 4, 4)
    with pytest.raises(ValueError, match="keyed_uniform: views and count must be positive, got 0 and 4"):
        call.keyed_uniform(torch.arange(3), None, 0, 0, 0, 0, 4, 0)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("value", [-1.0, 1.0, 7.0, float("nan"), float("inf"), float("-inf")])
def test_numbers_outside_of_their_range_write_nowhere_else(op: str, value: float, implementation) -> None:
    """What comes out has no meaning; where targets lie is in the grid still."""
    if implementation.name == "reference":
        pytest.skip("torch looks after itself")
    given = list(arguments(op, 3, (14, 14)))
    given[0] = torch.full_like(given[0], value).to(implementation.device)
    found = getattr(call, op)(*given)
    if op == "multi_block_masks":
        assert found[1].min() >= 0 and found[1].max() < 196


SPECS = [MaskSpec(view, GRIDS[0] if view < 2 else (6, 6), 0.75, "random", drops=True) for view in range(12)]
# Launches of a batch's masks: Triton's, and torch's.
LAUNCHES = {
    "iBOT's two views": ([MaskSpec(view, GRIDS[0], 0.5, "block", least=0.1) for view in range(2)], (2, 0)),
    "--mask": (SPECS, (2, 16)),
    "--mask --masking block": ([replace(spec, masking="even_block") for spec in SPECS], (4, 16)),
    "MAE": ([MaskSpec(0, GRIDS[0], 0.75, "random", drops=True)], (1, 8)),
    "data2vec": ([MaskSpec(0, GRIDS[0], 0.75, "even_block")], (2, 4)),
    "inverse blocks": ([MaskSpec(0, GRIDS[0], 0.75, "inverse_block", drops=True)], (1, 16)),
    "CAPI": ([MaskSpec(0, GRIDS[0], 0.65, "inverse_rectangle", drops=True)], (2, 4)),
    "I-JEPA": ([MaskSpec(0, GRIDS[0], 0.8, "multi_block", drops=True)], (3, 12)),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_masks_are_few_launches(name: str) -> None:
    specs, most = LAUNCHES[name]
    samples = torch.arange(4)
    with launches.counted() as found:
        drawn_together(specs, 3, 5, samples, 7)
    assert (found.triton.total(), found.torch.total()) == most and not found.waits, str(found)
