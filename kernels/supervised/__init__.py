"""Losses on labels: cross-entropy."""

from ..table import Operator

OPERATORS = {
    "cross_entropy": Operator(
        "(Tensor logits, Tensor labels, int ignore_index, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
    "cross_entropy_rows": Operator(
        "(Tensor logits, Tensor labels, Tensor weights, Tensor label_smoothing, int ignore_index, bool[] wanted)"
        " -> (Tensor, Tensor[])",
        cpu=True,
        gpu=True,
    ),
}
