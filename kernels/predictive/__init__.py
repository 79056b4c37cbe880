"""Losses between a prediction and its target, row by row: negative cosine similarity, smooth L1."""

from ..table import Operator

OPERATORS = {
    "negative_cosine": Operator(
        "(Tensor p, Tensor z, float eps, bool[] wanted) -> (Tensor, Tensor[], Tensor)", cpu=True, gpu=True
    ),
    "regression": Operator(
        "(Tensor prediction, Tensor target, float beta, bool normalize, float eps, bool[] wanted)"
        " -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
    "regression_rows": Operator(
        "(Tensor prediction, Tensor target, Tensor rows, Tensor weights, float beta, bool normalize, float eps,"
        " bool[] wanted) -> (Tensor, Tensor[], Tensor)",
        cpu=True,
        gpu=True,
    ),
}
