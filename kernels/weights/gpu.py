"""The operators on weights and gradients on a GPU, a file each."""

from .ema_update import ema_update_
from .rescale import rescale_

__all__ = ["ema_update_", "rescale_"]
