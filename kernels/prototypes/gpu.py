"""The prototype operators on a GPU, a file each."""

from .mean_entropy import mean_entropy
from .prototype_cross_entropy import prototype_cross_entropy
from .prototype_head_cross_entropy import prototype_head_cross_entropy
from .prototype_head_usage import prototype_head_usage, prototype_head_usage_backward
from .sinkhorn import sinkhorn, sinkhorn_bias, sinkhorn_codes, sinkhorn_rows, sinkhorn_step

__all__ = [
    "mean_entropy",
    "prototype_cross_entropy",
    "prototype_head_cross_entropy",
    "prototype_head_usage",
    "prototype_head_usage_backward",
    "sinkhorn",
    "sinkhorn_bias",
    "sinkhorn_codes",
    "sinkhorn_rows",
    "sinkhorn_step",
]
