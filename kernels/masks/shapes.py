"""What the arguments of masks' operators must be: see kernels/shapes.py."""

import torch

from ..expect import expect, fail, told

MOST_RECTANGLES = 62  # each is a bit of a signed word of 64


def _keyed_uniform(samples, step, _epoch, _view, views, _first, count, _seed):
    op = "keyed_uniform"
    expect(op, "samples", samples, (samples.numel(),), torch.int64)
    expect(op, "step", step, (), torch.int64)
    if views < 1 or count < 1:
        fail(op, "views and count must be positive", f"{views} and {count}")


def _drawn(op, drawn, height, width, columns):
    """Refuse all but numbers [N, columns], and grids without patches."""
    expect(op, "drawn", drawn, (drawn.shape[0] if drawn.dim() else 0, columns))
    if drawn.dtype not in (torch.float32, torch.float64):
        fail(op, "drawn must be float32 or float64", told(drawn))
    if height < 1 or width < 1:
        fail(op, "height and width must be positive", f"{height} and {width}")


def _block_masks(drawn, wanted, height, width, *_):
    op = "block_masks"
    tries = (drawn.shape[-1] - 2) // 4 if drawn.dim() else 0
    _drawn(op, drawn, height, width, 2 + 4 * max(tries, 1))
    expect(op, "wanted", wanted, (len(drawn),))


def _even_block_scores(drawn, height, width):
    op = "even_block_scores"
    rectangles = (drawn.shape[-1] - height * width) // 4 if drawn.dim() else 0
    _drawn(op, drawn, height, width, 4 * min(max(rectangles, 1), MOST_RECTANGLES) + height * width)


def _inverse_rectangle_masks(drawn, height, width, *_):
    _drawn("inverse_rectangle_masks", drawn, height, width, 3)


def _multi_block_masks(drawn, height, width, target, context, targets, *_):
    op = "multi_block_masks"
    for name, sides in (("target", target), ("context", context)):
        if len(sides) != 2 or not (1 <= sides[0] < height and 1 <= sides[1] < width):
            fail(op, f"{name} must be smaller than the grid, {height} x {width}", sides)
    if targets < 1:
        fail(op, "targets must be positive", targets)
    places = (drawn.shape[-1] // 2 - targets) // (targets + 1) if drawn.dim() else 0
    _drawn(op, drawn, height, width, 2 * (targets + (targets + 1) * max(places, 1)))


SHAPES = {
    "keyed_uniform": _keyed_uniform,
    "block_masks": _block_masks,
    "even_block_scores": _even_block_scores,
    "inverse_rectangle_masks": _inverse_rectangle_masks,
    "multi_block_masks": _multi_block_masks,
}
