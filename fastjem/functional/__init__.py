"""Public functions without state: losses, Sinkhorn, the EMA update. Arguments after the tensors are keyword-only."""

from fastjem.functional.contrastive import info_nce, nt_xent
from fastjem.functional.covariance import barlow_twins, vicreg
from fastjem.functional.predictive import negative_cosine
from fastjem.functional.prototypes import TeacherStatistics, prototype_cross_entropy, prototype_head_cross_entropy
from fastjem.functional.regularizers import koleo, mean_entropy
from fastjem.functional.sinkhorn import sinkhorn, sinkhorn_bias
from fastjem.functional.supervised import cross_entropy
from fastjem.functional.weights import ema_update_

__all__ = [
    "TeacherStatistics",
    "barlow_twins",
    "cross_entropy",
    "ema_update_",
    "info_nce",
    "koleo",
    "mean_entropy",
    "negative_cosine",
    "nt_xent",
    "prototype_cross_entropy",
    "prototype_head_cross_entropy",
    "sinkhorn",
    "sinkhorn_bias",
    "vicreg",
]
