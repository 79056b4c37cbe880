"""Losses on labels: cross-entropy."""

from ..table import Operator

OPERATORS = {
    "cross_entropy": Operator(
        "(Tensor logits, Tensor labels, int ignore_index, bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
}
