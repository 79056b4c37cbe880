"""Public functions without state: losses, Sinkhorn, the EMA update, augmentation.

Arguments after the tensors are keyword-only.
"""

from fastjem.functional.aligned import hypersphere, macl
from fastjem.functional.augment import augment, crop_resize
from fastjem.functional.coding_rate import emp_ssl, simdino, total_coding_rate
from fastjem.functional.contrastive import dcl, dclw, info_nce, nt_xent
from fastjem.functional.covariance import Health, barlow_twins, tico, vicreg
from fastjem.functional.dense_structure import dense_structure
from fastjem.functional.detcon import detcon
from fastjem.functional.gaussian import lejepa, random_directions, sigreg
from fastjem.functional.gram import gram_loss
from fastjem.functional.image_text import clip_loss, siglip_loss
from fastjem.functional.nearest import nearest_neighbors, nnclr
from fastjem.functional.neighbors import Clusters, kmeans, knn_votes, nearest_rows
from fastjem.functional.patches import masked_rows, patch_kernel_alignment
from fastjem.functional.predictive import negative_cosine, regression
from fastjem.functional.prototypes import (
    TeacherStatistics,
    prototype_cross_entropy,
    prototype_head_cross_entropy,
)
from fastjem.functional.regularizers import koleo, mean_entropy
from fastjem.functional.sinkhorn import sinkhorn, sinkhorn_bias
from fastjem.functional.spectral import frossl, mmcr, w_mse, whiten
from fastjem.functional.supcon import supcon
from fastjem.functional.supervised import cross_entropy
from fastjem.functional.visreg import visreg
from fastjem.functional.weights import ema_update_

__all__ = [
    "Clusters",
    "Health",
    "TeacherStatistics",
    "augment",
    "barlow_twins",
    "clip_loss",
    "crop_resize",
    "cross_entropy",
    "dcl",
    "dclw",
    "dense_structure",
    "detcon",
    "ema_update_",
    "emp_ssl",
    "frossl",
    "gram_loss",
    "hypersphere",
    "info_nce",
    "kmeans",
    "knn_votes",
    "koleo",
    "lejepa",
    "macl",
    "masked_rows",
    "mean_entropy",
    "mmcr",
    "nearest_neighbors",
    "nearest_rows",
    "negative_cosine",
    "nnclr",
    "nt_xent",
    "patch_kernel_alignment",
    "prototype_cross_entropy",
    "prototype_head_cross_entropy",
    "random_directions",
    "regression",
    "siglip_loss",
    "sigreg",
    "simdino",
    "sinkhorn",
    "sinkhorn_bias",
    "supcon",
    "tico",
    "total_coding_rate",
    "vicreg",
    "visreg",
    "w_mse",
    "whiten",
]
