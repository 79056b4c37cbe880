"""The losses between predictions and targets on a GPU, a file each."""

from .negative_cosine import negative_cosine
from .regression import regression

__all__ = ["negative_cosine", "regression"]
