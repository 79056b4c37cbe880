"""The covariance operators on a GPU, a file each; what both do to columns is in columns.py."""

from .barlow_twins import barlow_twins
from .vicreg import vicreg

__all__ = ["barlow_twins", "vicreg"]
