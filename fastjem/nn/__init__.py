"""Modules: losses and heads under the names, with the arguments and the defaults that lightly's users know."""

from fastjem.nn.distillation import Center, DINOLoss, IBOTPatchLoss
from fastjem.nn.prototypes import DINOProjectionHead, KoLeoLoss, MSNLoss, SwaVLoss, SwaVPrototypes, sinkhorn

__all__ = [
    "Center",
    "DINOLoss",
    "DINOProjectionHead",
    "IBOTPatchLoss",
    "KoLeoLoss",
    "MSNLoss",
    "SwaVLoss",
    "SwaVPrototypes",
    "sinkhorn",
]
