"""The operators on weights and gradients on a GPU, a file each."""

from .ema_update import ema_update_
from .rescale import rescale_, rescale_all_

__all__ = ["ema_update_", "rescale_", "rescale_all_"]
