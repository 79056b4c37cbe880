"""Rows and what is nearest to them: the k nearest of a bank, and a step of k-means."""

from ..table import Operator

OPERATORS = {
    "kmeans_step": Operator(
        "(Tensor features, Tensor centroids, bool spherical, bool update) -> (Tensor, Tensor, Tensor, Tensor)",
        cpu=True,
        gpu=True,
    ),
    "nearest_k": Operator("(Tensor query, Tensor bank, int k) -> (Tensor, Tensor)", cpu=True, gpu=True),
}
