"""Public functions without state: losses, Sinkhorn, the EMA update. Arguments after the tensors are keyword-only."""

from fastjem.functional.contrastive import dcl, dclw, info_nce, nearest_neighbors, nt_xent, supcon
from fastjem.functional.covariance import barlow_twins, vicreg
from fastjem.functional.image_text import clip_loss, siglip_loss
from fastjem.functional.predictive import negative_cosine
from fastjem.functional.prototypes import prototype_cross_entropy, sinkhorn, sinkhorn_bias
from fastjem.functional.supervised import cross_entropy
from fastjem.functional.weights import ema_update_

__all__ = [
    "barlow_twins",
    "clip_loss",
    "cross_entropy",
    "dcl",
    "dclw",
    "ema_update_",
    "info_nce",
    "nearest_neighbors",
    "negative_cosine",
    "nt_xent",
    "prototype_cross_entropy",
    "siglip_loss",
    "sinkhorn",
    "sinkhorn_bias",
    "supcon",
    "vicreg",
]
