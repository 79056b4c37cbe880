"""The losses between predictions and targets on a GPU, a file each."""

from .negative_cosine import negative_cosine
from .regression import regression, regression_rows

__all__ = ["negative_cosine", "regression", "regression_rows"]
