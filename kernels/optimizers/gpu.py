"""The optimisers on a GPU, a file each."""

from .adamw import adamw_
from .lars import lars_, lars_norms

__all__ = ["adamw_", "lars_", "lars_norms"]
