"""Public functions without state: losses, Sinkhorn, the EMA update. Arguments after the tensors are keyword-only."""

from fastjem.functional.contrastive import info_nce, nt_xent
from fastjem.functional.covariance import barlow_twins, tico, vicreg
from fastjem.functional.gaussian import lejepa, random_directions, sigreg
from fastjem.functional.predictive import negative_cosine, regression
from fastjem.functional.prototypes import prototype_cross_entropy, sinkhorn, sinkhorn_bias
from fastjem.functional.spectral import emp_ssl, frossl, mmcr, total_coding_rate, w_mse, whiten
from fastjem.functional.supervised import cross_entropy
from fastjem.functional.weights import ema_update_

__all__ = [
    "barlow_twins",
    "cross_entropy",
    "ema_update_",
    "emp_ssl",
    "frossl",
    "info_nce",
    "lejepa",
    "mmcr",
    "negative_cosine",
    "nt_xent",
    "prototype_cross_entropy",
    "random_directions",
    "regression",
    "sigreg",
    "sinkhorn",
    "sinkhorn_bias",
    "tico",
    "total_coding_rate",
    "vicreg",
    "w_mse",
    "whiten",
]
