"""Masks of patches, drawn for a whole batch: numbers that follow a key, and what rectangles of them hide."""

from ..table import Operator

OPERATORS = {
    "keyed_uniform": Operator(
        "(Tensor samples, Tensor? step, int epoch, int view, int views, int first, int count, int seed) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "block_masks": Operator(
        "(Tensor drawn, Tensor? wanted, int height, int width, float images, float low, float high, int least,"
        " int most, float aspect, int attempts) -> Tensor",
        cpu=True,
        gpu=True,
    ),
    "even_block_scores": Operator("(Tensor drawn, int height, int width) -> Tensor", cpu=True, gpu=True),
    "inverse_rectangle_masks": Operator(
        "(Tensor drawn, int height, int width, int seen, float low, float high) -> Tensor", cpu=True, gpu=True
    ),
    "multi_block_masks": Operator(
        "(Tensor drawn, int height, int width, int[] target, int[] context, int targets, int keep) -> (Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
}
