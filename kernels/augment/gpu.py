"""The image operators on a GPU, a file each."""

from .augment import augment
from .crop_resize import crop_resize

__all__ = ["augment", "crop_resize"]
